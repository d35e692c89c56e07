//! How long a busy sender takes to answer: many clients that ask at a steady rate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{ClientError, Connection};

const POLL_EVERY: Duration = Duration::from_millis(100);

/// Asks `query-migrate` over every connection ten times a second until `stop`; gives how long each answer
/// took. The clients are spread over the interval, as clients are.
pub(super) fn poll(
    connections: Vec<Connection>,
    stop: &AtomicBool,
) -> Result<Vec<Duration>, ClientError> {
    let count = u32::try_from(connections.len()).unwrap_or(u32::MAX);
    let begin = Instant::now();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..count)
            .zip(connections)
            .map(|(index, mut connection)| {
                let mut due = begin + POLL_EVERY * index / count;
                scope.spawn(move || {
                    let mut answers = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let asked = Instant::now();
                        connection.execute("query-migrate", json!({}))?;
                        answers.push(asked.elapsed());
                        due = (due + POLL_EVERY).max(asked);
                    }
                    Ok(answers)
                })
            })
            .collect();
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.join().unwrap_or_else(|_| Ok(Vec::new()))?);
        }
        Ok(all)
    })
}
