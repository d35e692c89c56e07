//! Whether payload is compressed, and with what. Pure: the time is an argument.
//!
//! What pays depends on the link, on the processor and on the content, and none of them is known. So it is
//! tried: every way carries the same amount in turn, and the one by which most payload arrived per second is
//! used until the next trial, which comes later and later. Where a stream never
//! waits for its link, that is the plain way. What cannot be compressed ends its trial after a packet or two.

use std::time::{Duration, Instant};

use crate::wire::Algorithm;

/// Payload that each way carries in a trial: four packets of the default size. Many more and a short
/// transfer would be all trial.
const TRIAL_BYTES: u64 = 4 * 1024 * 1024;

/// How long a way is used before the next trial, at first and at most. A trial of three ways at 30 MB/s
/// takes 0.4 s.
const PAUSE_MIN: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(64);

/// Packets not worth their compression that end a way's trial, and, one after the other, its use.
const POOR_IN_TRIAL: u32 = 2;
const POOR_IN_USE: u32 = 8;

/// What a rate counts in percent if the way is in use, so that two that are alike do not take turns; and
/// if it is the plain one, which leaves the processors to others.
const WEIGHT: u128 = 100;
const WEIGHT_IN_USE: u128 = 110;
const WEIGHT_PLAIN: u128 = 110;

/// How a packet leaves: compressed with this, or plain.
pub(super) type Way = Option<Algorithm>;

/// A packet under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carried {
    way: Way,
    payload: u64,
    began: Instant,
    made: Instant,
    round: u64,
}

/// What a way has done in a trial.
#[derive(Debug)]
struct Trial {
    way: Way,
    sent: u64,
    arrived: u64,
    /// From one arrival to the next, without the time in which nothing was there to be sent.
    time: Duration,
    /// For reading and compressing. While older packets are under way this does not show in the arrivals.
    making: Duration,
    poor: u32,
}

impl Trial {
    fn new(way: Way) -> Self {
        Self {
            way,
            sent: 0,
            arrived: 0,
            time: Duration::ZERO,
            making: Duration::ZERO,
            poor: 0,
        }
    }

    fn is_out(&self) -> bool {
        self.poor >= POOR_IN_TRIAL
    }

    fn is_sent(&self) -> bool {
        self.is_out() || self.sent >= TRIAL_BYTES
    }

    fn is_over(&self) -> bool {
        self.is_out() || self.arrived >= TRIAL_BYTES
    }

    /// Weighted bytes per second; 0 if it is out.
    fn score(&self, used: Way) -> u128 {
        let in_use = if self.way == used {
            WEIGHT_IN_USE
        } else {
            WEIGHT
        };
        let plain = if self.way.is_none() {
            WEIGHT_PLAIN
        } else {
            WEIGHT
        };
        let time = self.time.max(self.making).as_micros().max(1);
        let rate = u128::from(self.arrived) * 1_000_000 / time;
        u128::from(!self.is_out()) * rate * in_use * plain
    }
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Each way in turn; then, until all of it has arrived, the one that is in use.
    Tries,
    /// Until then; `poor` packets were not worth it, one after the other.
    Uses { until: Instant, poor: u32 },
}

/// What one stream knows of its ways.
#[derive(Debug)]
pub(super) struct Compression {
    /// In the order in which they are tried: plain is the last, so that little content is compressed too.
    trials: Vec<Trial>,
    state: State,
    used: Way,
    /// Counts trials, so that what was sent before one does not count in it.
    round: u64,
    pause: Duration,
    last_arrival: Option<Instant>,
}

impl Compression {
    /// For a stream that may use these; none: everything goes plain.
    pub(super) fn new(algorithms: &[Algorithm]) -> Self {
        let packed = algorithms.iter().map(|algorithm| Some(*algorithm));
        Self {
            trials: packed.chain([None]).map(Trial::new).collect(),
            state: State::Tries,
            used: None,
            round: 1,
            pause: PAUSE_MIN,
            last_arrival: None,
        }
    }

    /// How the next packet is to leave.
    pub(super) fn way(&mut self, now: Instant) -> Way {
        if self.trials.len() == 1 {
            return None;
        }
        if let State::Uses { until, .. } = self.state {
            if now < until {
                return self.used;
            }
            self.state = State::Tries;
            self.round += 1;
            for trial in &mut self.trials {
                *trial = Trial::new(trial.way);
            }
        }
        if let Some(trial) = self.trials.iter().find(|trial| !trial.is_sent()) {
            return trial.way;
        }
        if self.round > 1 {
            return self.used;
        }
        // Nothing is known before the first trial is over, and compression was asked for.
        let first = self.trials.iter().find(|trial| !trial.is_out());
        first.and_then(|trial| trial.way)
    }

