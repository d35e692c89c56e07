//! What the sender's control socket answers.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::{FreezeConfig, TrackerConfig};
use crate::control::{Answer, Call, CommandError, CommandInfo, Commands, code};
use crate::daemon::let_go_of;
use crate::endpoint::Endpoint;
use crate::name::Name;
use crate::wire::{Hex128, Owner};

use super::Sender;
use super::clients::{Clients, Said};
use super::registry::{self, Claim, Source};
use super::status::Attempt;
use super::transfer::{Order, Transfer};

const fn command(name: &'static str, oob: bool) -> CommandInfo {
    CommandInfo { name, oob }
}

const TABLE: &[CommandInfo] = &[
    command("region-add", false),
    command("region-del", false),
    command("query-regions", false),
    command("migrate", false),
    command("migrate_cancel", true),
    command("migrate-pause", true),
    command("migrate-recover", true),
    command("migrate-continue", true),
    command("migrate-resolve", false),
    command("query-migrate", false),
    command("query-history", false),
    command("query-status", false),
    command("quit", false),
];

#[derive(Debug)]
pub(super) struct SenderCommands {
    sender: Arc<Sender>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RegionAdd {
    name: Name,
    path: Option<PathBuf>,
    fdname: Option<String>,
    page_size: Option<u64>,
    #[serde(default)]
    tracker: TrackerConfig,
    #[serde(default)]
    freeze: FreezeConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegionDel {
    name: Name,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfAttempt {
    id: Option<Name>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recover {
    id: Option<Name>,
    uri: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Continue {
    id: Option<Name>,
    state: Question,
    /// Of the final blob.
    fdname: Option<String>,
}

/// The states in which clients are asked something.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Question {
    PreSwitchover,
    Completing,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resolve {
    id: Name,
    owner: Side,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Side {
    Source,
    Destination,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Migrate {
    uri: String,
    id: Option<Name>,
    regions: Option<Vec<Name>>,
    #[serde(default)]
    dry_run: bool,
    final_fdname: Option<String>,
}

/// The members of [`Migrate`]; whatever else `migrate` is given is a parameter.
const MIGRATE_MEMBERS: [&str; 5] = ["uri", "id", "regions", "dry-run", "final-fdname"];

impl SenderCommands {
    pub(super) fn new(sender: Arc<Sender>) -> Self {
        Self { sender }
    }

    fn region_add(&self, call: &Call) -> Result<Value, CommandError> {
        let add: RegionAdd = call.parse()?;
        let memory = match (&add.path, &add.fdname) {
            (Some(path), None) if !path.is_absolute() => {
                return Err(invalid(
                    "Parameter 'path' expects an absolute path: the daemon has its own working directory",
                ));
            }
            (Some(path), None) => Source::Path(path),
            (None, Some(fdname)) => Source::Descriptor(call.take_fd(fdname)?),
            _ => return Err(invalid("region-add takes either 'path' or 'fdname'")),
        };
        let mut state = self.sender.lock();
        state.registry.add(
            add.name.clone(),
            memory,
            add.tracker,
            add.freeze,
            Some(call),
        )?;
        if let Err(error) = state.registry.check_page_size(&add.name, add.page_size) {
            state.registry.remove(&add.name)?;
            return Err(error);
        }
        Ok(json!({}))
    }

    async fn migrate(&self, call: Call) -> Result<Value, CommandError> {
        let Value::Object(all) = call.arguments.clone() else {
            return Err(invalid("QMP input member 'arguments' must be an object"));
        };
        let (members, parameters): (Map<_, _>, Map<_, _>) = all
            .into_iter()
            .partition(|(key, _)| MIGRATE_MEMBERS.contains(&key.as_str()));
        let migrate: Migrate = Call {
            arguments: members.into(),
            ..call.clone()
        }
        .parse()?;
        let parameters = self.sender.parameters.with_overrides(&parameters);
        let parameters = parameters.map_err(|error| invalid(error.to_string()))?;
        let endpoint = endpoint(&migrate.uri)?;
        let id = migrate.id.map_or_else(generated_id, Ok)?;
        let final_blob = migrate.final_fdname.map(|name| call.take_fd(&name));
        let final_blob = final_blob.transpose()?;

        let (attempt, claim, order) = {
            let mut state = self.sender.lock();
            if state
                .attempts
                .get(&id)
                .is_some_and(|attempt| !attempt.status().is_final())
            {
                return Err(CommandError::new(
                    "id-in-use",
                    format!("There is a transfer with id '{id}' under way"),
                ));
            }
            let names = migrate.regions.unwrap_or_else(|| state.registry.names());
            if names.is_empty() {
                return Err(CommandError::new(
                    "no-regions",
                    "There is no region to be moved: add one with region-add",
                ));
            }
            if let Some((name, attempt)) = state.under_way_with(&names) {
                return Err(registry::busy(name, &attempt.id));
            }
            let (claim, regions) = state.registry.claim(&names, &id)?;
            let total = regions
                .iter()
                .map(|registered| registered.region.bytes())
                .sum();
            let clients = regions.iter().filter_map(|registered| {
                Some((registered.client.clone()?, registered.region.name().clone()))
            });
            let clients = Clients::new(clients);
            let (events, history) = (self.sender.events.clone(), self.sender.history.clone());
            let attempt = Attempt::new(id, names, total, parameters, events, history, clients);
            if let Some(fd) = final_blob {
                attempt.give_final_blob(fd);
            }
            let order = Order {
                endpoint,
                regions,
                journal: Arc::clone(&self.sender.journal),
                guardian: Arc::clone(&self.sender.guardian),
                boot_id: self.sender.boot_id.clone(),
                identity: self.sender.identity.clone(),
            };
            (attempt, claim, order)
        };
        if migrate.dry_run {
            return self.rehearse(attempt, &claim, order).await;
        }
        self.sender.add_attempt(&attempt);
        let shown = json!({"id": attempt.id});
        let transfer = Arc::clone(&self.sender).carry_out(attempt, claim, order);
        self.sender
            .transfers
            .spawn_on(transfer, &self.sender.event_loop);
        Ok(shown)
    }

    /// Answers with the plan if the receiver would take it.
    async fn rehearse(
        &self,
        attempt: Arc<Attempt>,
        claim: &Claim,
        order: Order,
    ) -> Result<Value, CommandError> {
        let rehearsed = match Transfer::new(Arc::clone(&attempt), order) {
            Ok(transfer) => transfer.rehearse().await,
            Err(error) => Err(error),
        };
        self.sender.lock().registry.release(claim, false);
        match rehearsed {
            Ok(()) => Ok(json!({
                "id": attempt.id,
                "dry-run": true,
                "regions": attempt.regions,
                "total": attempt.total_bytes,
                "parameters": attempt.parameters.to_json(),
            })),
            Err(error) => Err(CommandError::new(
                error.code().to_owned(),
                error.to_string(),
            )),
        }
    }

    fn cancel(&self, id: Option<&Name>) -> Result<Value, CommandError> {
        let Some(attempt) = self.sender.attempt(id) else {
            // As in QEMU: cancelling nothing is no error, cancelling what does not exist is.
            return id.map_or_else(|| Ok(json!({})), |id| Err(no_such(id)));
        };
        if attempt.request_cancel() {
            Ok(json!({}))
        } else {
            let text = format!(
                "The commit of '{}' is on its way: the regions have changed hands or are about to",
                attempt.id
            );
            Err(CommandError::new("too-late", text))
        }
    }

    /// The transfer that is named, or the latest; there has to be one.
    fn known(&self, id: Option<&Name>) -> Result<Arc<Attempt>, CommandError> {
        self.sender.attempt(id).ok_or_else(|| match id {
            Some(id) => no_such(id),
            None => CommandError::new("no-such-transfer", "There was no transfer yet"),
        })
    }

    fn pause(&self, id: Option<&Name>) -> Result<Value, CommandError> {
        let attempt = self.known(id)?;
        if attempt.request_pause() {
            return Ok(json!({}));
        }
        let (id, status) = (&attempt.id, attempt.status().as_str());
        let text = format!("'{id}' cannot be paused: it is {status}");
        Err(CommandError::new("not-active", text))
    }

    fn recover(&self, recover: Recover) -> Result<Value, CommandError> {
        let attempt = self.known(recover.id.as_ref())?;
        let endpoint = recover.uri.as_deref().map(endpoint).transpose()?;
        if attempt.request_recover(endpoint) {
            return Ok(json!({}));
        }
        let (id, status) = (&attempt.id, attempt.status().as_str());
        let text = format!("'{id}' does not wait to go on: it is {status}");
        Err(CommandError::new("not-paused", text))
    }

    /// A client answers what it was asked by the event of this state.
    fn go_on(&self, call: &Call) -> Result<Value, CommandError> {
        let answer: Continue = call.parse()?;
        let attempt = self.sender.attempt(answer.id.as_ref());
        let attempt = attempt.ok_or_else(|| match &answer.id {
            Some(id) => no_such(id),
            None => CommandError::new("no-such-transfer", "There is no transfer"),
        })?;
        let said = match answer.state {
            Question::PreSwitchover => Said::StandsStill,
            Question::Completing => Said::HandsOver,
        };
        if let Some(name) = &answer.fdname {
            // Before the answer counts: the blob is read as soon as all have answered.
            let fd = call.take_fd(name)?;
            if said != Said::StandsStill || !attempt.give_final_blob(fd) {
                return Err(invalid(
                    "A final blob comes once, and with the answer to pre-switchover",
                ));
            }
        }
        if attempt.answered(call.client, said) {
            return Ok(json!({}));
        }
        let text = format!(
            "'{}' does not wait for that: it is {}",
            attempt.id,
            attempt.status().as_str()
        );
        Err(CommandError::new("not-waiting", text))
    }

    fn resolve(&self, resolve: &Resolve) -> Result<Value, CommandError> {
        let id = &resolve.id;
        let attempt = self.sender.attempt(Some(id)).ok_or_else(|| no_such(id))?;
        let owner = match resolve.owner {
            Side::Source => Owner::Source,
            Side::Destination => Owner::Destination,
        };
        if attempt.decide(owner) {
            return Ok(json!({}));
        }
        let text = format!(
            "Who owns the regions of '{id}' is no question: it is {}",
            attempt.status().as_str()
        );
        Err(CommandError::new("not-indeterminate", text))
    }

    fn query_migrate(&self, id: Option<&Name>) -> Result<Value, CommandError> {
        match (self.sender.attempt(id), id) {
            (Some(attempt), _) => Ok(attempt.to_json()),
            (None, Some(id)) => Err(no_such(id)),
            (None, None) => Ok(json!({})),
        }
    }
}

impl Commands for SenderCommands {
    fn table(&self) -> &'static [CommandInfo] {
        TABLE
    }

    async fn execute(&self, call: Call) -> Result<Answer, CommandError> {
        let answer = match call.command.as_str() {
            "region-add" => self.region_add(&call),
            "region-del" => {
                let RegionDel { name } = call.parse()?;
                let gone = self.sender.lock().registry.remove(&name)?;
                let_go_of(gone).await;
                Ok(json!({}))
            }
            "query-regions" => {
                let Nothing {} = call.parse()?;
                Ok(self.sender.lock().registry.to_json())
            }
            "migrate" => self.migrate(call).await,
            "migrate_cancel" => self.cancel(call.parse::<OfAttempt>()?.id.as_ref()),
            "migrate-pause" => self.pause(call.parse::<OfAttempt>()?.id.as_ref()),
            "migrate-recover" => self.recover(call.parse()?),
            "migrate-continue" => self.go_on(&call),
            "migrate-resolve" => self.resolve(&call.parse()?),
            "query-migrate" => self.query_migrate(call.parse::<OfAttempt>()?.id.as_ref()),
            "query-history" => {
                let Nothing {} = call.parse()?;
                Ok(self.sender.history.latest().into())
            }
            "query-status" => {
                let Nothing {} = call.parse()?;
                Ok(json!({"status": "running", "running": true}))
            }
            "quit" => {
                let Nothing {} = call.parse()?;
                self.sender.shutdown.cancel();
                Ok(json!({}))
            }
            other => unreachable!("{other} is not in the table"),
        };
        answer.map(Answer::from)
    }
}

fn invalid(desc: impl Into<String>) -> CommandError {
    CommandError::new(code::INVALID_ARGUMENT, desc)
}

fn endpoint(uri: &str) -> Result<Endpoint, CommandError> {
    let endpoint: Endpoint = uri
        .parse()
        .map_err(|error| invalid(format!("Parameter 'uri': {error}")))?;
    if !endpoint.is_loopback() {
        tracing::warn!(%endpoint, "memory goes over this connection in the clear");
    }
    Ok(endpoint)
}

fn no_such(id: &Name) -> CommandError {
    CommandError::new(
        "no-such-transfer",
        format!("There is no transfer with id '{id}'"),
    )
}

fn generated_id() -> Result<Name, CommandError> {
    let failed = |error: &dyn std::fmt::Display| {
        CommandError::new("sender-failed", format!("cannot make an id: {error}"))
    };
    let random = Hex128::random()
        .map_err(|error| failed(&error))?
        .to_string();
    Name::new(format!("m-{}", &random[..8])).map_err(|error| failed(&error))
}
