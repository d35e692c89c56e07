//! What the receiver's control socket answers.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::control::{Call, CommandError, CommandInfo, Commands};
use crate::name::Name;

use super::Receiver;

const TABLE: &[CommandInfo] = &[
    CommandInfo {
        name: "query-migrate",
        oob: false,
    },
    CommandInfo {
        name: "query-regions",
        oob: false,
    },
    CommandInfo {
        name: "query-status",
        oob: false,
    },
    CommandInfo {
        name: "quit",
        oob: false,
    },
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

    fn query_migrate(&self, id: Option<&Name>) -> Result<Value, CommandError> {
        let state = self.receiver.lock();
        let wanted = |(known, _): &&(Name, Value)| id.as_ref().is_none_or(|id| *id == known);
        match (state.seen.iter().rev().find(wanted), &id) {
            (Some((_, shown)), _) => Ok(shown.clone()),
            (None, Some(id)) => Err(CommandError::new(
                "no-such-transfer",
                format!("No transfer with id '{id}' has arrived"),
            )),
            // QEMU answers an empty object as long as there was no migration.
            (None, None) => Ok(json!({})),
        }
    }

    fn query_regions(&self) -> Value {
        let state = self.receiver.lock();
        let directory = &self.receiver.config.directory;
        let show = |(name, bytes): &(Name, u64)| json!({"name": name, "size": bytes, "path": directory.join(name.as_str())});
        state.committed.iter().map(show).collect()
    }
}

impl Commands for ReceiverCommands {
    fn table(&self) -> &'static [CommandInfo] {
        TABLE
    }

    async fn execute(&self, call: Call) -> Result<Value, CommandError> {
        match call.command.as_str() {
            "query-migrate" => self.query_migrate(call.parse::<QueryMigrate>()?.id.as_ref()),
            "query-regions" => {
                let Nothing {} = call.parse()?;
                Ok(self.query_regions())
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
        }
    }
}