    /// A packet leaves, which the stream began to read at `began` and had compressed at `made`. `is_poor`: it
    /// was to be compressed, and that was not worth it.
    pub(super) fn sent(
        &mut self,
        way: Way,
        payload: u64,
        is_poor: bool,
        (began, made): (Instant, Instant),
    ) -> Carried {
        match &mut self.state {
            State::Tries => {
                if let Some(trial) = self.trials.iter_mut().find(|trial| trial.way == way) {
                    trial.sent += payload;
                    trial.poor += u32::from(is_poor);
                }
            }
            State::Uses { poor, .. } => *poor = if is_poor { *poor + 1 } else { 0 },
        }
        Carried {
            way,
            payload,
            began,
            made,
            round: self.round,
        }
    }

    /// A packet has arrived. Gives the way in use if that has changed.
    pub(super) fn arrived(&mut self, packet: Carried, now: Instant) -> Option<Way> {
        let free = self.last_arrival.replace(now);
        let from = free.map_or(packet.began, |free| free.max(packet.began));
        let before = self.used;
        match self.state {
            State::Tries if packet.round == self.round && packet.payload > 0 => {
                if let Some(trial) = self.trials.iter_mut().find(|t| t.way == packet.way) {
                    trial.arrived += packet.payload;
                    trial.time += now.saturating_duration_since(from);
                    trial.making += packet.made.saturating_duration_since(packet.began);
                }
                if self.trials.iter().all(Trial::is_over) {
                    let used = self.used;
                    let best = self.trials.iter().max_by_key(|trial| trial.score(used));
                    self.use_until_next_trial(best.and_then(|trial| trial.way), now);
                }
            }
            State::Uses { poor, .. } if poor >= POOR_IN_USE => self.use_until_next_trial(None, now),
            _ => {}
        }
        (self.used != before).then_some(self.used)
    }

