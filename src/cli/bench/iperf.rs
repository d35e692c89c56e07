//! iperf3 over loopback, where it is installed: a figure that many people know.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::stage::{Stage, StageError, local};

const PROGRAM: &str = "iperf3";
const SECONDS: &str = "2";
/// How long the server may take to listen.
const DEADLINE: Duration = Duration::from_secs(10);

/// GiB/s with two streams; `None` if it is not installed.
pub(super) fn run(stage: &Stage<'_>) -> Result<Option<f64>, StageError> {
    // Nobody else gets the port within a moment: the kernel hands them out in turn.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map_err(local("find a free port"))?
        .port()
        .to_string();
    let mut server = stage.command(PROGRAM, PROGRAM.as_ref())?;
    server.args([
        "--server",
        "--one-off",
        "--bind",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    let Ok(_server) = Stage::spawn(PROGRAM, server) else {
        return Ok(None);
    };
    let started = Instant::now();
    loop {
        stage.check_interrupted()?;
        let client = Command::new(PROGRAM)
            .args(["--client", "127.0.0.1", "--port", &port, "--json"])
            .args(["--parallel", "2", "--time", SECONDS])
            .stdin(Stdio::null())
            .output()
            .map_err(local("run iperf3"))?;
        let shown: Value = serde_json::from_slice(&client.stdout).unwrap_or_default();
        if let Some(bits) = shown["end"]["sum_received"]["bits_per_second"].as_f64() {
            return Ok(Some(bits / 8.0 / f64::from(1 << 30)));
        }
        // The server does not listen yet.
        if started.elapsed() > DEADLINE {
            let text = shown["error"].as_str().unwrap_or("no answer").to_owned();
            return Err(local("run iperf3")(std::io::Error::other(text)));
        }
    }
}
