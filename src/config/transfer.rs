//! How a transfer is done: the `[transfer]` table, and the arguments of `migrate`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::cpus::CpuList;
use super::error::{ConfigError, Problem};
use super::keys::{Choice, Key, Refusal, read_arguments};
use super::units::{Interval, Size};
use crate::limits::{
    PACKET_BYTES_DEFAULT, PACKET_BYTES_MAX, PACKET_BYTES_MIN, STREAMS_MAX, WINDOW_BYTES_DEFAULT,
    WINDOW_BYTES_MAX,
};
use crate::wire::Algorithm;

/// How one attempt is to be done. Checked: every value is within its limits, and they fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferParameters {
    /// Streams, 1 to 256.
    pub streams: u16,
    /// Which zero-copy engine to ask for.
    pub zero_copy: ZeroCopyMode,
    /// Largest span of one packet, in bytes: a power of two from 64 KiB to 16 MiB.
    pub packet_size: u64,
    /// Bytes sent but not acknowledged as applied, per stream.
    pub window: u64,
    /// Bytes per second over all streams; 0 is no limit.
    pub max_bandwidth: u64,
    /// How long the writer may be stopped for the last Iteration.
    pub downtime_limit: Duration,
    /// Iterations before `when_not_converging` applies.
    pub max_iterations: u32,
    /// Time for the whole transfer, if it is limited.
    pub timeout: Option<Duration>,
    /// What to do when the writer is faster than the streams.
    pub when_not_converging: WhenNotConverging,
    /// Checksums over the payload.
    pub integrity: Integrity,
    /// Whether payload is compressed where that pays.
    pub compression: Compression,
    /// Whether pages that an exact tracker reports are compared with what was sent of them before.
    pub skip_unchanged: bool,
    /// How long a lost connection may take to come back.
    pub recover_timeout: Duration,
    /// Longest time without any progress.
    pub stall_timeout: Duration,
    /// How long stopping the writer may take, and how long it may then wait for a lost connection.
    pub freeze_timeout: Duration,
    /// On which CPUs the streams' threads run.
    pub cpus: CpuList,
}

/// Which zero-copy engine to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroCopyMode {
    /// The best one that works here, or plain sends where the kernel copies anyway.
    Auto,
    /// `MSG_ZEROCOPY` and the socket's error queue.
    MsgZerocopy,
    /// io_uring `SEND_ZC`.
    IoUring,
    /// io_uring with registered buffers.
    IoUringFixed,
    /// Plain sends.
    Off,
}

/// What to do when `max_iterations` have passed and too much is still dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenNotConverging {
    /// Stop the writer anyway, for longer than `downtime_limit`.
    Freeze,
    /// Give up; the source runs on.
    Fail,
    /// Slow the writer down step by step.
    Throttle,
}

/// Checksums over the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Integrity {
    /// CRC-32C per 64 KiB.
    Crc32c,
    /// None: damage on the way, and pages torn by the writer, are not noticed.
    Off,
}

/// Whether payload is compressed where that pays, and with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Off,
    /// LZ4, which takes little time.
    Lz4,
    /// Zstandard at its fastest level, which saves more.
    Zstd,
    /// Whichever of them moves more.
    Auto,
}

impl Choice for ZeroCopyMode {
    const ALL: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("msg-zerocopy", Self::MsgZerocopy),
        ("io-uring", Self::IoUring),
        ("io-uring-fixed", Self::IoUringFixed),
        ("off", Self::Off),
    ];
}

impl Choice for WhenNotConverging {
    const ALL: &'static [(&'static str, Self)] = &[
        ("freeze", Self::Freeze),
        ("fail", Self::Fail),
        ("throttle", Self::Throttle),
    ];
}

impl Choice for Integrity {
    const ALL: &'static [(&'static str, Self)] = &[("crc32c", Self::Crc32c), ("off", Self::Off)];
}

impl Choice for Compression {
    const ALL: &'static [(&'static str, Self)] = &[
        ("off", Self::Off),
        ("lz4", Self::Lz4),
        ("zstd", Self::Zstd),
        ("auto", Self::Auto),
    ];
}

