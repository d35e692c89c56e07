//! What the receiver's control socket answers.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::control::{Answer, Call, CommandError, CommandInfo, Commands, code};
use crate::daemon::let_go_of;
use crate::name::Name;

use super::Receiver;
use super::holdings::{Client, Memory, Preparation};
use super::memory;
use super::prepared::Place;

const fn command(name: &'static str) -> CommandInfo {
    CommandInfo { name, oob: false }
}

const TABLE: &[CommandInfo] = &[
    command("region-add"),
    command("region-del"),
    command("region-take"),
    command("query-regions"),
    command("blob-take"),
    command("blob-del"),
    command("migrate-continue"),
    command("query-migrate"),
    command("query-history"),
    command("query-status"),
    command("quit"),
];

#[derive(Debug)]
pub(super) struct ReceiverCommands {
    receiver: Arc<Receiver>,
    /// Where it listens, with the ports the kernel chose.
    listening: Vec<String>,
    shutdown: CancellationToken,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryMigrate {
    id: Option<Name>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RegionAdd {
    name: Name,
    path: Option<PathBuf>,
    fdname: Option<String>,
    page_size: Option<u64>,
    #[serde(default)]
    confirm: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    name: Name,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Transfer {
    id: Name,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Continue {
    id: Name,
    state: State,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    PreSwitchover,
}

impl ReceiverCommands {
    pub(super) fn new(
        receiver: Arc<Receiver>,
        listening: Vec<String>,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            receiver,
            listening,
            shutdown,
        }
    }

    async fn query_migrate(&self, id: Option<&Name>) -> Result<Value, CommandError> {
        let (seen, places) = self.seen(id);
        match (seen, &id) {
            (Some(mut shown), _) => {
                if let Some(places) = places {
                    shown["memory"] = memory::to_json(&memory::of_places(places).await);
                }
                Ok(shown)
            }
            (None, Some(id)) => Err(CommandError::new(
                "no-such-transfer",
                format!("No transfer with id '{id}' has arrived"),
            )),
            // QEMU answers an empty object as long as there was no migration.
            (None, None) => Ok(json!({})),
        }
    }

    /// What is known of an attempt or the latest, and where its Regions are arriving.
    fn seen(&self, id: Option<&Name>) -> (Option<Value>, Option<Arc<[Place]>>) {
        let state = self.receiver.lock();
        let wanted = |(known, _): &&(Name, Value)| id.is_none_or(|id| id == known);
        let Some((id, shown)) = state.seen.iter().rev().find(wanted) else {
            return (None, None);
        };
        let entry = state.attempts.values().find(|entry| entry.id() == id);
        let places = entry.map(|entry| Arc::clone(entry.destinations()));
        (Some(shown.clone()), places)
    }

    async fn query_regions(&self) -> Value {
        let prepared = self.receiver.lock().holdings.prepared_memory();
        let observed = match prepared.is_empty() {
            true => Vec::new(),
            false => memory::of_regions(prepared).await,
        };
        let mut state = self.receiver.lock();
        state.holdings.observed(observed);
        state.holdings.to_json()
    }

    fn region_add(&self, call: &Call) -> Result<Value, CommandError> {
        let add: RegionAdd = call.parse()?;
        let memory = match (add.path, add.fdname) {
            (Some(path), None) if !path.is_absolute() => {
                return Err(invalid(
                    "Parameter 'path' expects an absolute path: the daemon has its own working directory",
                ));
            }
            (Some(path), None) => Memory::Path(path),
            (None, Some(fdname)) => Memory::Descriptor(call.take_fd(&fdname)?),
            _ => return Err(invalid("region-add takes either 'path' or 'fdname'")),
        };
        let client = Client {
            id: call.client,
            gone: call.gone.clone(),
        };
        self.receiver.lock().holdings.prepare(Preparation {
            name: add.name,
            memory,
            page_size: add.page_size,
            client,
            confirm: add.confirm,
        })?;
        Ok(json!({}))
    }

    fn migrate_continue(&self, call: &Call) -> Result<Value, CommandError> {
        let Continue {
            id,
            state: State::PreSwitchover,
        } = call.parse()?;
        if self.receiver.lock().questions.answer(&id, call.client) {
            return Ok(json!({}));
        }
        let text = format!("'{id}' does not wait for that, or not for this connection");
        Err(CommandError::new("not-waiting", text))
    }
}

fn invalid(desc: impl Into<String>) -> CommandError {
    CommandError::new(code::INVALID_ARGUMENT, desc)
}

/// An answer that comes with a descriptor.
fn with_fd((value, fd): (Value, OwnedFd)) -> Answer {
    let fds = vec![fd];
    Answer { value, fds }
}

impl Commands for ReceiverCommands {
    fn table(&self) -> &'static [CommandInfo] {
        TABLE
    }

    async fn execute(&self, call: Call) -> Result<Answer, CommandError> {
        let answer = match call.command.as_str() {
            "region-add" => self.region_add(&call),
            "region-del" => {
                let Region { name } = call.parse()?;
                let gone = self.receiver.lock().holdings.remove(&name)?;
                let_go_of(gone).await;
                Ok(json!({}))
            }
            "region-take" => {
                let Region { name } = call.parse()?;
                return self.receiver.lock().holdings.take(&name).map(with_fd);
            }
            "query-regions" => {
                let Nothing {} = call.parse()?;
                Ok(self.query_regions().await)
            }
            "blob-take" => {
                let Transfer { id } = call.parse()?;
                return self.receiver.lock().blobs.take(&id).map(with_fd);
            }
            "blob-del" => {
                let Transfer { id } = call.parse()?;
                self.receiver.lock().blobs.delete(&id)?;
                Ok(json!({}))
            }
            "migrate-continue" => self.migrate_continue(&call),
            "query-migrate" => {
                let QueryMigrate { id } = call.parse()?;
                self.query_migrate(id.as_ref()).await
            }
            "query-history" => {
                let Nothing {} = call.parse()?;
                Ok(self.receiver.history.latest().into())
            }
            "query-status" => {
                let Nothing {} = call.parse()?;
                Ok(json!({"status": "running", "running": true, "listen": self.listening}))
            }
            "quit" => {
                let Nothing {} = call.parse()?;
                self.shutdown.cancel();
                Ok(json!({}))
            }
            other => unreachable!("{other} is not in the table"),
        };
        answer.map(Answer::from)
    }
}
