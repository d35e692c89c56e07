//! The invariants of `docs/architecture.md` that can be seen in the source: what a layer must not know,
//! where `unsafe` may stand, how long a file may be, and that every error code is explained.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use memferry::cli::exit::Exit;

/// Modules of `src`, bottom up. A module may use its own layer and those before it.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "pure",
        &[
            "limits",
            "name",
            "pages",
            "wire",
            "iteration",
            "rates",
            "assembly",
            "endpoint",
        ],
    ),
    ("unsafe edge", &["sys", "region"]),
    (
        "data plane",
        &[
            "channel", "dirty", "stats", "stream", "freeze", "journal", "guardian", "history",
        ],
    ),
    (
        "control plane",
        &["config", "log", "peer", "control", "notify", "client"],
    ),
    (
        "wiring",
        &[
            "affinity", "daemon", "populate", "sender", "receiver", "workload",
        ],
    ),
    ("command line", &["cli"]),
];

/// Pure files inside other layers.
const ALSO_PURE: &[&str] = &[
    "channel/ledger.rs",
    "stream/compression.rs",
    "stream/lending.rs",
    "stream/window.rs",
    "control/parse.rs",
    "config/cpus.rs",
    "config/units.rs",
    "workload/pacer.rs",
    "workload/pattern.rs",
    "workload/stamp.rs",
];

/// What a pure file must not name. Durations and `Instant` arguments are values; asking the time is not.
const IMPURE: &[&str] = &[
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UdpSocket",
    "std::thread",
    "thread::",
    "tokio",
    "Instant::now",
    "SystemTime",
    "std::fs",
    "std::os::fd",
    "nix::",
    "libc::",
];

/// The only places with `unsafe` in them.
const UNSAFE: &[&str] = &["sys/", "region/mapping.rs"];

/// Lines of a file without its tests.
const LINES_MAX: usize = 500;

struct Source {
    /// Relative to `src`.
    path: String,
    /// Without its test module and without comments.
    code: String,
    lines: usize,
}

impl Source {
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap();
        first.strip_suffix(".rs").unwrap_or(first)
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Every file of `src` that is not for tests only.
fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut sources = Vec::new();
    for path in rust_files(&src) {
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap();
        if name.contains("tests") || for_tests_only(&src, &path) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        sources.push(Source {
            path: name.to_owned(),
            code: without_comments(text),
            lines: text.lines().count(),
        });
    }
    assert!(sources.len() > 50, "the files were not found");
    sources
}

/// Below `directory`, at any depth.
fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut directories = vec![directory.to_owned()];
    let mut files = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                files.push(path);
            }
        }
    }
    files
}

/// Whether the module that declares this file does so under `#[cfg(test)]`.
fn for_tests_only(src: &Path, path: &Path) -> bool {
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let parent = path.parent().unwrap();
    let declares = if parent == src {
        src.join("lib.rs")
    } else {
        parent.join("mod.rs")
    };
    fs::read_to_string(declares).is_ok_and(|text| {
        ["", "pub ", "pub(crate) ", "pub(super) "]
            .iter()
            .any(|how| text.contains(&format!("#[cfg(test)]\n{how}mod {stem};")))
    })
}

fn without_comments(text: &str) -> String {
    let code = |line: &str| line.split("// ").next().unwrap_or_default().to_owned();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.map(|line| code(line) + "\n").collect()
}

fn layer(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|(_, modules)| modules.contains(&module))
        .unwrap_or_else(|| {
            panic!("{module} has no layer: give it one here and in docs/architecture.md")
        })
}

