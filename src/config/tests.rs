//! The files that are shipped, and every kind of mistake with its line.

use super::keys::Key;
use super::*;

const SENDER: &str = include_str!("../../config/sender.toml");
const RECEIVER: &str = include_str!("../../config/receiver.toml");

fn sender(text: &str) -> Result<SenderConfig, ConfigError> {
    let (config, _) = Document::parse(text).and_then(|document| parse_sender(&document))?;
    Ok(config)
}

fn receiver(text: &str) -> Result<ReceiverConfig, ConfigError> {
    let (config, _) = Document::parse(text).and_then(|document| parse_receiver(&document))?;
    Ok(config)
}

/// The line an error names, and what it says.
fn mistake<T: std::fmt::Debug>(read: Result<T, ConfigError>) -> (usize, String) {
    let error = read.unwrap_err();
    (error.place().unwrap().line, error.to_string())
}

fn names<T>(keys: &[Key<T>]) -> Vec<&'static str> {
    let mut names: Vec<_> = keys.iter().map(|key| key.name).collect();
    names.sort_unstable();
    names
}

/// Reads a table of a shipped file and checks that it has every key there is.
fn has_every_key<T>(text: &str, name: &'static str, keys: &[Key<T>], section: &mut T) {
    let document = Document::parse(text).unwrap();
    let mut table = document.table(name).unwrap().unwrap();
    table.read(keys, section).unwrap();
    assert_eq!(table.names_seen(), names(keys), "[{name}]");
}

#[test]
fn the_shipped_sender_toml_says_every_default() {
    assert_eq!(sender(SENDER).unwrap(), SenderConfig::default());
    let mut config = SenderConfig::default();
    has_every_key(SENDER, "control", CONTROL_KEYS, &mut RawControl::default());
    has_every_key(SENDER, "transfer", transfer::KEYS, &mut config.transfer);
    has_every_key(SENDER, "log", LOG_KEYS, &mut config.log);
    has_every_key(SENDER, "metrics", METRICS_KEYS, &mut ());
    has_every_key(SENDER, "state", STATE_KEYS, &mut config.state);
}

#[test]
fn the_shipped_receiver_toml_says_every_default() {
    assert_eq!(receiver(RECEIVER).unwrap(), ReceiverConfig::default());
    let mut config = ReceiverConfig::default();
    has_every_key(
        RECEIVER,
        "control",
        CONTROL_KEYS,
        &mut RawControl::default(),
    );
    has_every_key(RECEIVER, "receive", receive::KEYS, &mut config.receive);
    has_every_key(RECEIVER, "log", LOG_KEYS, &mut config.log);
    has_every_key(RECEIVER, "metrics", METRICS_KEYS, &mut ());
    has_every_key(RECEIVER, "state", STATE_KEYS, &mut config.state);
}

#[test]
fn the_region_shown_in_the_shipped_sender_toml_can_be_used() {
    let commented = SENDER
        .lines()
        .skip_while(|line| *line != "#[[region]]")
        .take_while(|line| !line.is_empty())
        .map(|line| line.trim_start_matches('#'));
    let example = commented.collect::<Vec<_>>().join("\n");
    let region = sender(&example).unwrap().regions.remove(0);
    assert_eq!(region.tracker, TrackerConfig::Scan);
    let document = Document::parse(&example).unwrap();
    let mut table = document.tables("region").unwrap().remove(0);
    table.read(region::KEYS, &mut RawRegion::default()).unwrap();
    assert_eq!(table.names_seen(), names(region::KEYS));
}

#[test]
fn an_empty_file_is_all_defaults() {
    assert_eq!(sender("").unwrap(), SenderConfig::default());
    assert_eq!(receiver("").unwrap(), ReceiverConfig::default());
}