impl Compression {
    /// The word for it in TOML and QMP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }

    /// What a stream may choose from, beside plain payload.
    #[must_use]
    pub fn algorithms(self) -> &'static [Algorithm] {
        match self {
            Self::Off => &[],
            Self::Lz4 => &[Algorithm::Lz4],
            Self::Zstd => &[Algorithm::Zstd],
            Self::Auto => Algorithm::ALL,
        }
    }
}

impl ZeroCopyMode {
    /// The word for it in TOML and QMP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }
}

impl WhenNotConverging {
    /// The word for it in TOML and QMP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }
}

impl Integrity {
    /// The word for it in TOML and QMP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }
}

impl Default for TransferParameters {
    fn default() -> Self {
        Self {
            streams: 4,
            zero_copy: ZeroCopyMode::Auto,
            packet_size: PACKET_BYTES_DEFAULT,
            window: WINDOW_BYTES_DEFAULT,
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            max_iterations: 30,
            timeout: None,
            when_not_converging: WhenNotConverging::Freeze,
            integrity: Integrity::Crc32c,
            compression: Compression::Off,
            skip_unchanged: false,
            recover_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(10),
            freeze_timeout: Duration::from_secs(5),
            cpus: CpuList::default(),
        }
    }
}

/// Longest of the waits: a day. More is a slip of the unit.
const WAIT_MAX: Interval = Interval(Duration::from_secs(24 * 60 * 60));
/// Shortest of the waits: below it a busy host alone looks like a dead peer.
const WAIT_MIN: Interval = Interval(Duration::from_millis(100));
/// Shortest whole-transfer limit.
const TIMEOUT_MIN: Interval = Interval(Duration::from_millis(1));
/// Longest whole-transfer limit: 30 days.
const TIMEOUT_MAX: Interval = Interval(Duration::from_secs(30 * 24 * 60 * 60));
const DOWNTIME_MIN: Interval = Interval(Duration::from_micros(1));
/// QEMU's own bound, 2000 s.
const DOWNTIME_MAX: Interval = Interval(Duration::from_secs(2000));

