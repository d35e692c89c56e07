//! Sizes, rates and times as people write them: `64MiB`, `10Gbit/s`, `1m 30s`.
//!
//! Decimal and binary are told apart by their letters (`10GB` is 10^10 bytes, `10GiB` is 10 × 2^30),
//! bits and bytes by theirs (`10Gbit/s`, `1GB/s`). Arithmetic is exact: a fraction that is not a
//! whole number of bytes is refused rather than rounded, except in rates, which are targets anyway.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes: `4096`, `64MiB`, `10GB`, `1.5GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A number of bytes per second: `300MiB/s`, `10Gbit/s`, `0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

/// A length of time: `300ms`, `30s`, `1m 30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval(pub Duration);

/// Why a text is not a size, a rate or a time. The message quotes what was read and shows a right one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number where one is needed.
    #[error("{read:?} is not {what}: write {example}")]
    NotANumber {
        /// What was read.
        read: String,
        /// What was expected: "a size", "a rate", "a time".
        what: &'static str,
        /// A right one.
        example: &'static str,
    },
    /// The letters after the number are no unit.
    #[error("{read:?} has the unit {unit:?}, which is not one {what} can have: write {example}")]
    UnknownUnit {
        /// What was read.
        read: String,
        /// The unit in it.
        unit: String,
        /// What was expected.
        what: &'static str,
        /// A right one.
        example: &'static str,
    },
    /// A number that needs a unit has none.
    #[error("{read:?} has no unit: write {example}")]
    NoUnit {
        /// What was read.
        read: String,
        /// A right one.
        example: &'static str,
    },
    /// More than 64 bits can hold.
    #[error("{read:?} is too large for {what}")]
    TooLarge {
        /// What was read.
        read: String,
        /// What was expected.
        what: &'static str,
    },
    /// Finer than the smallest unit.
    #[error("{read:?} is not a whole number of {unit}")]
    NotWhole {
        /// What was read.
        read: String,
        /// "bytes" or "nanoseconds".
        unit: &'static str,
    },
}

/// What a unit stands for, as `numerator / denominator` of the base unit. Units of one table are
/// spelled in one way each: `mb` or `Mb` would leave bits or bytes to a guess.
type Unit = (&'static str, u128, u128);

const SIZE_UNITS: &[Unit] = &[
    ("B", 1, 1),
    ("kB", 1000, 1),
    ("KB", 1000, 1),
    ("MB", 1_000_000, 1),
    ("GB", 1_000_000_000, 1),
    ("TB", 1_000_000_000_000, 1),
    ("KiB", 1 << 10, 1),
    ("MiB", 1 << 20, 1),
    ("GiB", 1 << 30, 1),
    ("TiB", 1 << 40, 1),
];

const BIT_UNITS: &[Unit] = &[
    ("bit", 1, 8),
    ("kbit", 1000, 8),
    ("Mbit", 1_000_000, 8),
    ("Gbit", 1_000_000_000, 8),
    ("Tbit", 1_000_000_000_000, 8),
    ("Kibit", 1 << 10, 8),
    ("Mibit", 1 << 20, 8),
    ("Gibit", 1 << 30, 8),
];

const TIME_UNITS: &[Unit] = &[
    ("ns", 1, 1),
    ("us", 1000, 1),
    ("µs", 1000, 1),
    ("ms", 1_000_000, 1),
    ("s", 1_000_000_000, 1),
    ("m", 60_000_000_000, 1),
    ("min", 60_000_000_000, 1),
    ("h", 3_600_000_000_000, 1),
];

/// What is being read, for the error texts.
#[derive(Clone, Copy)]
struct Kind {
    what: &'static str,
    example: &'static str,
}

const SIZE: Kind = Kind {
    what: "a size",
    example: "\"64MiB\" (binary), \"64MB\" (decimal) or 4096 (bytes)",
};
const RATE: Kind = Kind {
    what: "a rate",
    example: "\"300MiB/s\", \"10Gbit/s\", or 0 for none",
};
const TIME: Kind = Kind {
    what: "a time",
    example: "\"300ms\", \"30s\" or \"1m 30s\"",
};

impl Kind {
    fn not_a_number(self, read: &str) -> UnitError {
        UnitError::NotANumber {
            read: quoted(read),
            what: self.what,
            example: self.example,
        }
    }

    fn unknown_unit(self, read: &str, unit: &str) -> UnitError {
        UnitError::UnknownUnit {
            read: quoted(read),
            unit: quoted(unit),
            what: self.what,
            example: self.example,
        }
    }

    fn too_large(self, read: &str) -> UnitError {
        UnitError::TooLarge {
            read: quoted(read),
            what: self.what,
        }
    }
}

/// An error text must not carry a megabyte of somebody's input.
fn quoted(text: &str) -> String {
    text.chars().take(64).collect()
}

/// A decimal number as `digits / 10^places`.
#[derive(Clone, Copy)]
struct Decimal {
    digits: u128,
    places: u32,
}

/// Splits a number off the front of `text`; the rest starts at the first byte that is not part of it.
fn number<'a>(kind: Kind, read: &str, text: &'a str) -> Result<(Decimal, &'a str), UnitError> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(kind.not_a_number(read));
    }
    // 20 digits hold every u64, 9 decimal places every nanosecond; the product below then fits 128 bits.
    if whole.len() > 20 {
        return Err(kind.too_large(read));
    }
    if fraction.len() > 9 {
        return Err(kind.not_a_number(read));
    }
    let digits = format!("{whole}{fraction}").parse();
    let digits = digits.map_err(|_| kind.not_a_number(read))?;
    let places = u32::try_from(fraction.len()).map_err(|_| kind.not_a_number(read))?;
    Ok((Decimal { digits, places }, rest))
}