#[test]
fn an_unknown_key_is_told_with_its_line_and_the_nearest_one() {
    let (line, text) = mistake(sender("# x\n[transfer]\n\nsteams = 4\n"));
    assert_eq!(line, 4);
    assert_eq!(
        text,
        "4: unknown key \"steams\" in [transfer]: did you mean \"streams\"?"
    );
    let (line, text) = mistake(sender("[log]\nfilter = \"info\"\n[trasfer]\n"));
    assert_eq!(line, 3);
    assert!(text.contains("unknown table [trasfer]: did you mean \"transfer\"?"));
    let (line, text) = mistake(sender("streams = 4\n"));
    assert_eq!(line, 1);
    assert!(text.contains("outside any table"), "{text}");
    let (_, text) = mistake(receiver("[transfer]\n"));
    assert!(text.contains("unknown table [transfer]"), "{text}");
}

#[test]
fn the_first_mistake_in_the_file_is_the_one_reported() {
    let (line, _) = mistake(sender("[transfer]\nwindow = 1\nstreams = 0\naaa = 1\n"));
    assert_eq!(line, 2);
}

#[test]
fn an_error_carries_file_line_column_and_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sender.toml");
    std::fs::write(&path, "[transfer]\nstreams = 300\n").unwrap();
    let error = load_sender(&path).unwrap_err();
    assert_eq!(error.file(), Some(path.as_path()));
    assert_eq!(
        error.place(),
        Some(Place {
            line: 2,
            column: 11
        })
    );
    assert_eq!(error.key(), Some("transfer.streams"));
    let expected = format!(
        "{}:2: transfer.streams: the number 300 is not a whole number from 1 to 256",
        path.display()
    );
    assert_eq!(error.to_string(), expected);
    let error = load_sender(&directory.path().join("none")).unwrap_err();
    assert!(matches!(error.problem(), Problem::Unreadable(_)));
}

#[test]
fn every_mistake_has_its_line() {
    for (text, line) in [
        ("[transfer]\nstreams = \"4\"", 2),
        ("[transfer]\nstreams = 0", 2),
        ("[transfer]\nstreams = 4.0", 2),
        ("[transfer]\nstreams = 99999999999999999999999", 2),
        ("[transfer]\nstreams = 2020-01-01", 2),
        ("[transfer]\npacket-size = \"96KiB\"", 2),
        ("[transfer]\n\nwindow = \"64KiB\"", 3),
        ("[transfer]\nwindow = \"1MiB\"\npacket-size = \"2MiB\"", 2),
        ("[transfer]\npacket-size = \"16MiB\"\nwindow = \"8MiB\"", 3),
        ("[transfer]\nstall-timeout = 10", 2),
        ("[transfer]\nmax-bandwidth = 300", 2),
        ("[transfer]\ncompression = \"gzip\"", 2),
        ("[transfer]\ncpus = \"3-0\"", 2),
        ("[tls]\n\ncertificate = \"x\"", 3),
        ("[metrics]\nlisten = \"tcp:127.0.0.1:9100\"", 2),
        ("[log]\nfilter = \"memferry=loud\"", 2),
        ("[control]\nsocket = \"relative\"", 2),
        ("[control]\nallow-uids = [\n 1,\n -1]", 4),
        ("[control]\nallow-uids = 0", 2),
        ("[[region]]\nname = \"../x\"\npath = \"/x\"", 2),
        ("[[region]]\nname = \"x\"", 1),
        (
            "[[region]]\nname = \"x\"\npath = \"/x\"\ntracker = \"pagemap\"",
            4,
        ),
        (
            "[[region]]\nname = \"x\"\npath = \"/x\"\nfreeze = \"client\"",
            4,
        ),
        (
            "[[region]]\nname = \"x\"\npath = \"/x\"\n[[region]]\npath = \"/y\"\nname = \"x\"",
            6,
        ),
        ("[region]\nname = \"x\"", 1),
        ("transfer = 3", 1),
        ("[transfer\n", 1),
        ("[transfer]\nstreams = 1\nstreams = 2", 3),
    ] {
        let (found, message) = mistake(sender(text));
        assert_eq!(found, line, "{text:?}: {message}");
    }
}