/// Every key of `[transfer]`, which is also every parameter of `migrate`.
pub(super) const KEYS: &[Key<TransferParameters>] = &[
    Key {
        name: "streams",
        set: |to, given| {
            let streams = given.count(1..=u64::from(STREAMS_MAX))?;
            to.streams = u16::try_from(streams).map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "zero-copy",
        set: |to, given| given.choice().map(|mode| to.zero_copy = mode),
    },
    Key {
        name: "packet-size",
        set: |to, given| {
            let bytes = given.size(PACKET_BYTES_MIN..=PACKET_BYTES_MAX)?;
            if !bytes.is_power_of_two() {
                // A power of two in these limits is also a multiple of the checksum block.
                return Err(Refusal::new(format_args!(
                    "{} is not a power of two, such as \"1MiB\"",
                    Size(bytes)
                )));
            }
            to.packet_size = bytes;
            Ok(())
        },
    },
    Key {
        name: "window",
        set: |to, given| {
            let range = PACKET_BYTES_MIN..=WINDOW_BYTES_MAX;
            given.size(range).map(|bytes| to.window = bytes)
        },
    },
    Key {
        name: "max-bandwidth",
        set: |to, given| given.rate().map(|rate| to.max_bandwidth = rate),
    },
    Key {
        name: "downtime-limit",
        set: |to, given| {
            let range = DOWNTIME_MIN..=DOWNTIME_MAX;
            given.interval(range).map(|time| to.downtime_limit = time)
        },
    },
    Key {
        name: "max-iterations",
        set: |to, given| {
            let iterations = given.count(1..=100_000)?;
            to.max_iterations = u32::try_from(iterations).map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "timeout",
        set: |to, given| {
            let range = TIMEOUT_MIN..=TIMEOUT_MAX;
            given.optional_interval(range).map(|time| to.timeout = time)
        },
    },
    Key {
        name: "when-not-converging",
        set: |to, given| given.choice().map(|what| to.when_not_converging = what),
    },
    Key {
        name: "integrity",
        set: |to, given| given.choice().map(|what| to.integrity = what),
    },
    Key {
        name: "recover-timeout",
        set: |to, given| {
            let range = Interval(Duration::ZERO)..=WAIT_MAX;
            given.interval(range).map(|time| to.recover_timeout = time)
        },
    },
    Key {
        name: "stall-timeout",
        set: |to, given| {
            let range = WAIT_MIN..=WAIT_MAX;
            given.interval(range).map(|time| to.stall_timeout = time)
        },
    },
    Key {
        name: "freeze-timeout",
        set: |to, given| {
            let range = WAIT_MIN..=WAIT_MAX;
            given.interval(range).map(|time| to.freeze_timeout = time)
        },
    },
    Key {
        name: "compression",
        set: |to, given| given.choice().map(|what| to.compression = what),
    },
    Key {
        name: "skip-unchanged",
        set: |to, given| given.flag().map(|flag| to.skip_unchanged = flag),
    },
    Key {
        name: "cpus",
        set: |to, given| {
            to.cpus = given.text()?.parse().map_err(Refusal::new)?;
            Ok(())
        },
    },
];

impl TransferParameters {
    /// Names of all parameters, as TOML and QMP write them.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KEYS.iter().map(|key| key.name)
    }

    /// These parameters, with those in `arguments` replaced.
    ///
    /// Keys are those of `[transfer]`. Values are texts as in TOML (`"64MiB"`, `"300ms"`, `"none"`), or
    /// numbers in QEMU's units: bytes, bytes per second, milliseconds for every time. Everything else
    /// is refused, so a caller takes out the arguments that are not parameters (`uri`, `id`, `regions`).
    pub fn with_overrides(&self, arguments: &Map<String, Value>) -> Result<Self, ConfigError> {
        let mut parameters = self.clone();
        read_arguments(KEYS, arguments, &mut parameters)?;
        match parameters.disagreement() {
            Some((key, reason)) => Err(ConfigError::new(Problem::Value(reason)).about(key)),
            None => Ok(parameters),
        }
    }

    /// The parameters as `query-migrate-parameters` shows them, and as `with_overrides` reads them.
    ///
    /// Bytes, bytes per second and whole milliseconds are numbers; a time that is no whole number of
    /// milliseconds is a text such as `"500us"`, since rounding it would not read back the same.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        let time = |time: Duration| match u64::try_from(time.as_millis()) {
            Ok(ms) if Duration::from_millis(ms) == time => Value::from(ms),
            _ => Value::from(Interval(time).to_string()),
        };
        let members = [
            ("streams", json!(self.streams)),
            ("zero-copy", json!(self.zero_copy.as_str())),
            ("packet-size", json!(self.packet_size)),
            ("window", json!(self.window)),
            ("max-bandwidth", json!(self.max_bandwidth)),
            ("downtime-limit", time(self.downtime_limit)),
            ("max-iterations", json!(self.max_iterations)),
            ("timeout", self.timeout.map_or_else(|| json!("none"), time)),
            (
                "when-not-converging",
                json!(self.when_not_converging.as_str()),
            ),
            ("integrity", json!(self.integrity.as_str())),
            ("recover-timeout", time(self.recover_timeout)),
            ("stall-timeout", time(self.stall_timeout)),
            ("freeze-timeout", time(self.freeze_timeout)),
            ("compression", json!(self.compression.as_str())),
            ("skip-unchanged", json!(self.skip_unchanged)),
            ("cpus", json!(self.cpus.to_string())),
        ];
        let owned = members.map(|(key, value)| (key.to_owned(), value));
        owned.into_iter().collect()
    }

    /// Two values that do not fit together: the key to look at, and why.
    pub(super) fn disagreement(&self) -> Option<(&'static str, String)> {
        if self.window < self.packet_size {
            let reason = format!(
                "{} is less than packet-size ({}): not one packet could be sent",
                Size(self.window),
                Size(self.packet_size)
            );
            return Some(("window", reason));
        }
        if self.skip_unchanged && self.integrity == Integrity::Off {
            let reason = "needs integrity = \"crc32c\": without checksums it is not known what the receiver has of a page that was written while it was sent";
            return Some(("skip-unchanged", reason.to_owned()));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overridden(arguments: Value) -> Result<TransferParameters, ConfigError> {
        let Value::Object(arguments) = arguments else {
            panic!("not an object")
        };
        TransferParameters::default().with_overrides(&arguments)
    }

    fn refusal(arguments: Value) -> String {
        overridden(arguments).unwrap_err().to_string()
    }

    #[test]
    fn every_parameter_reads_back_what_it_shows() {
        let mut parameters = TransferParameters {
            downtime_limit: Duration::from_micros(500),
            timeout: Some(Duration::from_secs(90)),
            zero_copy: ZeroCopyMode::IoUringFixed,
            window: 123_456_789,
            compression: Compression::Zstd,
            skip_unchanged: true,
            cpus: "!0-1".parse().unwrap(),
            ..TransferParameters::default()
        };
        for _ in 0..2 {
            let shown = parameters.to_json();
            assert!(TransferParameters::names().all(|name| shown.contains_key(name)));
            assert_eq!(shown.len(), KEYS.len());
            let read = TransferParameters::default().with_overrides(&shown);
            assert_eq!(read.unwrap(), parameters);
            parameters = TransferParameters::default();
        }
    }

    #[test]
    fn numbers_are_in_qemu_units_and_texts_carry_their_own() {
        let numbers = overridden(json!({
            "downtime-limit": 250, "max-bandwidth": 1_000_000, "window": 33_554_432, "timeout": 60_000,
        }));
        let texts = overridden(json!({
            "downtime-limit": "250ms", "max-bandwidth": "8Mbit/s", "window": "32MiB", "timeout": "1m",
        }));
        let numbers = numbers.unwrap();
        assert_eq!(numbers, texts.unwrap());
        assert_eq!(numbers.downtime_limit, Duration::from_millis(250));
        assert_eq!(numbers.max_bandwidth, 1_000_000);
    }

    #[test]
    fn counts_are_also_read_from_texts_as_the_command_line_sends_them() {
        assert_eq!(overridden(json!({"streams": "8"})).unwrap().streams, 8);
    }

    #[test]
    fn what_is_out_of_range_is_refused_with_its_key() {
        for (arguments, key) in [
            (json!({"streams": 0}), "streams"),
            (json!({"streams": 257}), "streams"),
            (json!({"streams": -1}), "streams"),
            (json!({"streams": 1.5}), "streams"),
            (json!({"packet-size": "96KiB"}), "packet-size"),
            (json!({"packet-size": "32KiB"}), "packet-size"),
            (json!({"packet-size": "32MiB"}), "packet-size"),
            (json!({"window": "2GiB"}), "window"),
            (json!({"window": "64KiB"}), "window"),
            (json!({"max-iterations": 0}), "max-iterations"),
            (json!({"downtime-limit": 0}), "downtime-limit"),
            (json!({"downtime-limit": null}), "downtime-limit"),
            (json!({"timeout": true}), "timeout"),
            (json!({"stall-timeout": "1ms"}), "stall-timeout"),
            (json!({"zero-copy": "on"}), "zero-copy"),
            (json!({"compression": "gzip"}), "compression"),
            (json!({"cpus": "3-0"}), "cpus"),
        ] {
            let error = overridden(arguments.clone()).unwrap_err();
            assert_eq!(error.key(), Some(key), "{arguments}: {error}");
        }
    }

    #[test]
    fn refusals_say_what_would_be_right() {
        assert!(refusal(json!({"zero-copy": "on"})).contains("\"io-uring-fixed\""));
        assert!(refusal(json!({"streams": 300})).contains("1 to 256"));
        assert!(refusal(json!({"window": "64KiB"})).contains("packet-size (1MiB)"));
        assert!(refusal(json!({"compression": "gzip"})).contains("\"zstd\""));
        assert!(refusal(json!({"steams": 3})).contains("did you mean \"streams\"?"));
    }
}
