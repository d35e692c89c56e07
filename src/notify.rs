//! What systemd is told: ready, one status line, stopping. Without `NOTIFY_SOCKET` nothing is sent.
//!
//! A message that cannot be sent is forgotten: losing the service manager is no reason to lose a transfer. It is
//! logged when the service manager is lost, and when it is back.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Shortest time between two status lines: systemd writes each to its log of the unit.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Longest status line, in characters.
const STATUS_CHARS_MAX: usize = 512;

/// The service manager, as far as this daemon talks to it.
#[derive(Debug, Default)]
pub struct Notifier {
    status_sent: Option<Instant>,
    lost: bool,
}

impl Notifier {
    /// A notifier that has said nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says that the daemon serves: to be called once its sockets accept and its configuration holds.
    pub fn ready(&mut self, status: &str) {
        self.send(&[NotifyState::Status(&one_line(status)), NotifyState::Ready]);
    }

    /// Shows `status` in `systemctl status`. Says whether it was due: at most one a second is sent, so
    /// callers repeat what lasts.
    pub fn status(&mut self, now: Instant, status: &str) -> bool {
        let early = |sent: Instant| now.saturating_duration_since(sent) < STATUS_INTERVAL;
        if self.status_sent.is_some_and(early) {
            return false;
        }
        self.status_sent = Some(now);
        self.send(&[NotifyState::Status(&one_line(status))]);
        true
    }

    /// Says that the daemon is on its way out.
    pub fn stopping(&mut self, status: &str) {
        self.send(&[
            NotifyState::Status(&one_line(status)),
            NotifyState::Stopping,
        ]);
    }

    fn send(&mut self, states: &[NotifyState<'_>]) {
        let sent = sd_notify::notify(states);
        let was_lost = std::mem::replace(&mut self.lost, sent.is_err());
        match sent {
            Err(error) if !was_lost => {
                tracing::warn!(%error, "cannot reach the service manager; trying on");
            }
            Ok(()) if was_lost => tracing::info!("the service manager can be reached again"),
            _ => {}
        }
    }
}

/// A line break would begin another assignment of the protocol.
fn one_line(text: &str) -> String {
    text.chars()
        .take(STATUS_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    #[test]
    fn status_lines_are_a_second_apart() {
        let mut notifier = Notifier::new();
        let start = Instant::now();
        assert!(notifier.status(start, "a"));
        assert!(!notifier.status(start + Duration::from_millis(999), "b"));
        assert!(notifier.status(start + Duration::from_secs(1), "c"));
    }

    /// The child of the test below: it has `NOTIFY_SOCKET`, which a test must not set in its own process.
    #[test]
    fn child_that_notifies() {
        let mut notifier = Notifier::new();
        notifier.ready("serving\nREADY=0");
        notifier.status(Instant::now(), "sending vm1");
        notifier.stopping("leaving");
    }

    #[test]
    fn the_service_manager_hears_ready_status_and_stopping() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let timeout = Some(Duration::from_secs(60));
        socket.set_read_timeout(timeout).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "notify::tests::child_that_notifies"])
            .env("NOTIFY_SOCKET", &path)
            .output()
            .unwrap();
        assert!(output.status.success());
        let mut buffer = [0; 4096];
        let mut next = || {
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(next(), "STATUS=serving READY=0\nREADY=1\n");
        assert_eq!(next(), "STATUS=sending vm1\n");
        assert_eq!(next(), "STATUS=leaving\nSTOPPING=1\n");
    }
}