#[test]
fn regions_take_bare_kinds_and_tables() {
    let config = sender(
        "[[region]]\nname = \"a\"\npath = \"/a\"\n\
         [[region]]\nname = \"b\"\npath = \"/b\"\ntracker = \"scan\"\nfreeze = {kind = \"pid\", pid = 7}\n",
    );
    let regions = config.unwrap().regions;
    assert_eq!(regions[0].tracker, TrackerConfig::None);
    assert_eq!(regions[0].freeze, FreezeConfig::None);
    assert_eq!(regions[1].tracker, TrackerConfig::Scan);
    assert_eq!(regions[1].freeze, FreezeConfig::Pid(7));
}

#[test]
fn plain_tcp_beyond_loopback_needs_consent() {
    let (line, text) = mistake(receiver("[receive]\nlisten = [\"tcp:0.0.0.0:4440\"]\n"));
    assert_eq!(line, 2);
    assert!(text.contains("insecure-plaintext = true"), "{text}");
    let consent = "[receive]\nlisten = [\"tcp:0.0.0.0\"]\ninsecure-plaintext = true\n";
    assert!(receiver(consent).unwrap().receive.insecure_plaintext);
    assert!(receiver("[receive]\nlisten = [\"unix:/run/x\", \"tcp:[::1]\"]").is_ok());
}

#[test]
fn every_mistake_of_a_receiver_has_its_line() {
    for (text, line) in [
        ("[receive]\nlisten = []", 2),
        (
            "[receive]\nlisten = [\n\"tcp:localhost\",\n\"vsock:3:1\"]",
            4,
        ),
        ("[receive]\nallow-names = [\"*\", \"/x\"]", 2),
        ("[receive]\nallow-peers = [\"10.1.0.0/8\"]", 2),
        ("[receive]\nmax-region = \"32TiB\"", 2),
        ("[receive]\nmax-total = \"1TiB\"", 2),
        ("[receive]\nmax-transfers = 0", 2),
        ("[receive]\nhuge-pages = true", 2),
        ("[receive]\nnuma-node = -1", 2),
        ("[receive]\nnuma-node = 1024", 2),
        ("[receive]\ncpus = \"all\"", 2),
        ("[receive]\ninsecure-plaintext = \"yes\"", 2),
    ] {
        let (found, message) = mistake(receiver(text));
        assert_eq!(found, line, "{text:?}: {message}");
    }
}

#[test]
fn accounts_are_names_or_numbers_and_a_missing_one_is_a_warning() {
    let text = "[control]\nallow-uids = [\"root\", 12345, \"no-such-user\"]\n\
                allow-gids = [\"root\", \"no-such-group\"]\n";
    let document = Document::parse(text).unwrap();
    let (config, warnings) = parse_sender(&document).unwrap();
    let mut expected = always_allowed();
    expected.push(12345);
    assert_eq!(config.control.allow_uids, expected);
    assert_eq!(config.control.allow_gids, [0]);
    let warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("user \"no-such-user\""));
    assert!(warnings[1].contains("group \"no-such-group\""));
}

#[test]
fn a_check_tells_the_two_kinds_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.toml");
    let check = |text: &str| {
        std::fs::write(&path, text).unwrap();
        check_file(&path)
    };
    assert_eq!(check(SENDER).unwrap().kind, "sender");
    assert_eq!(check(RECEIVER).unwrap().kind, "receiver");
    assert_eq!(check("[receive]\n").unwrap().kind, "receiver");
    for text in ["", "[log]\n", "[receive]\n[transfer]\n"] {
        let error = check(text).unwrap_err();
        assert!(
            matches!(error.problem(), Problem::KindUnclear(_)),
            "{error}"
        );
    }
    let report = check("[[region]]\nname = \"vm1\"\npath = \"/nonexistent/vm1\"\n").unwrap();
    let text = report.to_string();
    assert!(text.contains("region vm1: /nonexistent/vm1"), "{text}");
    assert!(text.contains("warning: region vm1: /nonexistent/vm1 does not exist"));
}