impl Decimal {
    /// The number times the unit, and whether nothing was cut off. `None` if it does not fit 64 bits.
    fn times(self, (_, numerator, denominator): Unit) -> Option<(u64, bool)> {
        let product = self.digits.checked_mul(numerator)?;
        let divisor = 10u128.pow(self.places) * denominator;
        let value = u64::try_from(product / divisor).ok()?;
        Some((value, product.is_multiple_of(divisor)))
    }
}

fn find(units: &[Unit], name: &str) -> Option<Unit> {
    units.iter().copied().find(|unit| unit.0 == name)
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(read: &str) -> Result<Self, UnitError> {
        let (number, rest) = number(SIZE, read, read.trim())?;
        let name = match rest.trim() {
            "" => "B",
            name => name,
        };
        let unit = find(SIZE_UNITS, name).ok_or_else(|| SIZE.unknown_unit(read, name))?;
        match number.times(unit) {
            Some((bytes, true)) => Ok(Self(bytes)),
            Some((_, false)) => Err(UnitError::NotWhole {
                read: quoted(read),
                unit: "bytes",
            }),
            None => Err(SIZE.too_large(read)),
        }
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(read: &str) -> Result<Self, UnitError> {
        let (number, rest) = number(RATE, read, read.trim())?;
        let rest = rest.trim();
        if rest.is_empty() && number.digits == 0 {
            return Ok(Self(0));
        }
        if rest.is_empty() {
            return Err(UnitError::NoUnit {
                read: quoted(read),
                example: RATE.example,
            });
        }
        let unit = rest
            .strip_suffix("/s")
            .and_then(|name| find(SIZE_UNITS, name).or_else(|| find(BIT_UNITS, name)))
            .ok_or_else(|| RATE.unknown_unit(read, rest))?;
        let (bytes, exact) = number.times(unit).ok_or_else(|| RATE.too_large(read))?;
        if bytes == 0 && !exact {
            // Rounding down to 0 would turn a very low limit into no limit.
            return Err(UnitError::NotWhole {
                read: quoted(read),
                unit: "bytes per second",
            });
        }
        Ok(Self(bytes))
    }
}

impl FromStr for Interval {
    type Err = UnitError;

    fn from_str(read: &str) -> Result<Self, UnitError> {
        let mut rest = read.trim();
        if rest.is_empty() {
            return Err(TIME.not_a_number(read));
        }
        let mut total: u64 = 0;
        let mut parts = 0;
        while !rest.is_empty() {
            let (number, after) = number(TIME, read, rest)?;
            let after = after.trim_start();
            let end = after
                .find(|c: char| !c.is_alphabetic())
                .unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            rest = after.trim_start();
            parts += 1;
            if name.is_empty() {
                if number.digits == 0 && parts == 1 && rest.is_empty() {
                    return Ok(Self(Duration::ZERO));
                }
                return Err(if rest.is_empty() {
                    UnitError::NoUnit {
                        read: quoted(read),
                        example: TIME.example,
                    }
                } else {
                    TIME.not_a_number(read)
                });
            }
            let unit = find(TIME_UNITS, name).ok_or_else(|| TIME.unknown_unit(read, name))?;
            let (ns, exact) = number.times(unit).ok_or_else(|| TIME.too_large(read))?;
            if !exact {
                return Err(UnitError::NotWhole {
                    read: quoted(read),
                    unit: "nanoseconds",
                });
            }
            total = total.checked_add(ns).ok_or_else(|| TIME.too_large(read))?;
        }
        Ok(Self(Duration::from_nanos(total)))
    }
}

impl fmt::Display for Size {
    /// The largest binary unit that shows it exactly, so that what is printed can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (name, shift) in units {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{name}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            bytes if bytes < 1024 || !bytes.is_multiple_of(1024) => write!(f, "{bytes}B/s"),
            bytes => write!(f, "{}/s", Size(bytes)),
        }
    }
}

