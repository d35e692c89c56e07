//! The log: to standard error, which systemd hands to the journal.

use std::io::{self, IsTerminal};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::{ConfigError, LogConfig, LogFormat, Problem};

/// Changes what is logged while the daemon runs.
#[derive(Debug, Clone)]
pub struct LogHandle(reload::Handle<EnvFilter, Registry>);

/// Starts logging as `config` says. A second call in one process fails, as does a filter that is none.
pub fn init(config: &LogConfig) -> Result<LogHandle, ConfigError> {
    let (filter, handle) = reload::Layer::new(filter(&config.filter)?);
    let lines = match config.format {
        LogFormat::Json => fmt::layer().json().with_writer(io::stderr).boxed(),
        LogFormat::Text => {
            let lines = fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal());
            // The journal stamps each line itself.
            if std::env::var_os("JOURNAL_STREAM").is_some() {
                lines.without_time().boxed()
            } else {
                lines.boxed()
            }
        }
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| {
            ConfigError::new(Problem::Value(format!("cannot start the log: {error}")))
        })?;
    Ok(LogHandle(handle))
}

impl LogHandle {
    /// Replaces the filter; a text that is none leaves the old one in place.
    pub fn set_filter(&self, text: &str) -> Result<(), ConfigError> {
        let filter = filter(text)?;
        self.0
            .reload(filter)
            .map_err(|error| ConfigError::new(Problem::Value(error.to_string())))
    }
}

fn filter(text: &str) -> Result<EnvFilter, ConfigError> {
    parse_filter(text)
        .map_err(|reason| ConfigError::new(Problem::Value(reason)).about("log.filter"))
}

/// Reads a filter, such as `info` or `warn,memferry::control=debug`.
pub(crate) fn parse_filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder().parse(text).map_err(|error| {
        format!(
            "{text:?} is no filter ({error}): write \"info\" or \"warn,memferry::control=debug\""
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_a_configuration_error() {
        let config = LogConfig {
            filter: "memferry=loud".to_owned(),
            format: LogFormat::Text,
        };
        let error = init(&config).unwrap_err();
        assert_eq!(error.key(), Some("log.filter"));
        assert!(error.to_string().contains("\"memferry=loud\""), "{error}");
    }
}
