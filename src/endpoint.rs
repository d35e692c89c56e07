//! Where a receiver listens and a sender connects: `tcp:host:port`, `unix:path`. Pure text.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Port of `tcp:host` without one.
pub const PORT_DEFAULT: u16 = 4440;

/// Longest path of a unix socket, in bytes: the kernel's `sun_path` less its closing zero.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// Longest host name, in bytes (RFC 1035).
const HOST_BYTES_MAX: usize = 253;

/// Schemes that are defined but not served by this version.
const SCHEMES_LATER: [&str; 6] = ["tls", "vsock", "ws", "wss", "exec", "file"];

/// An address of the peer protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// Plain TCP. Port 0 lets the kernel choose one, when listening.
    Tcp {
        /// A name, or an address; IPv6 without its brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// A scheme that exists, but not in this version.
    #[error("{scheme}: is not served by this version, which serves tcp:host:port and unix:/path")]
    NotServed {
        /// The scheme.
        scheme: String,
    },
    /// No scheme, or one that does not exist.
    #[error("{read:?} is no endpoint: write tcp:host:port, tcp:[::1]:port or unix:/path")]
    NoScheme {
        /// What was read.
        read: String,
    },
    /// A host that is neither a name nor an address.
    #[error(
        "{read:?}: {host:?} is no host: write a name, an address, or an IPv6 address in brackets as in tcp:[::1]:4440"
    )]
    Host {
        /// What was read.
        read: String,
        /// The part of it.
        host: String,
    },
    /// A port that is no number up to 65535.
    #[error("{read:?}: {port:?} is no port: write a number from 0 to 65535")]
    Port {
        /// What was read.
        read: String,
        /// The part of it.
        port: String,
    },
    /// A path that no unix socket can have.
    #[error(
        "{read:?}: the path of a unix socket has 1 to {UNIX_PATH_BYTES_MAX} bytes and no zero byte"
    )]
    Path {
        /// What was read.
        read: String,
    },
}

impl Endpoint {
    /// Whether only this host can reach it: a unix socket, a loopback address, or `localhost`. Any
    /// other name counts as not loopback, since what it resolves to may change.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(address) => address.to_canonical().is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(read: &str) -> Result<Self, EndpointError> {
        let quoted = || read.chars().take(HOST_BYTES_MAX).collect::<String>();
        match read.split_once(':') {
            Some(("tcp", rest)) => tcp(read, rest),
            Some(("unix", path)) => {
                let ok = (1..=UNIX_PATH_BYTES_MAX).contains(&path.len()) && !path.contains('\0');
                if ok {
                    Ok(Self::Unix(path.into()))
                } else {
                    Err(EndpointError::Path { read: quoted() })
                }
            }
            Some((scheme, _)) if SCHEMES_LATER.contains(&scheme) => Err(EndpointError::NotServed {
                scheme: scheme.to_owned(),
            }),
            _ => Err(EndpointError::NoScheme { read: quoted() }),
        }
    }
}

/// Reads `host`, `host:port`, `[v6]` or `[v6]:port`.
fn tcp(read: &str, rest: &str) -> Result<Endpoint, EndpointError> {
    let quoted = |text: &str| text.chars().take(HOST_BYTES_MAX).collect::<String>();
    let host_error = |host: &str| EndpointError::Host {
        read: quoted(read),
        host: quoted(host),
    };
    let (host, port) = if let Some(inner) = rest.strip_prefix('[') {
        let (host, after) = inner.split_once(']').ok_or_else(|| host_error(rest))?;
        // A zone (`fe80::1%eth0`) is resolved together with the address.
        let address = host.split_once('%').map_or(host, |(address, _)| address);
        if address.parse::<Ipv6Addr>().is_err() || host.ends_with('%') {
            return Err(host_error(host));
        }
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':').ok_or_else(|| host_error(rest))?),
        };
        (host, port)
    } else {
        let (host, port) = match rest.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        };
        let name = host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        if host.is_empty() || host.len() > HOST_BYTES_MAX || !name {
            return Err(host_error(host));
        }
        if port.is_some_and(|port| port.contains(':')) {
            return Err(host_error(rest));
        }
        (host, port)
    };
    let port = match port {
        None => PORT_DEFAULT,
        Some(port) if !port.bytes().all(|b| b.is_ascii_digit()) => {
            return Err(EndpointError::Port {
                read: quoted(read),
                port: quoted(port),
            });
        }
        Some(port) => port.parse().map_err(|_| EndpointError::Port {
            read: quoted(read),
            port: quoted(port),
        })?,
    };
    Ok(Endpoint::Tcp {
        host: host.to_owned(),
        port,
    })
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;
    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Endpoint {
        Endpoint::Tcp {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn reads_hosts_ports_and_paths() {
        for (text, endpoint) in [
            ("tcp:127.0.0.1:5000", tcp("127.0.0.1", 5000)),
            ("tcp:host-2.example", tcp("host-2.example", 4440)),
            ("tcp:[::1]:0", tcp("::1", 0)),
            ("tcp:[fe80::1%eth0]", tcp("fe80::1%eth0", 4440)),
            ("unix:/run/x.sock", Endpoint::Unix("/run/x.sock".into())),
            ("unix:x:y", Endpoint::Unix("x:y".into())),
        ] {
            assert_eq!(text.parse(), Ok(endpoint), "{text}");
        }
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in [
            "tcp:127.0.0.1:5000",
            "tcp:[::1]:0",
            "tcp:[fe80::1%eth0]:4440",
            "unix:/run/x.sock",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_no_endpoint() {
        for text in [
            "",
            "tcp",
            "tcp:",
            "tcp::4440",
            "tcp:::1",
            "tcp:::1:4440",
            "tcp:[::1",
            "tcp:[::1]4440",
            "tcp:[host]:1",
            "tcp:[::1%]:1",
            "tcp:host:",
            "tcp:host:+1",
            "tcp:host:65536",
            "tcp:a b:1",
            "tcp://host:1",
            "http:host",
            "unix:",
            "unix:/a\0b",
            &format!("unix:/{}", "x".repeat(107)),
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_scheme_of_a_later_version_is_named() {
        for scheme in SCHEMES_LATER {
            let error = format!("{scheme}:x:1").parse::<Endpoint>().unwrap_err();
            assert!(matches!(error, EndpointError::NotServed { .. }));
            let text = error.to_string();
            assert!(text.contains(scheme) && text.contains("tcp"), "{text}");
        }
    }

    #[test]
    fn loopback_is_only_what_no_other_host_reaches() {
        for text in [
            "tcp:127.0.0.1:1",
            "tcp:127.9.9.9:1",
            "tcp:[::1]:1",
            "tcp:[::ffff:127.0.0.1]:1",
            "tcp:localhost:1",
            "unix:/x",
        ] {
            assert!(text.parse::<Endpoint>().unwrap().is_loopback(), "{text}");
        }
        for text in [
            "tcp:0.0.0.0:1",
            "tcp:[::]:1",
            "tcp:10.0.0.1:1",
            "tcp:host:1",
        ] {
            assert!(!text.parse::<Endpoint>().unwrap().is_loopback(), "{text}");
        }
    }
}
