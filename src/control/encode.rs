//! Lines towards the client: ASCII only, one message each, `\r\n` at the end.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::{CommandError, code};
use crate::limits::CONTROL_ANSWER_BYTES_MAX;

/// One encoded line.
pub(super) type Line = Arc<[u8]>;

/// The `version` object of the greeting and of `query-version`. Existing clients read
/// `version.qemu`, some without asking whether it is there.
pub(super) fn version() -> Value {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    let numbers = json!({
        "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
        "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
        "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
    });
    json!({
        "qemu": numbers,
        "memferry": numbers,
        "package": concat!("memferry ", env!("CARGO_PKG_VERSION")),
    })
}

pub(super) fn greeting() -> Line {
    line(&json!({"QMP": {"version": version(), "capabilities": ["oob"]}}))
}

/// The answer to a request, with its `id` if it had one.
pub(super) fn answer(id: Option<&Value>, result: Result<Value, CommandError>) -> Line {
    let mut message = Map::new();
    match result {
        Ok(value) => message.insert("return".into(), value),
        Err(error) => message.insert(
            "error".into(),
            json!({"class": error.class, "desc": error.desc, "x-code": error.code}),
        ),
    };
    if let Some(id) = id {
        message.insert("id".into(), id.clone());
    }
    let encoded = line(&Value::Object(message));
    if encoded.len() <= CONTROL_ANSWER_BYTES_MAX {
        return encoded;
    }
    let desc = format!(
        "The answer has {} bytes, more than the {CONTROL_ANSWER_BYTES_MAX} a client can read: ask for less at once",
        encoded.len()
    );
    // The id came in a request, whose size is bounded well below an answer's, even when escaped.
    answer(id, Err(CommandError::new(code::TOO_LARGE, desc)))
}

/// An event of this moment, or nothing if it is too large to be read.
pub(super) fn event(name: &str, data: Value) -> Option<Line> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let message = json!({
        "event": name,
        "data": data,
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
    });
    let encoded = line(&message);
    (encoded.len() <= CONTROL_ANSWER_BYTES_MAX).then_some(encoded)
}

fn line(message: &Value) -> Line {
    let mut text = ascii(message.to_string());
    text.push_str("\r\n");
    text.into_bytes().into()
}

/// Outside strings JSON is ASCII, so whatever is not can be escaped without looking where it stands.
fn ascii(text: String) -> String {
    if text.is_ascii() {
        return text;
    }
    let mut escaped = String::with_capacity(text.len() * 2);
    for c in text.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CONTROL_REQUEST_BYTES_MAX;

    #[test]
    fn output_is_ascii_and_means_the_same() {
        let value = json!({"é": ["€", "😀", "\u{7f}\u{1}\n"]});
        let bytes = line(&value);
        assert!(bytes.is_ascii() && bytes.ends_with(b"\r\n"));
        assert_eq!(bytes.iter().filter(|&&b| b == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), value);
    }

    #[test]
    fn an_answer_above_the_limit_becomes_an_error_with_the_same_id() {
        let id = json!("é".repeat(CONTROL_REQUEST_BYTES_MAX / 2));
        let huge = json!("x".repeat(CONTROL_ANSWER_BYTES_MAX));
        let bytes = answer(Some(&id), Ok(huge));
        assert!(bytes.len() <= CONTROL_ANSWER_BYTES_MAX);
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["id"], id);
        assert_eq!(value["error"]["x-code"], code::TOO_LARGE);
    }

    #[test]
    fn the_greeting_names_the_version_of_the_package() {
        let value: Value = serde_json::from_slice(&greeting()).unwrap();
        assert_eq!(value["QMP"]["capabilities"], json!(["oob"]));
        assert_eq!(
            value["QMP"]["version"]["qemu"],
            value["QMP"]["version"]["memferry"]
        );
        let package = value["QMP"]["version"]["package"].as_str().unwrap();
        assert_eq!(package, format!("memferry {}", env!("CARGO_PKG_VERSION")));
    }
}
