//! Command arguments: JSON to types, with QEMU's wording for what does not fit.
//!
//! `serde_json` would say "invalid type: integer `1`, expected a string" and not where. This small
//! deserializer walks the value itself, so that an error knows the path of the member it is about.

use std::fmt;

use serde::de::value::StringDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, Expected, IntoDeserializer,
    MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;

use super::{CommandError, code};

pub(super) fn parse<T: DeserializeOwned>(arguments: Value) -> Result<T, CommandError> {
    T::deserialize(Argument(arguments))
        .map_err(|error| CommandError::new(code::INVALID_ARGUMENT, error.to_string()))
}

/// What does not fit, and where.
#[derive(Debug)]
struct Misfit {
    /// From the innermost member outwards.
    path: Vec<String>,
    what: What,
}

#[derive(Debug)]
enum What {
    Missing,
    Unexpected,
    Twice,
    Type { expected: String },
    Value { reason: String },
}

impl Misfit {
    fn at(what: What, member: &str) -> Self {
        Self {
            path: vec![member.to_owned()],
            what,
        }
    }

    fn here(what: What) -> Self {
        Self {
            path: Vec::new(),
            what,
        }
    }

    fn inside(mut self, member: String) -> Self {
        self.path.push(member);
        self
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut path = self.path.clone();
        path.reverse();
        let path = if path.is_empty() {
            "arguments".to_owned()
        } else {
            path.join(".")
        };
        match &self.what {
            What::Missing => write!(f, "Parameter '{path}' is missing"),
            What::Unexpected => write!(f, "Parameter '{path}' is unexpected"),
            What::Twice => write!(f, "Parameter '{path}' is given twice"),
            What::Type { expected } => {
                write!(
                    f,
                    "Invalid parameter type for '{path}', expected: {expected}"
                )
            }
            What::Value { reason } => write!(f, "Invalid parameter '{path}': {reason}"),
        }
    }
}

impl std::error::Error for Misfit {}

impl Error for Misfit {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self::here(What::Value {
            reason: reason.to_string(),
        })
    }

    fn invalid_type(_unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::here(What::Type {
            expected: type_name(&expected.to_string()).to_owned(),
        })
    }

    fn missing_field(field: &'static str) -> Self {
        Self::at(What::Missing, field)
    }

    fn unknown_field(field: &str, _expected: &'static [&'static str]) -> Self {
        Self::at(What::Unexpected, field)
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::at(What::Twice, field)
    }
}

/// serde's word for a type, in QEMU's words.
fn type_name(expected: &str) -> &str {
    match expected {
        "a string" | "string or map" => "string",
        "a boolean" => "boolean",
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => {
            "integer"
        }
        "f32" | "f64" => "number",
        "a sequence" => "array",
        "a map" => "object",
        other if other.starts_with("struct ") => "object",
        other => other,
    }
}

/// A value on its way into a type.
struct Argument(Value);

