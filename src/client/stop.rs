//! For a writer: stopping when the sender asks for it (freeze `client`), and knowing when to go on.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{ClientError, Connection, Event};

/// Pause between two attempts to reach a sender that is gone.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What a writer does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// It writes.
    Write,
    /// It writes nothing, and looks for orders from time to time.
    StandStill,
    /// It writes nothing any more: the memory has another owner.
    End,
}

/// A writer that stops itself, by the connection that registered its Regions.
///
/// ```no_run
/// # use std::time::Duration;
/// # use memferry::client::{ClientError, Connection, Order, Stoppable};
/// # fn write_something() {}
/// # fn example(connection: Connection) -> Result<(), ClientError> {
/// let mut sender = Stoppable::new(connection); // which has registered with {"kind": "client"}
/// loop {
///     match sender.attend(Duration::ZERO)? {
///         Order::Write => write_something(),
///         Order::StandStill => {
///             sender.attend(Duration::from_secs(1))?;
///         }
///         Order::End => return Ok(()),
///     }
/// }
/// # }
/// ```
///
/// When the connection is lost the writer goes on by itself, and has to register again before it can be
/// moved; only when a commit may have been sent it stays as it is, and looks for a sender that knows.
#[derive(Debug)]
pub struct Stoppable {
    path: PathBuf,
    /// `None` once it is lost.
    connection: Option<Connection>,
    state: State,
    /// No sender is looked for before.
    reconnect: Instant,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Writes,
    /// For the attempt of this id. Once it has promised to stay so, only a word of a sender ends it.
    StandsStill {
        id: Value,
        promised: bool,
    },
    HandedOver,
}

impl Stoppable {
    /// Takes the connection that has registered, or is about to.
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        Self {
            path: connection.path.clone(),
            connection: Some(connection),
            state: State::Writes,
            reconnect: Instant::now(),
        }
    }

    /// The connection, to register with; `None` when it is lost.
    pub fn connection(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// Does what the sender asks for, and says what the writer is to do now. Waits up to `timeout` for
    /// something to be asked.
    ///
    /// To be called between two writes, with all marks made: being here is what stops the writer.
    pub fn attend(&mut self, timeout: Duration) -> Result<Order, ClientError> {
        let mut left = timeout;
        while let Some(event) = self.next_event(left)? {
            left = Duration::ZERO;
            let answer = self.obey(&event);
            if let (Some(question), Some(connection)) = (answer, &mut self.connection) {
                let order = json!({"id": event.data["id"], "state": question});
                match connection.execute("migrate-continue", order) {
                    // Too late: an event says what has become of it.
                    Ok(_) | Err(ClientError::Command { .. }) => {}
                    Err(error) => self.lost(error)?,
                }
            }
        }
        Ok(match self.state {
            State::Writes => Order::Write,
            State::StandsStill { .. } => Order::StandStill,
            State::HandedOver => Order::End,
        })
    }

    /// For a `poll` of the caller's own: readable when there may be something to attend to.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        match &mut self.connection {
            Some(connection) => match connection.next_event(timeout) {
                Ok(event) => Ok(event),
                Err(error) => self.lost(error).map(|()| None),
            },
            None => {
                if matches!(self.state, State::StandsStill { .. }) {
                    self.inquire(timeout);
                }
                Ok(None)
            }
        }
    }

    /// Changes state as an event says; gives the question that has to be answered.
    fn obey(&mut self, event: &Event) -> Option<&'static str> {
        let id = &event.data["id"];
        // Only what names Regions is meant for whoever registered them.
        if event.name != "MIGRATION" || event.data["regions"].is_null() {
            return None;
        }
        let status = event.data["status"].as_str()?;
        let ours = matches!(&self.state, State::StandsStill { id: of, .. } if of == id);
        let (id, promised) = (id.clone(), status == "completing");
        match status {
            "pre-switchover" if self.state == State::Writes => {
                self.state = State::StandsStill { id, promised };
                Some("pre-switchover")
            }
            // Before it is answered: from then on it counts.
            "completing" if ours => {
                self.state = State::StandsStill { id, promised };
                Some("completing")
            }
            _ => {
                self.settle(ours, status);
                None
            }
        }
    }

    fn settle(&mut self, ours: bool, status: &str) {
        match status {
            "active" | "failed" | "cancelled" if ours => self.state = State::Writes,
            "completed" if ours => self.state = State::HandedOver,
            _ => {}
        }
    }

    /// The connection has ended. It is an error to be told of where the writer goes on.
    fn lost(&mut self, error: ClientError) -> Result<(), ClientError> {
        self.connection = None;
        match self.state {
            State::StandsStill { promised: true, .. } | State::HandedOver => Ok(()),
            State::Writes | State::StandsStill { .. } => {
                self.state = State::Writes;
                Err(error)
            }
        }
    }

    /// Asks a sender, when there is one again, what has become of the attempt. One that does not know of
    /// it says nothing about who owns the memory.
    fn inquire(&mut self, timeout: Duration) {
        let now = Instant::now();
        std::thread::sleep(timeout.min(self.reconnect.saturating_duration_since(now)));
        if Instant::now() < self.reconnect {
            return;
        }
        self.reconnect = Instant::now() + RECONNECT_PAUSE;
        let State::StandsStill { id, .. } = &self.state else {
            return;
        };
        let asked = Connection::connect(&self.path)
            .and_then(|mut sender| sender.execute("query-migrate", json!({"id": id})));
        if let Ok(answer) = asked {
            self.settle(true, answer["status"].as_str().unwrap_or_default());
        }
    }
}
