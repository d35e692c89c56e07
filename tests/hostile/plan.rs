//! What is tried in one run. All of it follows from the run's seed.

use clap::ValueEnum;
use memferry::workload::Pattern;
use serde_json::{Value, json};

use crate::common::memory::{MIB, PAGE};
use crate::common::random::Random;

/// How the writer's changes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tracker {
    /// Not at all: it does not write.
    None,
    Scan,
    Pagemap,
    Bitmap,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    Nothing,
    Cancel,
    CutOne,
    CutAll,
    KillReceiver,
    KillSender,
    KillBoth,
    KillWriter,
    /// The destination has a file of that name.
    Refuse,
}

/// When it goes wrong: while a frame is on its way. If that frame does not come, then with `prepare`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// So many frames after the first one: connections are being made.
    Frames(u64),
    /// The packet with which so many hundredths of the memory have been sent.
    Sent(u64),
    /// With the first frame of an Iteration after the freeze.
    Frozen,
    /// With this message of the hand-over.
    Message(&'static str),
}

#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) pattern: Pattern,
    pub(crate) tracker: Tracker,
    pub(crate) size: u64,
    pub(crate) working_set: u64,
    /// MiB per second.
    pub(crate) rate: u64,
    /// Parameters of `migrate`.
    pub(crate) parameters: Value,
    pub(crate) fault: Fault,
    pub(crate) when: When,
    /// Which stream is cut, modulo how many there may be and one more: the conversation.
    pub(crate) victim: u64,
}

impl Plan {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let size = (8 + random.below(25)) * MIB;
        let working_set = match random.below(4) {
            0 => size,
            1 => PAGE * (1 + random.below(64)),
            _ => PAGE * (1 + random.below(size / PAGE)),
        };
        let tracker = random.one_of(&[
            Tracker::None,
            Tracker::Scan,
            Tracker::Scan,
            Tracker::Pagemap,
            Tracker::Pagemap,
            Tracker::Pagemap,
            Tracker::Bitmap,
            Tracker::Bitmap,
            Tracker::Bitmap,
        ]);
        let rate = match tracker {
            Tracker::None => 0,
            _ => 1 << random.below(10),
        };
        let fault = random.one_of(&[
            Fault::Nothing,
            Fault::Nothing,
            Fault::Nothing,
            Fault::Cancel,
            Fault::Cancel,
            Fault::CutOne,
            Fault::CutAll,
            Fault::KillReceiver,
            Fault::KillSender,
            Fault::KillBoth,
            Fault::KillWriter,
            Fault::Refuse,
        ]);
        let when = match random.below(5) {
            0 => When::Frames(random.below(12)),
            1 | 2 => When::Sent(random.below(100)),
            3 => When::Frozen,
            _ => When::Message(random.one_of(&["prepare", "prepared", "commit", "committed"])),
        };
        Self {
            seed,
            pattern: random.one_of(Pattern::value_variants()),
            tracker,
            size,
            working_set,
            rate,
            parameters: parameters(&mut random, tracker),
            fault,
            when,
            victim: random.below(64),
        }
    }
}

fn parameters(random: &mut Random, tracker: Tracker) -> Value {
    let mut parameters = json!({
        "streams": 1 + random.below(4),
        "zero-copy": random.one_of(&["auto", "off", "msg-zerocopy", "io-uring", "io-uring-fixed"]),
        "packet-size": 65536_u64 << random.below(6),
        "downtime-limit": random.one_of(&["100us", "1ms", "20ms", "300ms"]),
        "max-iterations": 1 + random.below(6),
    });
    // Without checksums only exact trackers find what was torn.
    if !matches!(tracker, Tracker::Scan) && random.one_in(4) {
        parameters["integrity"] = json!("off");
    } else if random.one_in(2) {
        parameters["skip-unchanged"] = json!(true);
    }
    if random.one_in(8) {
        parameters["max-bandwidth"] = json!("64MiB/s");
    }
    parameters
}

impl Tracker {
    /// As `memferry workload` is told; `None` if the writer does not register.
    pub(crate) fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Scan => Some("scan"),
            Self::Pagemap => Some("pagemap"),
            Self::Bitmap => Some("bitmap"),
        }
    }
}
