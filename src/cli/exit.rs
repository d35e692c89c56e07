//! Exit codes: a promise to scripts. The same table stands in the help text.

use std::process::ExitCode;

use serde_json::Value;

use crate::client::ClientError;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Done = 0,
    /// Anything without a code of its own; also an attempt whose owner is not decided.
    Other = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// No daemon answers, it does not let us in, or it went away. A transfer may still be running.
    Unreachable = 3,
    /// The transfer failed; the source keeps running.
    Failed = 4,
    /// The transfer was cancelled; the source keeps running.
    Cancelled = 5,
    /// The transfer did not converge or ran out of time.
    NotConverged = 6,
    /// The bytes that arrived are not those that were sent.
    Verification = 7,
    /// The other side does not want this transfer.
    Refused = 8,
    /// Memory, disk space, descriptors or a limit ran out.
    Resources = 9,
    /// The configuration makes no sense (`EX_CONFIG`).
    Configuration = 78,
    /// Interrupted twice; the transfer goes on.
    Interrupted = 130,
}

impl Exit {
    /// The exit code of an error with this machine code (`x-code`); nothing for a code that this version
    /// does not know. `docs/operating.md` says what each code means, and a test that all are here.
    #[must_use]
    pub fn of_code(code: &str) -> Option<Self> {
        Some(match code {
            "cancelled" => Self::Cancelled,
            "not-converged" | "timeout" | "freeze-timeout" => Self::NotConverged,
            "corrupt" | "incomplete" => Self::Verification,
            "refused" | "exists" | "not-allowed" | "version" | "too-large" | "not-owner"
            | "busy" | "region-length" => Self::Refused,
            "no-space" | "region-map" => Self::Resources,
            "invalid-argument" => Self::Usage,
            "access-denied" => Self::Unreachable,
            "unreachable" | "connection-lost" | "peer-silent" | "peer-hung"
            | "destination-slow" | "stalled" | "line-damage" | "protocol" | "not-held"
            | "not-frozen" | "freeze-failed" | "cannot-throttle" | "receiver-failed"
            | "blob-read" => Self::Failed,
            // Why a Region cannot be added or moved, or a request cannot be followed: if it ends a
            // transfer, that transfer has failed, and otherwise nothing was begun.
            "region-open"
            | "region-kind"
            | "region-too-long"
            | "region-resized"
            | "region-read"
            | "freeze-refused"
            | "writer-gone"
            | "sender-failed"
            | "region-exists"
            | "region-unknown"
            | "region-busy"
            | "region-moved"
            | "region-taken"
            | "not-committed"
            | "no-blob"
            | "page-size"
            | "no-regions"
            | "no-such-cpu"
            | "id-in-use"
            | "no-such-transfer"
            | "not-indeterminate"
            | "not-active"
            | "not-paused"
            | "not-waiting"
            | "tracker-blind"
            | "tracker-failed"
            | "tracker-unsupported"
            | "tracker-descriptor"
            | "tracker-address"
            | "tracker-memory"
            | "bitmap-size"
            | "bitmap-seal"
            | "too-late"
            | "bad-request"
            | "command-not-found"
            | "no-descriptor" => Self::Other,
            _ => return None,
        })
    }

    /// How a client command ended that was not done.
    #[must_use]
    pub fn of_error(error: &ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. }
            | ClientError::Denied { .. }
            | ClientError::Broken { .. } => Self::Unreachable,
            ClientError::Command { code, .. } => Self::of_code(code).unwrap_or(Self::Other),
        }
    }

    /// How a transfer ended, by its last `query-migrate`.
    #[must_use]
    pub fn of_transfer(last: &Value) -> Self {
        match last["status"].as_str() {
            Some("completed") => Self::Done,
            Some("cancelled") => Self::Cancelled,
            Some("failed") => last["error"]["x-code"]
                .as_str()
                .and_then(Self::of_code)
                .filter(|exit| *exit != Self::Other)
                .unwrap_or(Self::Failed),
            // Neither done nor failed: whoever reads 4 as "the source runs on" would be wrong.
            _ => Self::Other,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_transfer_ends_with_the_code_of_its_reason() {
        let failed = |code: &str| json!({"status": "failed", "error": {"x-code": code}});
        for (last, want) in [
            (json!({"status": "completed"}), 0),
            (json!({"status": "cancelled"}), 5),
            (json!({"status": "indeterminate"}), 1),
            (json!({}), 1),
            (json!({"status": "failed"}), 4),
            (failed("connection-lost"), 4),
            (failed("not-converged"), 6),
            (failed("corrupt"), 7),
            (failed("exists"), 8),
            (failed("no-space"), 9),
            (failed("writer-gone"), 4),
            (failed("of a later version"), 4),
        ] {
            assert_eq!(Exit::of_transfer(&last) as u8, want, "{last}");
        }
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_a_failed_transfer() {
        let error = ClientError::Broken {
            path: "/x".into(),
            doing: "y".into(),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        };
        assert_eq!(Exit::of_error(&error) as u8, 3);
        let error = ClientError::Command {
            class: "GenericError".into(),
            desc: "no".into(),
            code: "region-unknown".into(),
        };
        assert_eq!(Exit::of_error(&error) as u8, 1);
    }
}
