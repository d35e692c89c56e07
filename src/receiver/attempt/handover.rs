//! From *prepare* to the commit record: everything is there and intact, and then it is ours.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;
use tokio::time::timeout;

use crate::journal::Decision;
use crate::wire::{BlobAccount, FromReceiver, FromSender, StreamTotals};

use super::super::admission::Refusal;
use super::super::blob::KeptBlob;
use super::super::destination::{self, Hidden};
use super::super::error::AttemptError;
use super::super::memory;
use super::super::prepared::Place;
use super::{Attempt, REASON_WAIT, accepted, hear, unexpected};

/// What a commit would take over.
pub(super) struct Ready {
    /// Each file, and the final name it gets.
    moves: Vec<(PathBuf, PathBuf)>,
    blob: Option<KeptBlob>,
}

impl Attempt {
    /// Everything is there and intact, and every file has a name to be renamed from. The streams end
    /// first: what is not in place now never will be.
    pub(super) async fn prepare(
        &mut self,
        totals: &[StreamTotals],
        blob: Option<BlobAccount>,
    ) -> Result<Ready, AttemptError> {
        let nonce = self.nonce;
        let accepted = accepted(&mut self.accepted);
        accepted.end_epoch().await;
        let setup = Arc::clone(&accepted.setup);
        setup.assembly.verdict(totals)?;
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
        let named = accepted.hidden.is_some();
        let hide = move || {
            let files = setup.destinations.iter().enumerate();
            let files = files.filter_map(|(index, place)| Some((index, place.file()?)));
            let mut hidden = Vec::new();
            for (index, file) in files {
                file.sync()?;
                // An unnamed file can be given a name only once.
                if !named {
                    hidden.push(file.hide(nonce, index)?);
                }
            }
            Ok::<_, io::Error>(hidden)
        };
        // On a disk this writes the Regions out, so it is not for the control plane's thread.
        let hidden = tokio::task::spawn_blocking(hide)
            .await
            .map_err(io::Error::from);
        let hidden = hidden
            .and_then(|hidden| hidden)
            .map_err(AttemptError::local(
                "link the regions into receive.directory",
            ))?;
        let hidden = accepted.hidden.get_or_insert(hidden);
        let moves = hidden.iter().map(Hidden::its_move).collect();
        self.confirm().await?;
        Ok(Ready { moves, blob })
    }

    /// Clients that prepared memory and want to be asked say yes, or the attempt is over.
    async fn confirm(&mut self) -> Result<(), AttemptError> {
        let asked = self.receiver.lock().holdings.to_confirm(&self.id);
        let accepted = accepted(&mut self.accepted);
        for (client, regions) in asked {
            let answer = self.receiver.lock().questions.ask(&self.id, client.id);
            let event = json!({"id": self.id, "status": "pre-switchover", "regions": regions});
            // A client that has gone cannot be told; the wait finds that out.
            let _ = self
                .receiver
                .events
                .publish_to(client.id, "MIGRATION", event);
            let refused = |why: &str| {
                let name = &regions[0];
                Err(Refusal::new(
                    "refused",
                    format!("the client that prepared region {name} {why}"),
                )
                .into())
            };
            tokio::select! {
                biased;
                Ok(()) = answer => {}
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

    /// The one step after which the Regions are ours. There is no way back behind the record.
    pub(super) async fn commit(&mut self, ready: Ready) -> Result<(), AttemptError> {
        let accepted = accepted(&mut self.accepted);
        match hear(&mut self.talk, &mut accepted.back, &accepted.entry).await? {
            FromSender::Commit { nonce } if nonce == self.nonce => {}
            other => return Err(unexpected(Ok(other))),
        }
        let record = Decision::Committed {
            boot_id: self.receiver.boot_id.clone(),
            id: self.id.clone(),
            moves: ready.moves.clone(),
            blob: ready.blob.as_ref().map(KeptBlob::its_record),
        };
        let decided = self.receiver.journal.decide(self.nonce, record.clone());
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
        tracing::info!(id = %self.id, told = told.is_ok(), "committed: the regions are owned here now");
        self.report("completed", None);
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
