//! Finds the messages in a client's byte stream. Pure: no socket, no clock.
//!
//! QMP clients send no newline; they glue messages together and split them anywhere. The scanner looks
//! at every byte once and knows only brackets and strings, so its work is linear and bounded whatever
//! arrives; what lies between matching brackets is judged once, by `serde_json`.
//!
//! After text that cannot be the start of a message it drops everything up to the next newline or
//! control byte, which is how a client gets back into step.

use crate::limits::{CONTROL_NESTING_MAX, CONTROL_REQUEST_BYTES_MAX};

const _: () = assert!(CONTROL_NESTING_MAX <= u64::BITS); // one bit per open bracket
const _: () = assert!(CONTROL_NESTING_MAX < 128); // serde_json's own bound must not come first

/// What the scanner found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// Text from one opening bracket to the one that matches it.
    Message(Vec<u8>),
    /// Text that is no JSON; says why.
    Garbage(&'static str),
    /// A request above the limit. The stream is useless from here on.
    TooLarge,
}

/// The scanner. Keeps the beginning of a message that has not ended yet.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    message: Vec<u8>,
    state: State,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Between,
    Inside(Open),
    Skipping,
}

/// Where inside a message the scanner is.
#[derive(Debug, Default, Clone, Copy)]
struct Open {
    depth: u32,
    /// Bit n tells whether the bracket at depth n is `[`.
    squares: u64,
    text: Text,
}

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Text {
    #[default]
    Outside,
    String,
    Escape,
}

/// What one byte does to an open message.
enum Step {
    On(Open),
    End,
    Garbage(&'static str),
}

impl Splitter {
    /// Takes bytes off the front of `input` until one item is complete or nothing is left.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Item> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if let Some(item) = self.byte(byte) {
                return Some(item);
            }
        }
        None
    }

    fn byte(&mut self, byte: u8) -> Option<Item> {
        match self.state {
            State::Between => match byte {
                b'{' | b'[' => self.inside(Open::default(), byte),
                b' ' | b'\t' | b'\r' | b'\n' => None,
                byte if resets(byte) => None,
                _ => {
                    self.state = State::Skipping;
                    Some(Item::Garbage("expected '{'"))
                }
            },
            State::Inside(open) => self.inside(open, byte),
            State::Skipping => {
                if byte == b'\n' || resets(byte) {
                    self.state = State::Between;
                }
                None
            }
        }
    }

    fn inside(&mut self, open: Open, byte: u8) -> Option<Item> {
        if self.message.len() == CONTROL_REQUEST_BYTES_MAX {
            self.message = Vec::new();
            self.state = State::Skipping;
            return Some(Item::TooLarge);
        }
        self.message.push(byte);
        match open.step(byte) {
            Step::On(open) => {
                self.state = State::Inside(open);
                None
            }
            Step::End => {
                self.state = State::Between;
                Some(Item::Message(std::mem::take(&mut self.message)))
            }
            Step::Garbage(why) => {
                self.message.clear();
                // The byte that broke the message may be the very one that ends the damage.
                self.state = if byte == b'\n' || resets(byte) {
                    State::Between
                } else {
                    State::Skipping
                };
                Some(Item::Garbage(why))
            }
        }
    }
}

impl Open {
    fn step(self, byte: u8) -> Step {
        if resets(byte) {
            return Step::Garbage("control character in a message");
        }
        match (self.text, byte) {
            (Text::Outside, b'"') => self.text(Text::String),
            (Text::Outside, b'{' | b'[') => self.deeper(byte == b'['),
            (Text::Outside, b'}' | b']') => self.shallower(byte == b']'),
            (Text::String, b'"') => self.text(Text::Outside),
            (Text::String, b'\\') => self.text(Text::Escape),
            // No string of JSON holds a raw newline: the message is broken, and here it can stop.
            (Text::String | Text::Escape, b'\n') => Step::Garbage("newline in a string"),
            (Text::Escape, _) => self.text(Text::String),
            (Text::Outside | Text::String, _) => Step::On(self),
        }
    }

    fn text(self, text: Text) -> Step {
        Step::On(Self { text, ..self })
    }

    fn deeper(self, square: bool) -> Step {
        if self.depth == CONTROL_NESTING_MAX {
            return Step::Garbage("nested too deeply");
        }
        let bit = 1 << self.depth;
        let squares = if square {
            self.squares | bit
        } else {
            self.squares & !bit
        };
        Step::On(Self {
            depth: self.depth + 1,
            squares,
            ..self
        })
    }

    fn shallower(self, square: bool) -> Step {
        // A message begins with an opening bracket and ends at depth 0, so there is one to close.
        let depth = self.depth - 1;
        if (self.squares >> depth & 1 == 1) != square {
            Step::Garbage("brackets do not match")
        } else if depth == 0 {
            Step::End
        } else {
            Step::On(Self { depth, ..self })
        }
    }
}