#[test]
fn no_module_uses_a_layer_above_its_own() {
    let mut wrong = Vec::new();
    for source in sources() {
        if matches!(source.module(), "lib" | "main") {
            continue;
        }
        let own = layer(source.module());
        for used in source.code.split("crate::").skip(1) {
            let used: String = used
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect();
            if !used.is_empty() && layer(&used) > own {
                wrong.push(format!(
                    "{} ({}) uses {used} ({})",
                    source.path,
                    LAYERS[own].0,
                    LAYERS[layer(&used)].0
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn pure_files_name_no_socket_thread_clock_or_system_call() {
    let pure = LAYERS[0].1;
    let mut seen = 0;
    let mut wrong = Vec::new();
    for source in sources() {
        if !pure.contains(&source.module()) && !ALSO_PURE.contains(&source.path.as_str()) {
            continue;
        }
        seen += 1;
        for word in IMPURE.iter().filter(|word| source.code.contains(**word)) {
            wrong.push(format!("{} names {word}", source.path));
        }
    }
    assert!(
        seen >= pure.len() + ALSO_PURE.len(),
        "a pure file was renamed"
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_stands_only_at_the_edge() {
    let mut wrong = Vec::new();
    for source in sources() {
        let code = source.code.replace("unsafe_code", "");
        if code.contains("unsafe") && !UNSAFE.iter().any(|place| source.path.starts_with(place)) {
            wrong.push(source.path);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_file_is_too_long_to_be_read() {
    let mut wrong = Vec::new();
    for source in sources() {
        if source.lines > LINES_MAX {
            wrong.push(format!(
                "{} has {} lines, {LINES_MAX} at most",
                source.path, source.lines
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_map_names_every_file() {
    let map = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let named = |path: &str| map.contains(&format!("`{path}`"));
    let missing: Vec<_> = sources()
        .into_iter()
        .map(|source| source.path)
        .filter(|path| !named(path))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_tests_that_protect_the_rules_exist() {
    let map = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let table = map.split("## What protects the rules").nth(1).unwrap();
    let all: String = ["src", "tests"]
        .iter()
        .flat_map(|directory| rust_files(&root().join(directory)))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    // A name of a test is a sentence.
    let names: Vec<_> = table
        .split('`')
        .filter(|text| text.matches('_').count() >= 3 && !text.contains(['.', '/', ' ']))
        .collect();
    assert!(names.len() > 30);
    let missing: Vec<_> = names
        .into_iter()
        .filter(|name| !all.contains(&format!("fn {name}(")))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Every error code that the source can report: the first literal after the calls that make one, and what
/// a `fn code` returns.
fn codes() -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    for source in sources() {
        let after = |mark: &str, within: usize| -> Vec<String> {
            source
                .code
                .split(mark)
                .skip(1)
                .filter_map(|rest| {
                    let head: String = rest.chars().take(within).collect();
                    let rest = head.trim_start().strip_prefix('"')?.to_owned();
                    Some(rest.split('"').next()?.to_owned())
                })
                .collect()
        };
        for mark in [
            "CommandError::new(",
            "Refusal::new(",
            "refuse(",
            "refuse(connection, ",
            "code: ",
            "&str = ",
        ] {
            // Constants are codes only where they are declared as such.
            if mark != "&str = " || source.path == "control/mod.rs" {
                codes.extend(after(mark, 80));
            }
        }
        for body in source.code.split("fn code(&self)").skip(1) {
            let body = body.split("\n    }\n").next().unwrap_or_default();
            let arms = body.split("=> ").skip(1);
            codes.extend(
                arms.filter_map(|arm| Some(arm.strip_prefix('"')?.split('"').next()?.to_owned())),
            );
        }
    }
    codes.retain(|code| code.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'));
    assert!(codes.len() > 30, "{codes:?}");
    codes
}

#[test]
fn every_error_code_is_explained_and_has_an_exit_code() {
    let manual = fs::read_to_string(root().join("docs/operating.md")).unwrap();
    let unexplained: Vec<_> = codes()
        .into_iter()
        .filter(|code| {
            !manual.contains(&format!("\n| `{code}` |")) || Exit::of_code(code).is_none()
        })
        .collect();
    assert!(
        unexplained.is_empty(),
        "no row in docs/operating.md, or not in Exit::of_code: {unexplained:#?}"
    );
}

#[test]
fn the_manual_explains_no_error_code_that_does_not_exist() {
    let manual = fs::read_to_string(root().join("docs/operating.md")).unwrap();
    let table = manual.split("## Error codes").nth(1).unwrap();
    let table = table.split("\n## ").next().unwrap();
    let codes = codes();
    for row in table.lines().filter_map(|line| line.strip_prefix("| `")) {
        let code = row.split('`').next().unwrap();
        assert!(codes.contains(code), "{code}");
    }
}
