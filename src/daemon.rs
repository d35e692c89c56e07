//! What both daemons do the same: start, wait for their end, say why they could not.

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, ControlConfig, LogConfig, Warning};
use crate::control::Access;
use crate::sys::sched::{Slice, set_slice};

/// How long threads may go on that a daemon no longer waits for.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// Why a daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Its configuration makes no sense.
    #[error(transparent)]
    Configuration(#[from] ConfigError),
    /// It could not get something it cannot do without.
    #[error("cannot {doing}: {source}")]
    Setup {
        /// What it tried.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl DaemonError {
    /// For `map_err`: what was tried.
    pub fn setup(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Setup { doing, source }
    }
}

/// Starts the log and tells it what the configuration's reader had to remark.
pub fn start_log(path: &Path, config: &LogConfig, warnings: &[Warning]) -> Result<(), ConfigError> {
    crate::log::init(config)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %path.display(), "starting");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Runs the control plane of a daemon on the calling thread. What it left to other threads has a moment to end, and
/// then ends with the process.
pub fn block_on<T>(future: impl Future<Output = Result<T, DaemonError>>) -> Result<T, DaemonError> {
    // Clients wait for it, and a writer that stands still; streams, which run for long, leave it again.
    let _ = set_slice(Slice::Short);
    let runtime = event_loop().map_err(DaemonError::setup("start the event loop"))?;
    let ended = runtime.block_on(future);
    runtime.shutdown_timeout(STOP_WAIT);
    ended
}

/// Starts a second event loop, on a thread of that name, which ends when `until` is cancelled. What is spawned
/// there does not wait for what the first one does.
pub fn start_event_loop(name: &str, until: CancellationToken) -> io::Result<Handle> {
    let runtime = event_loop()?;
    let handle = runtime.handle().clone();
    let run = move || {
        let _ = set_slice(Slice::Short);
        runtime.block_on(until.cancelled());
        runtime.shutdown_timeout(STOP_WAIT);
    };
    thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(handle)
}

fn event_loop() -> io::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build()
}

/// Drops `what` on a thread where that may take a while, and waits for it: giving memory back takes tens
/// of milliseconds per GiB of small pages, and clients are waiting for answers meanwhile.
pub async fn let_go_of<T: Send + 'static>(what: T) {
    // A panic in a destructor was reported where it happened.
    let _ = tokio::task::spawn_blocking(move || drop(what)).await;
}

/// Who may use the control socket.
#[must_use]
pub fn access(config: &ControlConfig) -> Access {
    Access {
        uids: config.allow_uids.clone(),
        gids: config.allow_gids.clone(),
    }
}

/// Cancels `shutdown` at SIGTERM or SIGINT.
pub fn stop_on_signals(shutdown: CancellationToken) -> Result<(), DaemonError> {
    let install = |kind| signal(kind).map_err(DaemonError::setup("listen for signals"));
    let (mut terminate, mut interrupt) = (
        install(SignalKind::terminate())?,
        install(SignalKind::interrupt())?,
    );
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        shutdown.cancel();
    });
    Ok(())
}
