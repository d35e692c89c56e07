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

/// When it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// So many bytes have passed since the transfer began.
    Bytes(u64),
    /// So many bytes have passed since it was in this state. It may never be.
    Since(&'static str, u64),
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
    /// Which connection is cut, modulo how many there are.
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
        let tracker = pick(
            &mut random,
            &[
                Tracker::None,
                Tracker::Scan,
                Tracker::Scan,
                Tracker::Pagemap,
                Tracker::Pagemap,
                Tracker::Pagemap,
                Tracker::Bitmap,
                Tracker::Bitmap,
                Tracker::Bitmap,
            ],
        );
        let rate = match tracker {
            Tracker::None => 0,
            _ => 1 << random.below(10),
        };
        let fault = pick(
            &mut random,
            &[
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
            ],
        );
        let when = match random.below(5) {
            0 => When::Bytes(random.below(4096)),
            1 => When::Bytes(random.below(size + size / 4)),
            // A last pass of any length, or of nothing; then the commit, a few hundred bytes.
            2 => {
                let most = 1 << random.below(20);
                When::Since("device", random.below(most))
            }
            3 => When::Since("pre-switchover", random.below(200)),
            _ => When::Since("completing", random.below(700)),
        };
        Self {
            seed,
            pattern: pick(&mut random, Pattern::value_variants()),
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
        "zero-copy": pick(random, &["auto", "off", "msg-zerocopy", "io-uring", "io-uring-fixed"]),
        "packet-size": 65536_u64 << random.below(6),
        "downtime-limit": pick(random, &["100us", "1ms", "20ms", "300ms"]),
        "max-iterations": 1 + random.below(6),
    });
    // Without checksums only exact trackers find what was torn.
    if !matches!(tracker, Tracker::Scan) && random.one_in(4) {
        parameters["integrity"] = json!("off");
    }
    if random.one_in(8) {
        parameters["max-bandwidth"] = json!("64MiB/s");
    }
    parameters
}

fn pick<T: Copy>(random: &mut Random, from: &[T]) -> T {
    let index = random.below(from.len() as u64);
    from[usize::try_from(index).unwrap()]
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