    fn use_until_next_trial(&mut self, way: Way, now: Instant) {
        self.used = way;
        let until = now + self.pause;
        // Also if the way has changed: two that are alike would take turns for ever.
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.state = State::Uses { until, poor: 0 };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const PACKET: u64 = 1024 * 1024;
    const WINDOW: f64 = 16.0 * 1024.0 * 1024.0;
    /// Seconds to read a packet.
    const READ: f64 = 0.000_2;

    /// Bytes per second that go in, and the share of them that comes out.
    #[derive(Debug, Clone, Copy)]
    struct Codec {
        speed: f64,
        ratio: f64,
    }

    impl Codec {
        fn is_poor(self) -> bool {
            self.ratio > 0.875
        }
    }

    /// A stream over a link of so many bytes per second.
    #[derive(Debug)]
    struct Line {
        link: f64,
        lz4: Codec,
        zstd: Codec,
    }

    impl Line {
        fn codec(&self, way: Way) -> Option<Codec> {
            way.map(|algorithm| match algorithm {
                Algorithm::Lz4 => self.lz4,
                Algorithm::Zstd => self.zstd,
            })
        }

        /// Seconds of the processor, and bytes for the link, of one packet.
        fn cost(&self, way: Way) -> (f64, f64) {
            let bytes = PACKET as f64;
            match self.codec(way) {
                None => (READ, bytes),
                Some(codec) if codec.is_poor() => (READ + bytes / codec.speed, bytes),
                Some(codec) => (READ + bytes / codec.speed, bytes * codec.ratio),
            }
        }

        /// Payload per second if all of it went this way.
        fn rate(&self, way: Way) -> f64 {
            let (cpu, wire) = self.cost(way);
            PACKET as f64 / cpu.max(wire / self.link)
        }
    }

    /// What a run of some seconds was like.
    #[derive(Debug, Default)]
    struct Seen {
        payload: f64,
        packets: u64,
        tried: u64,
        changes: u32,
    }

    fn run(compression: &mut Compression, line: &Line, seconds: (f64, f64)) -> Seen {
        let zero = Instant::now();
        let at = |time: f64| zero + Duration::from_secs_f64(time);
        let (mut now, mut link_free, mut under_way) = (seconds.0, 0.0_f64, 0.0);
        let mut packets: VecDeque<(Carried, f64, f64)> = VecDeque::new();
        let mut seen = Seen::default();
        while now < seconds.1 {
            let (began, way) = (now, compression.way(at(now)));
            let (cpu, wire) = line.cost(way);
            now += cpu;
            let made = now;
            while let Some((carried, bytes, arrival)) = packets.front().copied()
                && (arrival <= now || under_way + wire > WINDOW)
            {
                now = now.max(arrival);
                seen.changes += u32::from(compression.arrived(carried, at(now)).is_some());
                under_way -= bytes;
                packets.pop_front();
            }
            link_free = link_free.max(now) + wire / line.link;
            under_way += wire;
            let poor = line.codec(way).is_some_and(Codec::is_poor);
            let carried = compression.sent(way, PACKET, poor, (at(began), at(made)));
            packets.push_back((carried, wire, link_free + 0.000_1));
            seen.payload += PACKET as f64;
            seen.packets += 1;
            seen.tried += u64::from(way.is_some());
        }
        seen
    }

    fn gigabit(share: f64) -> Line {
        Line {
            link: 125e6 * share,
            lz4: Codec {
                speed: 600e6,
                ratio: 0.5,
            },
            zstd: Codec {
                speed: 350e6,
                ratio: 0.35,
            },
        }
    }

    #[test]
    fn on_a_slow_link_the_tightest_wins_and_on_a_fast_one_nothing_is_compressed() {
        let mut compression = Compression::new(Algorithm::ALL);
        run(&mut compression, &gigabit(0.25), (0.0, 30.0));
        assert_eq!(compression.used, Some(Algorithm::Zstd));
        let mut compression = Compression::new(Algorithm::ALL);
        let seen = run(&mut compression, &gigabit(24.0), (0.0, 30.0));
        assert_eq!((compression.used, seen.changes), (None, 0));
        // Two trials' worth before the first second is over, and one each time the pause has doubled.
        assert!(seen.tried * 100 < seen.packets, "{seen:?}");
    }

    #[test]
    fn what_cannot_be_compressed_costs_a_packet_or_two_now_and_then() {
        let mut line = gigabit(0.25);
        (line.lz4.ratio, line.zstd.ratio) = (1.0, 1.0);
        let mut compression = Compression::new(Algorithm::ALL);
        let seen = run(&mut compression, &line, (0.0, 120.0));
        assert_eq!((compression.used, seen.changes), (None, 0));
        let most = 7 * 2 * u64::from(POOR_IN_TRIAL);
        assert!((4..=most).contains(&seen.tried), "{seen:?}");
    }

    #[test]
    fn content_that_turns_bad_ends_its_use_at_once_and_a_better_link_does_at_the_next_trial() {
        let mut compression = Compression::new(&[Algorithm::Zstd]);
        run(&mut compression, &gigabit(0.25), (0.0, 10.0));
        assert_eq!(compression.used, Some(Algorithm::Zstd));
        let mut bad = gigabit(0.25);
        bad.zstd.ratio = 0.99;
        let seen = run(&mut compression, &bad, (10.0, 12.0));
        assert_eq!((compression.used, seen.changes), (None, 1), "{seen:?}");
        assert!(seen.tried <= 40, "{seen:?}");
        run(&mut compression, &gigabit(0.25), (12.0, 30.0));
        assert_eq!(compression.used, Some(Algorithm::Zstd));
        run(&mut compression, &gigabit(24.0), (30.0, 200.0));
        assert_eq!(compression.used, None);
    }

    #[test]
    fn without_an_algorithm_nothing_is_tried() {
        let mut compression = Compression::new(&[]);
        let seen = run(&mut compression, &gigabit(0.25), (0.0, 10.0));
        assert_eq!((seen.tried, seen.changes), (0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_the_line_is_little_is_lost_to_trials_and_it_settles(
            link in 10e6..4e9,
            lz4 in (400e6..2e9, 0.2..1.0),
            zstd in (200e6..1e9, 0.2..1.0),
        ) {
            let line = Line {
                link,
                lz4: Codec { speed: lz4.0, ratio: lz4.1 },
                zstd: Codec { speed: zstd.0, ratio: zstd.1 },
            };
            let mut compression = Compression::new(Algorithm::ALL);
            let seen = run(&mut compression, &line, (0.0, 120.0));
            let ways = [None, Some(Algorithm::Lz4), Some(Algorithm::Zstd)];
            let best = ways.into_iter().map(|way| line.rate(way)).fold(0.0, f64::max);
            prop_assert!(seen.payload / 120.0 > line.rate(None) * 0.7, "{seen:?}");
            if link < 60e6 {
                // The weights may keep one that is a fifth worse, and an arrival is noticed a packet late.
                prop_assert!(line.rate(compression.used) > best / 1.4, "{:?}", compression.used);
            }
            prop_assert!(seen.changes <= 7, "{seen:?}");
        }
    }
}
