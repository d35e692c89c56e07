//! Lists of CPUs as the kernel writes them: `0-3,8`; and `!0-3` for all but those.

use std::fmt;
use std::str::FromStr;

use crate::limits::CPUS_MAX;

/// On which CPUs the threads of an attempt may run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuList {
    /// As it was written, to be shown.
    text: String,
    ranges: Vec<(usize, usize)>,
    /// All but these.
    except: bool,
}

/// Why a text is no list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no list of CPUs: write \"0-3,8\", or \"!0-3\" for all but those")]
pub struct CpuListError(String);

impl CpuList {
    /// Whether nothing was asked for: every CPU is as good.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Those of `usable` that are meant, in their order.
    #[must_use]
    pub fn choose(&self, usable: &[usize]) -> Vec<usize> {
        let named = |cpu: usize| self.ranges.iter().any(|&(a, b)| (a..=b).contains(&cpu));
        let meant = |cpu: &usize| self.is_any() || named(*cpu) != self.except;
        usable.iter().copied().filter(meant).collect()
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let wrong = || CpuListError(text.to_owned());
        let number = |text: &str| match text.parse() {
            // `parse` takes a sign.
            Ok(cpu) if cpu < CPUS_MAX && !text.starts_with('+') => Ok(cpu),
            _ => Err(wrong()),
        };
        let (except, list) = match text.strip_prefix('!') {
            Some(list) => (true, list),
            None => (false, text),
        };
        let ranges = list.split(',').map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = (number(first)?, number(last)?);
            if range.0 > range.1 {
                return Err(wrong());
            }
            Ok(range)
        });
        Ok(Self {
            ranges: ranges.collect::<Result<_, _>>()?,
            text: text.to_owned(),
            except,
        })
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(text: &str) -> Vec<usize> {
        let list: CpuList = text.parse().unwrap();
        assert_eq!(list.to_string(), text);
        list.choose(&[0, 1, 2, 5, 8])
    }

    #[test]
    fn a_list_chooses_among_the_usable() {
        assert_eq!(chosen(""), [0, 1, 2, 5, 8]);
        assert_eq!(chosen("1-5,8"), [1, 2, 5, 8]);
        assert_eq!(chosen("!1-5"), [0, 8]);
        assert_eq!(chosen("3"), [0_usize; 0]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for bad in [
            "a", "1-", "-1", "3-1", "1,,2", "!", "0x1", "+1", " 1", "8192",
        ] {
            assert!(bad.parse::<CpuList>().is_err(), "{bad}");
        }
    }
}