impl<'de> Deserializer<'de> for Argument {
    type Error = Misfit;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => visitor.visit_u64(value),
                (None, Some(value)) => visitor.visit_i64(value),
                (None, None) => visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(value) => visitor.visit_string(value),
            Value::Array(values) => visitor.visit_seq(Elements {
                values: values.into_iter(),
                index: 0,
            }),
            Value::Object(members) => visitor.visit_map(Members {
                members: members.into_iter(),
                current: None,
            }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::String(variant) => visitor.visit_enum(Variant {
                variant,
                content: Value::Null,
            }),
            Value::Object(members) if members.len() == 1 => {
                let mut members = members.into_iter();
                match members.next() {
                    Some((variant, content)) => visitor.visit_enum(Variant { variant, content }),
                    None => Err(Misfit::invalid_type(Unexpected::Map, &"a string")),
                }
            }
            _ => Err(Misfit::invalid_type(
                Unexpected::Other("value"),
                &"a string",
            )),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Members {
    members: serde_json::map::IntoIter,
    current: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Members {
    type Error = Misfit;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Misfit> {
        let Some((key, value)) = self.members.next() else {
            return Ok(None);
        };
        let name: StringDeserializer<Misfit> = key.clone().into_deserializer();
        self.current = Some((key, value));
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Misfit> {
        let Some((key, value)) = self.current.take() else {
            return Err(Misfit::custom("a value without its name"));
        };
        seed.deserialize(Argument(value))
            .map_err(|error| error.inside(key))
    }
}

struct Elements {
    values: std::vec::IntoIter<Value>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Elements {
    type Error = Misfit;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Misfit> {
        let Some(value) = self.values.next() else {
            return Ok(None);
        };
        let index = self.index;
        self.index += 1;
        seed.deserialize(Argument(value))
            .map(Some)
            .map_err(|error| error.inside(index.to_string()))
    }
}

struct Variant {
    variant: String,
    content: Value,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = Misfit;
    type Variant = Argument;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Argument), Misfit> {
        let name: StringDeserializer<Misfit> = self.variant.into_deserializer();
        Ok((seed.deserialize(name)?, Argument(self.content)))
    }
}

impl<'de> VariantAccess<'de> for Argument {
    type Error = Misfit;

    fn unit_variant(self) -> Result<(), Misfit> {
        match self.0 {
            Value::Null => Ok(()),
            _ => Err(Misfit::custom("this value takes no members")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Misfit> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Misfit> {
        self.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        self.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Migrate {
        uri: String,
        id: Option<crate::name::Name>,
        streams: Option<u16>,
        dry_run: Option<bool>,
        tracker: Option<Tracker>,
        regions: Option<Vec<String>>,
        mode: Option<Mode>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Tracker {
        address: u64,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Auto,
        Fixed { size: u32 },
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
    enum Freeze {
        Pid { pid: u32 },
    }

    fn refusal(arguments: Value) -> String {
        let error = parse::<Migrate>(arguments).unwrap_err();
        assert_eq!(error.code, code::INVALID_ARGUMENT);
        error.desc
    }

    #[test]
    fn what_does_not_fit_is_named_in_the_words_of_qemu() {
        for (arguments, want) in [
            (json!({}), "Parameter 'uri' is missing"),
            (
                json!({"uri": "x", "bogus": 1}),
                "Parameter 'bogus' is unexpected",
            ),
            (
                json!({"uri": 1}),
                "Invalid parameter type for 'uri', expected: string",
            ),
            (
                json!({"uri": "x", "streams": "2"}),
                "Invalid parameter type for 'streams', expected: integer",
            ),
            (
                json!({"uri": "x", "dry-run": "yes"}),
                "Invalid parameter type for 'dry-run', expected: boolean",
            ),
            (
                json!({"uri": "x", "tracker": {}}),
                "Parameter 'tracker.address' is missing",
            ),
            (
                json!({"uri": "x", "tracker": {"address": []}}),
                "Invalid parameter type for 'tracker.address', expected: integer",
            ),
            (
                json!({"uri": "x", "regions": ["a", 2]}),
                "Invalid parameter type for 'regions.1', expected: string",
            ),
            (
                json!({"uri": "x", "regions": "a"}),
                "Invalid parameter type for 'regions', expected: array",
            ),
            (
                json!({"uri": "x", "tracker": 1}),
                "Invalid parameter type for 'tracker', expected: object",
            ),
        ] {
            assert_eq!(refusal(arguments.clone()), want, "{arguments}");
        }
        for (arguments, part) in [
            (json!({"uri": "x", "streams": 70_000}), "streams"),
            (
                json!({"uri": "x", "id": "../x"}),
                "Invalid parameter 'id': name",
            ),
            (
                json!({"uri": "x", "mode": "fast"}),
                "Invalid parameter 'mode': unknown variant `fast`",
            ),
        ] {
            assert!(
                refusal(arguments.clone()).contains(part),
                "{}",
                refusal(arguments)
            );
        }
    }

    #[test]
    fn what_fits_arrives() {
        let all = json!({"uri": "x", "id": "a", "streams": 2, "dry-run": true,
            "tracker": {"address": u64::MAX}, "regions": [], "mode": {"fixed": {"size": 1}}});
        let parsed: Migrate = parse(all).unwrap();
        assert_eq!(parsed.tracker.unwrap().address, u64::MAX);
        assert_eq!(parsed.mode, Some(Mode::Fixed { size: 1 }));
        let parsed: Migrate = parse(json!({"uri": "x", "id": null, "mode": "auto"})).unwrap();
        assert_eq!((parsed.id, parsed.mode), (None, Some(Mode::Auto)));
        assert_eq!(
            parse::<Freeze>(json!({"kind": "pid", "pid": 7})).unwrap(),
            Freeze::Pid { pid: 7 }
        );
    }
}
