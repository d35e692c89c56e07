//! Who is to blame when nothing moves: the network, the peer's process, or what it does with the data.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::sys::errqueue::unacknowledged;
use crate::sys::tcp::since_last_answer;

/// Why a connection makes no progress, as far as its socket shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspect {
    /// It does not show.
    Unknown,
    /// Nothing comes back, not even from the peer's kernel: its host is down, or the network is cut.
    Network,
    /// The peer's kernel answers and takes no more: nobody reads there.
    Peer,
    /// The peer's kernel has all that was sent: the peer does not get on with it.
    Destination,
}

impl Suspect {
    /// Judges a socket on which nothing has moved for `quiet`.
    pub fn of(socket: BorrowedFd<'_>, quiet: Duration) -> Self {
        let Ok(queued) = unacknowledged(socket) else {
            return Self::Unknown;
        };
        judge(queued, since_last_answer(socket).ok(), quiet)
    }

    /// In words.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "the socket does not show why",
            Self::Network => {
                "nothing comes back from its host: that is down, or the network is cut"
            }
            Self::Peer => "its kernel answers, but nobody reads there: it hangs",
            Self::Destination => {
                "its kernel has all that was sent: it hangs, or writes to slow memory or storage"
            }
        }
    }
}

/// A peer that reads nothing is asked by its sender's kernel at intervals that double, so at any moment
/// the last answer is younger than half of the wait; one that is not there has not answered at all.
fn judge(queued: u64, answered: Option<Duration>, quiet: Duration) -> Suspect {
    match answered {
        _ if queued == 0 => Suspect::Destination,
        Some(ago) if ago >= quiet * 3 / 4 => Suspect::Network,
        // Other kinds of sockets lead nowhere but to a process on this host.
        Some(_) | None => Suspect::Peer,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn each_has_its_signs() {
        let quiet = Duration::from_secs(10);
        let ago = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(judge(0, ago(10), quiet), Suspect::Destination);
        assert_eq!(judge(1, ago(10), quiet), Suspect::Network);
        assert_eq!(judge(1, ago(4), quiet), Suspect::Peer);
        assert_eq!(judge(1, None, quiet), Suspect::Peer);
    }

    #[test]
    fn a_peer_that_does_not_read_shows() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_called, _) = listener.accept().unwrap();
        caller.write_all(&[1]).unwrap();
        while unacknowledged(caller.as_fd()).unwrap() > 0 {
            std::thread::yield_now();
        }
        let quiet = Duration::from_secs(60);
        assert_eq!(Suspect::of(caller.as_fd(), quiet), Suspect::Destination);
        caller.set_nonblocking(true).unwrap();
        while caller.write(&[1; 65536]).is_ok() {}
        assert_eq!(Suspect::of(caller.as_fd(), quiet), Suspect::Peer);
    }
}
