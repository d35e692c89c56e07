//! Whether to lend or to copy. Pure: the time is an argument.
//!
//! Where the kernel copies what was lent, a plain send is cheaper. So a window of sends is watched, and if
//! every one in it was copied the stream copies for a while; then it lends a window's worth to see whether
//! that has changed, later and later if it has not. A kernel's flag covers ranges of sends and is raised
//! for single packets, so less than a whole window decides nothing. The first window is that of all streams
//! together, which take the same way: each for itself, many streams would do little else.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::channel::Flush;

/// Sends that decide. On a copying path they cost about half of their time more; eight packets of 1 MiB
/// are 8 MiB.
const WINDOW_SENDS: u64 = 8;

/// How long a stream copies before it tries again, at first and at most.
const PAUSE_MIN: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(320);

/// What the streams of an epoch have had back of their first window: how many sends, and in the upper half how
/// many of them were not copied. One word, so that no reader sees the one without the other.
#[derive(Debug, Default)]
pub struct FirstSends(AtomicU64);

impl FirstSends {
    /// Adds what one stream had back, and gives what all had.
    fn add(&self, more: Flush) -> Flush {
        let more = more.sends | (more.sends - more.copied) << 32;
        let all = self.0.fetch_add(more, Ordering::Relaxed) + more;
        let (sends, saved) = (all & u64::from(u32::MAX), all >> 32);
        Flush {
            sends,
            copied: sends - saved,
        }
    }
}

/// A stream went from one way of sending to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// The stream.
    pub stream: u16,
    /// The engine it used.
    pub from: &'static str,
    /// What it uses now.
    pub to: &'static str,
    /// Why, in words for an operator.
    pub reason: String,
}

/// Who is told of a [`Fallback`], at once and on the stream's thread.
pub struct Tell(pub Box<dyn Fn(&Fallback) + Send>);

impl fmt::Debug for Tell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tell")
    }
}

/// What a step changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// From lending to plain sends: the whole window was copied.
    FellBack,
    /// From plain sends to lending: not all of the window was copied.
    Recovered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The channel cannot lend, or is not to.
    Never,
    /// The first window; `seen` is what this stream has added to it.
    Begins { seen: Flush },
    /// `start` is what had been released when the window began; `proven`: a window before was not all
    /// copied.
    Lends { start: Flush, proven: bool },
    /// Until then.
    Copies { until: Instant },
}

#[derive(Debug)]
pub(super) struct Lending {
    state: State,
    first: Arc<FirstSends>,
    /// The last window was not all copied.
    works: bool,
    pause: Duration,
}

impl Lending {
    /// For a stream whose channel can lend, or cannot; `first` is that of all streams that take its way.
    pub(super) fn new(capable: bool, first: Arc<FirstSends>) -> Self {
        let seen = Flush::NOTHING_OWED;
        Self {
            state: match capable {
                true => State::Begins { seen },
                false => State::Never,
            },
            first,
            works: false,
            pause: PAUSE_MIN,
        }
    }

    /// Whether the next packet is to be lent.
    pub(super) fn lends(&self) -> bool {
        matches!(self.state, State::Begins { .. } | State::Lends { .. })
    }

    /// Whether the next packet is lent only to see whether that saves the copy.
    pub(super) fn tries(&self) -> bool {
        self.lends() && !self.works
    }

    /// Whether lending is known to save the copy, so that preparing more for it pays.
    pub(super) fn works(&self) -> bool {
        self.works
    }

    /// Looks at what the channel has released since it was made.
    pub(super) fn step(&mut self, released: Flush, now: Instant) -> Option<Change> {
        match self.state {
            State::Never => None,
            State::Copies { until } => {
                if now >= until {
                    self.state = State::Lends {
                        start: released,
                        proven: false,
                    };
                }
                None
            }
            State::Begins { seen } => {
                self.state = State::Begins { seen: released };
                let window = self.first.add(since(seen, released));
                self.decide(window, released, true, now)
            }
            State::Lends { start, proven } => {
                self.decide(since(start, released), released, proven, now)
            }
        }
    }