impl fmt::Display for Interval {
    /// One unit, the largest that shows it exactly.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos();
        let units = [("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000)];
        for (name, unit) in units {
            if ns.is_multiple_of(unit) {
                return write!(f, "{}{name}", ns / unit);
            }
        }
        write!(f, "{ns}ns")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Result<u64, UnitError> {
        text.parse::<Size>().map(|size| size.0)
    }

    fn rate(text: &str) -> Result<u64, UnitError> {
        text.parse::<Rate>().map(|rate| rate.0)
    }

    fn time(text: &str) -> Result<Duration, UnitError> {
        text.parse::<Interval>().map(|time| time.0)
    }

    #[test]
    fn sizes_tell_binary_from_decimal() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size(" 1 GiB "), Ok(1 << 30));
        assert_eq!(size("10GB"), Ok(10_000_000_000));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn sizes_never_overflow() {
        for text in [
            "18446744073709551616",
            "16777216TiB",
            "99999999999999999999TB",
            "100000000000000000000000000000000000000000B",
        ] {
            assert!(
                matches!(size(text), Err(UnitError::TooLarge { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn sizes_refuse_what_could_be_read_in_two_ways() {
        for text in [
            "", "MiB", "-1", "1e9", "1..2", "1.", ".5GiB", "64mb", "64M", "64 Mb", "1MiB/s", "0.1B",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_quotes_what_was_read_and_shows_a_right_one() {
        let text = size("64mb").unwrap_err().to_string();
        assert!(
            text.contains("\"64mb\"") && text.contains("\"64MiB\""),
            "{text}"
        );
        let text = rate("300").unwrap_err().to_string();
        assert!(text.contains("\"300\"") && text.contains("MiB/s"), "{text}");
        let text = time("30").unwrap_err().to_string();
        assert!(
            text.contains("no unit") && text.contains("\"30s\""),
            "{text}"
        );
    }

    #[test]
    fn rates_tell_bits_from_bytes() {
        assert_eq!(rate("0"), Ok(0));
        assert_eq!(rate("300MiB/s"), Ok(300 << 20));
        assert_eq!(rate("10Gbit/s"), Ok(1_250_000_000));
        assert_eq!(rate("1GB/s"), Ok(1_000_000_000));
        assert_eq!(rate("2.5Gbit/s"), Ok(312_500_000));
        for text in ["300MiB", "10Gb/s", "10Gbps", "1bit/s", "fast", "300"] {
            assert!(rate(text).is_err(), "{text}");
        }
        assert!(matches!(
            rate("99999999999Tbit/s"),
            Err(UnitError::TooLarge { .. })
        ));
    }

    #[test]
    fn times_add_up_their_parts() {
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(time("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(time("0.5s"), Ok(Duration::from_millis(500)));
        assert_eq!(time("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(time("0"), Ok(Duration::ZERO));
        for text in ["", "30", "s", "1 2s", "3 weeks", "-1s", "0.1ns", "1s 2"] {
            assert!(time(text).is_err(), "{text}");
        }
        assert!(matches!(
            time("999999999h"),
            Err(UnitError::TooLarge { .. })
        ));
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        for bytes in [0, 1, 1023, 1024, 4097, 64 << 20, 1 << 40, u64::MAX] {
            assert_eq!(size(&Size(bytes).to_string()), Ok(bytes));
            assert_eq!(rate(&Rate(bytes).to_string()), Ok(bytes));
            let duration = Duration::from_nanos(bytes);
            assert_eq!(time(&Interval(duration).to_string()), Ok(duration));
        }
    }
}
