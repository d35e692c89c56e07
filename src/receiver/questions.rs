//! Clients that are asked whether an attempt may go on, and have not answered.

use tokio::sync::oneshot;

use crate::control::ClientId;
use crate::name::Name;

/// Open questions: about which attempt, to whom, and where the answer is waited for.
#[derive(Debug, Default)]
pub(super) struct Questions(Vec<(Name, ClientId, oneshot::Sender<()>)>);

impl Questions {
    /// Opens a question.
    pub(super) fn ask(&mut self, attempt: &Name, client: ClientId) -> oneshot::Receiver<()> {
        // Whoever waited for the answer to an earlier one may be gone.
        self.0.retain(|(_, _, answer)| !answer.is_closed());
        let (answer, waiting) = oneshot::channel();
        self.0.push((attempt.clone(), client, answer));
        waiting
    }

    /// The client says yes; `false` if it was not asked.
    pub(super) fn answer(&mut self, attempt: &Name, client: ClientId) -> bool {
        let asked = |(id, to, _): &(Name, ClientId, _)| id == attempt && *to == client;
        let Some(index) = self.0.iter().position(asked) else {
            return false;
        };
        self.0.swap_remove(index).2.send(()).is_ok()
    }
}
