//! One message of a client, judged: a request, or what QEMU would say instead.

use serde_json::{Map, Value};

use super::{CommandError, code};

/// A request whose shape is right. Whether the command exists is decided later.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) id: Option<Value>,
    pub(super) command: String,
    pub(super) arguments: Value,
    pub(super) out_of_band: bool,
}

/// An error, and the id to answer it with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub(super) id: Option<Value>,
    pub(super) error: CommandError,
}

/// The answer to text that is no JSON. It has no id: nobody knows which request this was.
pub(super) fn garbage(why: &str) -> Refusal {
    refuse(None, format!("JSON parse error, {why}"))
}

/// Reads one message. `exec-oob` exists once the client has asked for it.
pub(super) fn read(message: &[u8], oob_enabled: bool) -> Result<Request, Refusal> {
    let value = serde_json::from_slice(message).map_err(|error| garbage(&error.to_string()))?;
    let Value::Object(mut members) = value else {
        return Err(refuse(None, "QMP input must be a JSON object"));
    };
    let id = members.remove("id");
    match members_of(members, oob_enabled) {
        Ok((command, arguments, out_of_band)) => Ok(Request {
            id,
            command,
            arguments,
            out_of_band,
        }),
        Err(desc) => Err(refuse(id, desc)),
    }
}

fn members_of(
    members: Map<String, Value>,
    oob_enabled: bool,
) -> Result<(String, Value, bool), String> {
    let mut command = None;
    let mut arguments = Value::Object(Map::new());
    for (name, value) in members {
        match (name.as_str(), value) {
            ("exec-oob", _) if !oob_enabled => {
                return Err("QMP input member 'exec-oob' is unexpected".into());
            }
            ("execute" | "exec-oob", Value::String(text)) => {
                if command.replace((text, name == "exec-oob")).is_some() {
                    return Err("QMP input member 'execute' clashes with 'exec-oob'".into());
                }
            }
            ("execute" | "exec-oob", _) => {
                return Err(format!("QMP input member '{name}' must be a string"));
            }
            ("arguments", value @ Value::Object(_)) => arguments = value,
            ("arguments", _) => {
                return Err("QMP input member 'arguments' must be an object".into());
            }
            _ => return Err(format!("QMP input member '{name}' is unexpected")),
        }
    }
    let (command, out_of_band) = command.ok_or("QMP input lacks member 'execute'")?;
    Ok((command, arguments, out_of_band))
}

fn refuse(id: Option<Value>, desc: impl Into<String>) -> Refusal {
    Refusal {
        id,
        error: CommandError::new(code::BAD_REQUEST, desc),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_of_a_wrong_shape_are_refused_in_the_words_of_qemu() {
        for (text, id, want) in [
            ("[1]", None, "QMP input must be a JSON object"),
            (
                r#"{"id":1}"#,
                Some(json!(1)),
                "QMP input lacks member 'execute'",
            ),
            (
                r#"{"execute":"a","extra":1}"#,
                None,
                "QMP input member 'extra' is unexpected",
            ),
            (
                r#"{"execute":7}"#,
                None,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute":"a","arguments":[]}"#,
                None,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute":"a","exec-oob":"b"}"#,
                None,
                "QMP input member 'execute' clashes with 'exec-oob'",
            ),
        ] {
            let refusal = read(text.as_bytes(), true).unwrap_err();
            assert_eq!(
                (refusal.error.desc.as_str(), refusal.id),
                (want, id),
                "{text}"
            );
        }
        let refusal = read(br#"{"exec-oob":"a"}"#, false).unwrap_err();
        assert_eq!(
            refusal.error.desc,
            "QMP input member 'exec-oob' is unexpected"
        );
        let refusal = read(b"{\"a\": bad}", true).unwrap_err();
        assert!(refusal.error.desc.starts_with("JSON parse error, "));
        assert!(read(b"{\"execute\": \"\xc3\x28\"}", true).is_err());
    }

    #[test]
    fn ids_of_every_kind_are_kept() {
        for id in [
            json!(null),
            json!(false),
            json!(-1),
            json!(1.5),
            json!("é"),
            json!([1]),
            json!({"a": {}}),
        ] {
            let text = json!({"execute": "x", "id": id}).to_string();
            assert_eq!(read(text.as_bytes(), false).unwrap().id, Some(id));
        }
        assert_eq!(read(br#"{"execute":"x"}"#, false).unwrap().id, None);
    }
}