    /// Looks at a window. `lent`: the stream is known to lend, so that this is no news.
    fn decide(
        &mut self,
        window: Flush,
        released: Flush,
        lent: bool,
        now: Instant,
    ) -> Option<Change> {
        if window.sends < WINDOW_SENDS {
            return None;
        }
        self.works = !window.all_copied();
        if window.all_copied() {
            let until = now + self.pause;
            self.state = State::Copies { until };
            self.pause = (self.pause * 2).min(PAUSE_MAX);
            return lent.then_some(Change::FellBack);
        }
        self.state = State::Lends {
            start: released,
            proven: true,
        };
        self.pause = PAUSE_MIN;
        (!lent).then_some(Change::Recovered)
    }
}

/// What was released between the two.
fn since(start: Flush, released: Flush) -> Flush {
    Flush {
        sends: released.sends - start.sends,
        copied: released.copied - start.copied,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(capable: bool) -> Lending {
        Lending::new(capable, Arc::default())
    }

    #[test]
    fn streams_look_at_their_first_window_together_and_each_says_so() {
        let (now, first) = (Instant::now(), Arc::<FirstSends>::default());
        let mut streams = [(); 3].map(|()| Lending::new(true, Arc::clone(&first)));
        assert_eq!(streams[0].step(flush(4, 4), now), None);
        assert_eq!(streams[1].step(flush(3, 3), now), None);
        assert_eq!(streams[0].step(flush(5, 5), now), Some(Change::FellBack));
        // What this one has had back is one of the eight, and the third has had nothing back.
        assert_eq!(streams[1].step(flush(3, 3), now), Some(Change::FellBack));
        assert_eq!(streams[2].step(flush(0, 0), now), Some(Change::FellBack));
        assert!(streams.iter().all(|stream| !stream.lends()));

        let first = Arc::<FirstSends>::default();
        let mut streams = [(); 2].map(|()| Lending::new(true, Arc::clone(&first)));
        assert_eq!(streams[0].step(flush(4, 4), now), None);
        assert_eq!(streams[1].step(flush(4, 3), now), None);
        assert_eq!(streams[0].step(flush(9, 9), now), None);
        assert!(streams.iter().all(Lending::works), "one was not copied");
    }

    fn flush(sends: u64, copied: u64) -> Flush {
        Flush { sends, copied }
    }

    #[test]
    fn a_window_that_was_copied_ends_lending_and_one_that_was_not_does_not() {
        let now = Instant::now();
        let mut lending = alone(true);
        assert_eq!(lending.step(flush(7, 7), now), None);
        assert!(!lending.works() && lending.tries());
        assert_eq!(lending.step(flush(8, 7), now), None);
        assert!(lending.works() && !lending.tries());
        assert_eq!(lending.step(flush(15, 14), now), None);
        assert!(lending.lends());
        assert_eq!(lending.step(flush(16, 15), now), Some(Change::FellBack));
        assert!(!lending.lends() && !lending.works() && !lending.tries());
        assert_eq!(lending.step(flush(16, 15), now), None);
        let mut never = alone(false);
        assert_eq!(never.step(flush(0, 0), now + PAUSE_MAX), None);
        assert!(!never.lends());
    }

    #[test]
    fn it_tries_again_later_and_later_and_comes_back_when_that_works() {
        let mut now = Instant::now();
        let mut lending = alone(true);
        let mut sends = WINDOW_SENDS;
        assert_eq!(
            lending.step(flush(sends, sends), now),
            Some(Change::FellBack)
        );
        let mut pause = PAUSE_MIN;
        for _ in 0..8 {
            lending.step(flush(sends, sends), now + pause - Duration::from_millis(1));
            assert!(!lending.lends());
            now += pause;
            assert_eq!(lending.step(flush(sends, sends), now), None);
            assert!(lending.lends());
            sends += WINDOW_SENDS;
            // A try that fails is no news.
            assert_eq!(lending.step(flush(sends, sends), now), None);
            assert!(!lending.lends());
            pause = (pause * 2).min(PAUSE_MAX);
        }
        now += pause;
        lending.step(flush(sends, sends), now);
        let better = flush(sends + WINDOW_SENDS, sends);
        assert_eq!(lending.step(better, now), Some(Change::Recovered));
        assert!(lending.lends());
        let worse = flush(better.sends + WINDOW_SENDS, better.copied + WINDOW_SENDS);
        assert_eq!(lending.step(worse, now), Some(Change::FellBack));
        lending.step(worse, now + PAUSE_MIN);
        assert!(lending.lends());
    }
}
