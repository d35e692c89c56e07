//! What `query-migrate` shows of an attempt.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::limits::PAGE_BYTES;
use crate::rates::{Rates, Smoothed, Verdict};
use crate::wire::Algorithm;

use super::{Attempt, IterationRow, State, Status, per_second};

impl Attempt {
    /// The answer of `query-migrate`: QEMU's members and units, and finer ones of our own.
    pub(in crate::sender) fn to_json(&self) -> Value {
        self.shown(&self.lock())
    }

    pub(super) fn shown(&self, state: &State) -> Value {
        let total_time = state.ended.unwrap_or_else(Instant::now) - self.started;
        let transferred = self.sum(|s| s.transferred.get());
        // What this pass has settled so far is no longer to be sent.
        let remaining = match (state.iterations.len(), state.status) {
            (0, Status::Setup | Status::Active | Status::Paused | Status::Recover) => self
                .total_bytes
                .saturating_sub(self.sum(|s| s.settled_bytes.get())),
            _ => state.remaining_bytes,
        };
        let mut shown = json!({
            "id": self.id,
            "status": state.status.as_str(),
            "regions": self.regions,
            "total-time": ms(total_time),
            "ram": {
                "total": self.total_bytes,
                // Estimates of different things add up to more than there is.
                "remaining": remaining.min(self.total_bytes),
                "transferred": transferred,
                "normal": self.sum(|s| s.normal_pages.get()),
                "normal-bytes": self.sum(|s| s.normal_bytes.get()),
                "duplicate": self.sum(|s| s.duplicate_pages.get()),
                "unchanged": self.sum(|s| s.unchanged_pages.get()),
                "mbps": mbps(per_second(transferred, total_time)),
                "dirty-sync-count": state.iterations.len(),
                "dirty-pages-rate": pages_per_second(state.rates.written),
                "page-size": PAGE_BYTES,
                "torn": self.sum(|s| s.torn_pages.get()),
                "dirty-sync-missed-zero-copy": self.sum(|s| s.missed_zero_copy.get()),
            },
            "zero-copy": self.zero_copy(),
            "compression": self.compression(),
            "streams": state.streams_open,
            "recoveries": state.interruptions,
            "iterations": state.iterations.iter().map(row).collect::<Vec<_>>(),
            "parameters": self.parameters.to_json(),
        });
        if let Some(interruption) = &state.interruption {
            shown["interruption"] = interruption.clone();
        }
        if let Some(verdict) = state.rates.verdict() {
            shown["convergence"] = convergence(&state.rates, verdict);
        }
        if state.throttle > 0 {
            shown["cpu-throttle-percentage"] = state.throttle.into();
        }
        if let Some(time) = state.setup_time {
            shown["setup-time"] = ms(time);
        }
        if let Some(downtime) = state.downtime {
            shown["downtime"] = ms(downtime.total);
            shown["downtime-us"] = us(downtime.total);
            shown["downtime-breakdown-us"] = json!({
                "freeze": us(downtime.freeze),
                "scan": us(downtime.scan),
                "send": us(downtime.send),
                "flush": us(downtime.flush),
                "check": us(downtime.check),
                "blob": us(downtime.blob),
                "prepare": us(downtime.prepare),
                "commit": us(downtime.commit),
            });
        } else if let Some(expected) = state.expected_downtime {
            shown["expected-downtime"] = ms(expected);
        }
        if let Some(bytes) = state.blob_bytes {
            shown["blob-size"] = bytes.into();
        }
        if let Some(error) = &state.error {
            shown["error"] = error.clone();
        }
        shown
    }

    fn zero_copy(&self) -> Value {
        let paths: Vec<_> = self.streams.iter().map(|stream| stream.path()).collect();
        // The streams go separate ways only for a moment; the one that fell back is the news.
        let shown = paths
            .iter()
            .find(|path| !path.reason.is_empty())
            .or_else(|| paths.first());
        let mut reasons: Vec<_> = shown.map(|path| path.reason.clone()).into_iter().collect();
        if self.streams.iter().any(|s| s.compression().is_some()) {
            reasons.push("compressed packets are copies, and never lent".to_owned());
        }
        reasons.retain(|reason| !reason.is_empty());
        json!({
            "requested": self.parameters.zero_copy.as_str(),
            "path": shown.map_or("", |path| path.path),
            "sends": self.sum(|s| s.zero_copy_sends.get()),
            "copied": self.sum(|s| s.zero_copy_copied.get()),
            "fallbacks": self.sum(|s| s.fallbacks.get()),
            "reason": reasons.join("; "),
        })
    }

    /// QEMU's members, where it has them, and what they are computed from.
    #[expect(clippy::cast_precision_loss)] // shown to people
    fn compression(&self) -> Value {
        let (from, to) = (
            self.sum(|s| s.compressed_from.get()),
            self.sum(|s| s.compressed_to.get()),
        );
        let mut active = self.streams.iter().filter_map(|s| s.compression());
        json!({
            "requested": self.parameters.compression.as_str(),
            "active": active.next().map_or("off", Algorithm::as_str),
            "pages": self.sum(|s| s.compressed_pages.get()),
            "bytes": from,
            "compressed-size": to,
            "compression-rate": if to == 0 { 0.0 } else { from as f64 / to as f64 },
        })
    }
}

/// Whether more passes leave less; rates in bytes per second. The ratio is missing when nothing is written.
fn convergence(rates: &Rates, verdict: Verdict) -> Value {
    json!({
        "verdict": match verdict {
            Verdict::Converging(_) => "converging",
            Verdict::NotConverging => "not-converging",
        },
        "ratio": rates.ratio().filter(|ratio| ratio.is_finite()),
        "bandwidth": rates.sent.get().map(f64::round),
        "dirty-rate": rates.written.get().map(f64::round),
    })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an estimate, and never negative
fn pages_per_second(rate: Smoothed) -> u64 {
    rate.get().unwrap_or(0.0) as u64 / PAGE_BYTES
}

fn row(row: &IterationRow) -> Value {
    json!({
        "pass": row.pass,
        "bytes": row.payload_bytes,
        "pages": row.pages,
        "left": row.left_pages,
        "torn": row.torn_pages,
        "dirty-bytes": row.dirty_bytes,
        "time-us": us(row.time),
        "flush-us": us(row.flush_time),
    })
}

fn ms(time: Duration) -> Value {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into()
}

fn us(time: Duration) -> Value {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).into()
}

/// Mbit/s, as QEMU has it.
#[expect(clippy::cast_precision_loss)] // shown to people
fn mbps(bytes_per_second: u64) -> f64 {
    bytes_per_second as f64 * 8.0 / 1e6
}
