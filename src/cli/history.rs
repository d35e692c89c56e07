//! `memferry history`: transfers that have ended.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::args::HistoryArgs;
use super::output::{bytes, line, number, seconds, table, text};
use crate::client::{ClientError, Connection};

pub(super) fn run(socket: &Path, args: &HistoryArgs) -> Result<(), ClientError> {
    let mut connection = Connection::connect(socket)?;
    let answer = connection.execute("query-history", json!({}))?;
    if args.json {
        line(&answer);
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        table(&rows(&answer, now.unwrap_or_default().as_secs_f64()));
    }
    Ok(())
}

/// A heading and one row per transfer; `now` in seconds since 1970.
fn rows(answer: &Value, now: f64) -> Vec<Vec<String>> {
    let heading = [
        "ENDED", "ID", "STATUS", "SIZE", "SENT", "TIME", "DOWNTIME", "ERROR",
    ];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for transfer in answer.as_array().into_iter().flatten() {
        let ago = (now - number(&transfer["ended"])).max(0.0);
        let amount = |value: &Value, show: fn(f64) -> String, unit: f64| match value.as_f64() {
            Some(count) => show(count / unit),
            None => "-".to_owned(),
        };
        rows.push(vec![
            format!("{} ago", seconds(ago)),
            text(&transfer["id"]),
            text(&transfer["status"]),
            amount(&transfer["ram"]["total"], bytes, 1.0),
            amount(&transfer["ram"]["transferred"], bytes, 1.0),
            amount(&transfer["total-time"], seconds, 1e3),
            amount(&transfer["downtime-us"], seconds, 1e6),
            text(&transfer["error"]["x-code"]),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_what_is_known() {
        let done = json!({"id": "a", "status": "completed", "ended": 100, "total-time": 4200,
            "downtime-us": 42_000, "ram": {"total": 1024, "transferred": 2048}});
        let failed = json!({"id": "b", "status": "failed", "ended": 160, "ram": {},
            "error": {"x-code": "timeout"}});
        let rows = rows(&json!([done, failed]), 165.0);
        let want = [
            "1m 05s ago",
            "a",
            "completed",
            "1.0 KiB",
            "2.0 KiB",
            "4.2 s",
            "42 ms",
            "-",
        ];
        assert_eq!(rows[1], want);
        let want = ["5.0 s ago", "b", "failed", "-", "-", "-", "-", "timeout"];
        assert_eq!(rows[2], want);
    }
}
