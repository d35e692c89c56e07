//! *Prepare* and the commit record: everything is there and intact, and then it is ours.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;
use tokio::time::timeout;

use crate::journal::{Decision, Proposal};
use crate::wire::{BlobAccount, FromReceiver, Hex128, StreamTotals};

use super::super::admission::Refusal;
use super::super::blob::KeptBlob;
use super::super::destination::{self, Hidden};
use super::super::error::AttemptError;
use super::super::memory;
use super::super::prepared::Place;
use super::heard::{hear, unexpected};
use super::{Attempt, REASON_WAIT, accepted};

/// What a commit would take over.
pub(super) struct Ready {
    /// What each stream carried: a commit is honoured if nothing has come since.
    pub(super) totals: Vec<StreamTotals>,
    /// Each file, and the final name it gets.
    moves: Vec<(PathBuf, PathBuf)>,
    blob: Option<KeptBlob>,
    /// The record that a commit makes valid: a writer may stand still when it comes.
    proposal: Proposal<Decision>,
}

impl Attempt {
    /// Everything is there and intact, and every file has a name to be renamed from. The streams go on: the
    /// sender may find that there is more, and ask again.
    pub(super) async fn prepare(
        &mut self,
        totals: Vec<StreamTotals>,
        blob: Option<BlobAccount>,
    ) -> Result<Ready, AttemptError> {
        let nonce = self.nonce;
        let accepted = accepted(&mut self.accepted);
        let setup = Arc::clone(&accepted.setup);
        setup.assembly.check(&totals)?;
        let blob = match (self.blob.take(), blob) {
            (None, None) => None,
            (Some(arrived), Some(account)) if arrived.account() == account => {
                let kept = arrived.keep(&self.receiver.journal, nonce);
                Some(kept.map_err(AttemptError::local("keep the final blob"))?)
            }
            (arrived, account) => {
                let arrived = arrived.map(|blob| blob.account());
                return Err(AttemptError::Blob { arrived, account });
            }
        };
        // An unnamed file can be given a name only once.
        let named = accepted.hidden.is_some();
        let quick = is_quick(&setup.destinations);
        let hide = move || hide(&setup.destinations, named, nonce);
        let hidden = match quick {
            true => hide(),
            false => match tokio::task::spawn_blocking(hide).await {
                Ok(hidden) => hidden,
                Err(panicked) => Err(panicked.into()),
            },
        };
        let hidden = hidden.map_err(AttemptError::local(
            "link the regions into receive.directory",
        ))?;
        let hidden = accepted.hidden.get_or_insert(hidden);
        let moves: Vec<_> = hidden.iter().map(Hidden::its_move).collect();
        let record = Decision::Committed {
            boot_id: self.receiver.boot_id.clone(),
            id: self.id.clone(),
            moves: moves.clone(),
            blob: blob.as_ref().map(KeptBlob::its_record),
        };
        let proposal = self.receiver.journal.propose(record);
        let proposal = proposal.map_err(AttemptError::local("draft the commit record"))?;
        self.confirm().await?;
        Ok(Ready {
            totals,
            moves,
            blob,
            proposal,
        })
    }

    /// Clients that prepared memory and want to be asked say yes, and are still there, or the attempt is over.
    /// Each is asked once.
    async fn confirm(&mut self) -> Result<(), AttemptError> {
        let asked = self.receiver.lock().holdings.to_confirm(&self.id);
        let accepted = accepted(&mut self.accepted);
        for (client, regions) in asked {
            let refused = |why: &str| {
                let name = &regions[0];
                Err(Refusal::new(
                    "refused",
                    format!("the client that prepared region {name} {why}"),
                )
                .into())
            };
            if accepted.confirmed.contains(&client.id) {
                if client.gone.is_cancelled() {
                    return refused("and has confirmed the transfer is gone");
                }
                continue;
            }
            let answer = self.receiver.lock().questions.ask(&self.id, client.id);
            let event = json!({"id": self.id, "status": "pre-switchover", "regions": regions});
            // A client that has gone cannot be told; the wait finds that out.
            let _ = self
                .receiver
                .events
                .publish_to(client.id, "MIGRATION", event);
            tokio::select! {
                biased;
                Ok(()) = answer => accepted.confirmed.push(client.id),
                () = client.gone.cancelled() => return refused("and wants to confirm the transfer is gone"),
                message = hear(&mut self.talk, &mut accepted.back, &accepted.entry) => {
                    return Err(message.map_or_else(|error| error, |message| unexpected(Ok(message))));
                }
                () = tokio::time::sleep(self.patience) => {
                    let seconds = self.patience.as_secs_f32();
                    return refused(&format!("did not confirm the transfer within {seconds} s (stall-timeout)"));
                }
            }
        }
        Ok(())
    }

