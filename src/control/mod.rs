//! The control socket: QMP as QEMU speaks it, for any set of commands.
//!
//! What a command does is the daemon's business, told by its [`Commands`]. This module does the rest:
//! framing, negotiation, order, out-of-band commands, events, descriptors, and who may connect. A client
//! that is slow, silent or broken harms only itself: every client has a task and a bounded queue of its
//! own, and nobody waits for it.
//!
//! ```text
//!            bytes          messages            in-band, in order
//!  client ──────────► parse ────────► session ─────────────────────► Commands
//!    ▲                                   │ out-of-band, at once ────►    │
//!    └──────────── outbox ◄──────────────┴──────── answers ◄─────────────┘
//!                     ▲
//!                     └── events ◄── EventBus ◄── anyone in the daemon
//! ```

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

mod arguments;
mod encode;
mod events;
mod fdpass;
mod outbox;
mod parse;
mod request;
mod server;
mod session;

pub use events::EventBus;
pub use fdpass::FdTable;
pub use server::{Access, Server};

/// Machine codes of the errors this module makes itself; sent as `error.x-code`, stable for scripts.
pub mod code {
    /// The input is no JSON, or no request.
    pub const BAD_REQUEST: &str = "bad-request";
    /// No such command, or not at this point of the session.
    pub const COMMAND_NOT_FOUND: &str = "command-not-found";
    /// An argument is missing, unexpected, or of the wrong type or value.
    pub const INVALID_ARGUMENT: &str = "invalid-argument";
    /// A descriptor was not passed, or is not known by that name.
    pub const NO_DESCRIPTOR: &str = "no-descriptor";
    /// A request or an answer is above its limit.
    pub const TOO_LARGE: &str = "too-large";
    /// The client's user may not use this socket.
    pub const ACCESS_DENIED: &str = "access-denied";
}

/// One command of a daemon, as `query-commands` lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandInfo {
    /// The name on the wire.
    pub name: &'static str,
    /// Whether `exec-oob` may run it beside a pending command. Such a command must not wait.
    pub oob: bool,
}

/// The commands a daemon answers.
pub trait Commands: Send + Sync + 'static {
    /// Every command, except those the server answers itself: `qmp_capabilities`, `query-version`,
    /// `query-commands`, `getfd` and `closefd`.
    fn table(&self) -> &'static [CommandInfo];

    /// Runs a command of the table. Runs to its end even when the client leaves meanwhile.
    fn execute(&self, call: Call) -> impl Future<Output = Result<Answer, CommandError>> + Send;
}

/// What a command that succeeded answers.
#[derive(Debug)]
pub struct Answer {
    /// The `return` member.
    pub value: Value,
    /// Descriptors that go with the first byte of the answer.
    pub fds: Vec<OwnedFd>,
}

impl From<Value> for Answer {
    fn from(value: Value) -> Self {
        Self {
            value,
            fds: Vec::new(),
        }
    }
}

/// Tells control connections apart, over the life of an [`EventBus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(u64);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One command as a client sent it.
#[derive(Debug, Clone)]
pub struct Call {
    /// A name from the table.
    pub command: String,
    /// Always an object; empty when the client sent none.
    pub arguments: Value,
    /// The descriptors this connection passed and named.
    pub fds: FdTable,
    /// The connection, for events meant for it alone ([`EventBus::publish_to`]).
    pub client: ClientId,
    /// Cancelled once that connection has ended.
    pub gone: CancellationToken,
}

impl Call {
    /// The arguments as a type. Errors have QEMU's wording, with the path of the member.
    ///
    /// Give the type `#[serde(deny_unknown_fields)]`: an argument nobody reads is an error.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, CommandError> {
        arguments::parse(self.arguments.clone())
    }

    /// Takes the descriptor that `getfd` stored under `name`.
    pub fn take_fd(&self, name: &str) -> Result<OwnedFd, CommandError> {
        self.fds.take(name).ok_or_else(|| {
            CommandError::new(
                code::NO_DESCRIPTOR,
                format!("File descriptor named '{name}' has not been found"),
            )
        })
    }
}

/// The `class` member of an error. QEMU has deprecated all but the first for new errors; the others
/// are here for the situations in which its clients know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Anything.
    GenericError,
    /// The command does not exist, or not now.
    CommandNotFound,
    /// What the command names does not exist.
    DeviceNotFound,
    /// What the command names is not in use.
    DeviceNotActive,
}

/// Why a command failed, as the client is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// QMP's own classification.
    pub class: ErrorClass,
    /// For a person.
    pub desc: String,
    /// For a program: stable, sent as `error.x-code`.
    pub code: Cow<'static, str>,
}

impl CommandError {
    /// A `GenericError`.
    pub fn new(code: impl Into<Cow<'static, str>>, desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
            code: code.into(),
        }
    }

    /// The same error under another class.
    #[must_use]
    pub fn with_class(self, class: ErrorClass) -> Self {
        Self { class, ..self }
    }
}

#[cfg(test)]
mod tests;
