//! Writers that stop themselves (freeze `client`), over the connections that registered their Regions.
//!
//! They are asked two things, each by the event that announces the state of the attempt:
//!
//! - `pre-switchover`: to stop. From its answer on a client writes nothing; should its connection break
//!   now, it goes on by itself, for without its second answer there is no commit.
//! - `completing`: to stay stopped until it is told otherwise, whoever dies. Only with this answer of
//!   every client is the commit recorded (rule 4).
//!
//! It goes on at `active`, `failed` or `cancelled`, and never after `completed`.

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::control::{ClientId, EventBus};
use crate::name::Name;

use super::error::TransferError;
use super::status::Status;

/// The control connection that registered a Region.
#[derive(Debug, Clone)]
pub(super) struct Registrant {
    pub(super) id: ClientId,
    /// Cancelled once it has ended.
    pub(super) gone: CancellationToken,
}

/// What a client has said, the later the more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Said {
    /// Its writer stands still.
    StandsStill,
    /// It stays so, whatever happens to us.
    HandsOver,
}

/// The clients of one attempt, each once.
#[derive(Debug, Default)]
pub(super) struct Clients(Vec<Client>);

#[derive(Debug)]
struct Client {
    registrant: Registrant,
    regions: Vec<Name>,
    said: watch::Sender<Option<Said>>,
}

impl Clients {
    /// The clients that have registered these Regions.
    pub(super) fn new(registered: impl Iterator<Item = (Registrant, Name)>) -> Self {
        let mut clients: Vec<Client> = Vec::new();
        for (registrant, region) in registered {
            let known = |client: &&mut Client| client.registrant.id == registrant.id;
            match clients.iter_mut().find(known) {
                Some(client) => client.regions.push(region),
                None => clients.push(Client {
                    registrant,
                    regions: vec![region],
                    said: watch::Sender::new(None),
                }),
            }
        }
        Self(clients)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All Regions whose writers stop themselves.
    pub(super) fn regions(&self) -> Vec<Name> {
        let regions = self.0.iter().flat_map(|client| &client.regions);
        regions.cloned().collect()
    }

    /// Tells everybody of a state; these clients may not miss it.
    pub(super) fn announce(&self, events: &EventBus, id: &Name, status: Status) {
        let data = json!({"id": id, "status": status.as_str()});
        self.tell(events, &data);
        let own: Vec<_> = self.0.iter().map(|client| client.registrant.id).collect();
        events.publish_to_others(&own, "MIGRATION", data);
    }

    /// They may go on.
    pub(super) fn release(&self, events: &EventBus, id: &Name) {
        self.tell(
            events,
            &json!({"id": id, "status": Status::Active.as_str()}),
        );
        self.forget();
    }

    fn tell(&self, events: &EventBus, data: &Value) {
        for client in &self.0 {
            let mut data = data.clone();
            data["regions"] = json!(client.regions);
            // One that is not there any more is noticed where its answer is awaited.
            let _ = events.publish_to(client.registrant.id, "MIGRATION", data);
        }
    }

    /// Nothing has been said yet.
    pub(super) fn forget(&self) {
        for client in &self.0 {
            client.said.send_replace(None);
        }
    }

    /// Takes down an answer. That of another connection is an operator's, and is given for all clients
    /// and for both questions. `false`: there is nobody who could have been asked.
    pub(super) fn answered(&self, from: ClientId, said: Said) -> bool {
        match self.0.iter().find(|client| client.registrant.id == from) {
            Some(client) => {
                client.said.send_replace(Some(said));
            }
            None => self.0.iter().for_each(|client| {
                client.said.send_replace(Some(Said::HandsOver));
            }),
        }
        !self.0.is_empty()
    }

    /// Returns once every client has said so much, or one of them has left.
    pub(super) async fn all_say(&self, wanted: Said) -> Result<(), TransferError> {
        for client in &self.0 {
            let mut said = client.said.subscribe();
            tokio::select! {
                biased;
                // `self` holds the sending end.
                _ = said.wait_for(|said| *said >= Some(wanted)) => {}
                () = client.registrant.gone.cancelled() => {
                    return Err(TransferError::ClientGone { regions: shown(&client.regions) });
                }
            }
        }
        Ok(())
    }

    /// The Regions of a client that has not said so much.
    pub(super) fn waiting_for(&self, wanted: Said) -> String {
        let mut clients = self.0.iter();
        let silent = clients.find(|client| *client.said.borrow() < Some(wanted));
        silent.map_or_else(String::new, |client| shown(&client.regions))
    }
}

fn shown(regions: &[Name]) -> String {
    let names: Vec<_> = regions.iter().map(Name::as_str).collect();
    names.join(", ")
}