/// Control characters other than white space, and 0xff as older clients send it, put the parser
/// back to its beginning.
fn resets(byte: u8) -> bool {
    byte == 0xff || (byte < 0x20 && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn items(chunks: &[&[u8]]) -> Vec<Item> {
        let mut splitter = Splitter::default();
        let mut found = Vec::new();
        for mut chunk in chunks.iter().copied() {
            while let Some(item) = splitter.next(&mut chunk) {
                found.push(item);
            }
        }
        found
    }

    fn message(text: &str) -> Item {
        Item::Message(text.as_bytes().to_vec())
    }

    #[test]
    fn glued_messages_come_apart() {
        let found = items(&[br#"{"a":1}{"b":"}{"}  [2]"#]);
        assert_eq!(
            found,
            [
                message(r#"{"a":1}"#),
                message(r#"{"b":"}{"}"#),
                message("[2]")
            ]
        );
    }

    #[test]
    fn escaped_quotes_do_not_end_a_string() {
        let text = r#"{"a":"\"}\\","b":["\\\""]}"#;
        assert_eq!(items(&[text.as_bytes()]), [message(text)]);
    }

    #[test]
    fn garbage_is_dropped_up_to_the_newline() {
        let found = items(&[b"bad {\"x\":1}\n{\"a\":1}"]);
        assert_eq!(found, [Item::Garbage("expected '{'"), message("{\"a\":1}")]);
    }

    #[test]
    fn a_control_byte_abandons_an_open_message() {
        for reset in [0_u8, 1, 0x1b, 0xff] {
            let mut bytes = b"{\"a\": \"open".to_vec();
            bytes.push(reset);
            bytes.extend(b"{}");
            let found = items(&[&bytes]);
            assert_eq!(found.len(), 2, "{reset}");
            assert_eq!(found[1], message("{}"));
            // Between messages it has nothing to abandon.
            assert_eq!(items(&[&[reset], b"{}"]), [message("{}")]);
        }
    }

    #[test]
    fn an_unterminated_string_ends_at_the_newline() {
        let found = items(&[b"{\"a\":\"x\n{}"]);
        assert_eq!(found, [Item::Garbage("newline in a string"), message("{}")]);
    }

    #[test]
    fn wrong_and_deep_brackets_are_garbage_once() {
        assert_eq!(
            items(&[b"{]}}}}\n{}"]),
            [Item::Garbage("brackets do not match"), message("{}")]
        );
        let deep = "[".repeat(10_000);
        assert_eq!(
            items(&[deep.as_bytes(), b"\n{}"]),
            [Item::Garbage("nested too deeply"), message("{}")]
        );
        let allowed = CONTROL_NESTING_MAX as usize;
        let nested = "[".repeat(allowed) + &"]".repeat(allowed);
        assert_eq!(items(&[nested.as_bytes()]), [message(&nested)]);
    }

    #[test]
    fn a_request_at_the_limit_passes_and_one_above_does_not() {
        let fill = "x".repeat(CONTROL_REQUEST_BYTES_MAX - 4);
        let fits = format!("[\"{fill}\"]");
        assert_eq!(items(&[fits.as_bytes()]), [message(&fits)]);
        let over = format!("[\"x{fill}\"]");
        assert_eq!(items(&[over.as_bytes()])[0], Item::TooLarge);
    }

    proptest! {
        #[test]
        fn any_split_finds_the_same_items(
            bytes in proptest::collection::vec(
                prop_oneof![
                    Just(b'{'), Just(b'}'), Just(b'['), Just(b']'), Just(b'"'), Just(b'\\'),
                    Just(b'\n'), Just(b' '), Just(b'a'), Just(b':'), any::<u8>()
                ],
                0..300,
            ),
            cuts in proptest::collection::vec(0_usize..300, 0..20),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.push(0);
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let chunks: Vec<_> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            let single: Vec<_> = bytes.chunks(1).collect();
            let whole = items(&[&bytes]);
            prop_assert_eq!(&items(&chunks), &whole);
            prop_assert_eq!(&items(&single), &whole);
        }

        #[test]
        fn messages_of_valid_json_come_back_unchanged(
            texts in proptest::collection::vec("\\{\"k\":\"[ -!#-\\[\\]-~é€😀]{0,20}\"\\}", 0..10),
            glue in "[ \r\n\t]{0,3}",
        ) {
            let stream = texts.join(&glue);
            let want: Vec<_> = texts.iter().map(|text| message(text)).collect();
            prop_assert_eq!(items(&[stream.as_bytes()]), want);
        }
    }
}