    /// The one step after which the Regions are ours. There is no way back behind the record. Streams' threads
    /// are not ended for it: a writer stands still, and on a busy machine each of them would have to wait for
    /// a CPU to end.
    pub(super) async fn commit(&mut self, ready: Ready) -> Result<(), AttemptError> {
        let accepted = accepted(&mut self.accepted);
        accepted.setup.assembly.close(&ready.totals)?;
        let record = ready.proposal.record().clone();
        let decided = ready.proposal.decide(&self.receiver.journal, self.nonce);
        if decided.map_err(AttemptError::local("write the commit record"))? != record {
            let desc = "this attempt was decided before, and not in favour of this receiver";
            return Err(Refusal::new("refused", desc).into());
        }
        let places = Arc::clone(&accepted.setup.destinations);
        let hidden = accepted.hidden.take();
        hidden.into_iter().flatten().for_each(Hidden::keep);
        destination::roll_forward(&ready.moves);
        self.take_over(ready.blob);
        // If this is lost the sender asks again, and the record answers.
        let told = self.talk.say(&FromReceiver::Committed {}).await;
        self.report("completed", None);
        tracing::info!(id = %self.id, told = told.is_ok(), "committed: the regions are owned here now");
        // The sender hangs up when it has heard. Unmapping the memory here takes milliseconds per GiB,
        // and on few cores they would be part of its downtime.
        let _ = timeout(REASON_WAIT, self.talk.hear()).await;
        // The last moment at which it is mapped here.
        let observed = memory::of_places(places).await;
        self.receiver.remember(&self.id, observed);
        Ok(())
    }

    /// What was committed can be asked for from now on.
    fn take_over(&mut self, blob: Option<KeptBlob>) {
        use crate::stream::Destination;
        let setup = Arc::clone(&accepted(&mut self.accepted).setup);
        let mut state = self.receiver.lock();
        state.holdings.ended(&self.id, true);
        for place in setup.destinations.iter() {
            if let Place::New(file) = place {
                let region = place.region();
                let path = file.final_path().to_owned();
                let holdings = &mut state.holdings;
                holdings.committed_file(region.name().clone(), path, region.bytes());
            }
        }
        if let Some(blob) = blob {
            self.blob_bytes = Some(blob.account().bytes);
            state.blobs.add(self.id.clone(), blob);
        }
    }
}

/// Most files that are named on the control plane's own thread: one takes some 30 us.
const QUICK_FILES: usize = 16;

/// Whether naming them takes so little time that handing it to another thread, and waiting for that one
/// to wake up, would take longer. On a disk the Regions are written out first.
fn is_quick(places: &[Place]) -> bool {
    let on_disk = |place: &Place| place.file().is_some_and(|file| file.is_on_disk());
    places.len() <= QUICK_FILES && !places.iter().any(on_disk)
}

/// Gives every file a hidden name, unless they are `named` already. Blocks, for long on a disk.
fn hide(places: &[Place], named: bool, nonce: Hex128) -> io::Result<Vec<Hidden>> {
    let files = places.iter().enumerate();
    let files = files.filter_map(|(index, place)| Some((index, place.file()?)));
    let mut hidden = Vec::new();
    for (index, file) in files {
        file.sync()?;
        if !named {
            hidden.push(file.hide(nonce, index)?);
        }
    }
    Ok(hidden)
}
