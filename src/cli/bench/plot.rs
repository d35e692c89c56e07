//! The figures as an image: how far each is from its target, what the sides of comparisons cost, and how
//! throughput grows. Pure text.

use std::fmt::Write;

use serde_json::Value;

use super::report::{Point, Row, Side, amount};
use super::statistics::{Estimate, Verdict};

const WIDTH: f64 = 960.0;
const ROW: f64 = 22.0;
const BAR_ROW: f64 = 32.0;
/// Where the middle column begins and ends; names stand left of it, values right.
const LEFT: f64 = 210.0;
const RIGHT: f64 = 640.0;
/// The targets panel goes from an eighth of what is asked to eight times that.
const DOUBLINGS: f64 = 3.0;

const INK: &str = "#24292f";
const FAINT: &str = "#6e7781";
const GRID: &str = "#d8dee4";
const SENDER: &str = "#0969da";
const RECEIVER: &str = "#9ec9f5";
const SENDER_OTHER: &str = "#57606a";
const RECEIVER_OTHER: &str = "#c4cad1";

/// The whole image.
pub(super) fn draw(machine: &Value, rows: &[Row]) -> String {
    let mut page = Page::default();
    page.heading("memferry bench");
    let shown = |name: &str| crate::cli::output::text(&machine[name]);
    page.text(
        16.0,
        page.y - 6.0,
        "start",
        12.0,
        FAINT,
        &format!(
            "{}, {} CPUs, Linux {}, load {}; {} in {} ({} pages); QEMU {}",
            shown("cpu"),
            shown("cpus"),
            shown("kernel"),
            shown("load"),
            shown("size"),
            shown("directory"),
            shown("pages"),
            shown("qemu"),
        ),
    );
    page.y += 18.0;
    page.targets(rows);
    page.costs(rows);
    page.growth(rows);
    page.end()
}

#[derive(Debug, Default)]
struct Page {
    body: String,
    /// Where the next thing begins.
    y: f64,
}

impl Page {
    fn end(self) -> String {
        let height = self.y + 12.0;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: f64, fill: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        // Writing to a string does not fail.
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" fill=\"{fill}\">{text}</text>"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, stroke: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\" stroke-width=\"{width}\"/>"
        );
    }

    fn dot(&mut self, x: f64, y: f64, fill: &str) {
        let _ = writeln!(
            self.body,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{fill}\"/>"
        );
    }

    fn bar(&mut self, x: f64, y: f64, width: f64, fill: &str) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"9\" fill=\"{fill}\"/>"
        );
    }

    fn heading(&mut self, text: &str) {
        self.y += 34.0;
        self.text(16.0, self.y, "start", 16.0, INK, text);
        self.y += 26.0;
    }

    /// Medians and intervals on a scale where 1 is what is asked and right is better.
    fn targets(&mut self, rows: &[Row]) {
        let judged: Vec<_> = rows
            .iter()
            .filter_map(|row| Some((row, row.figure.target?, row.value()?)))
            .collect();
        if judged.is_empty() {
            return;
        }
        self.heading("Beside the targets (right of the line is better than asked)");
        let (top, middle) = (self.y, f64::midpoint(LEFT, RIGHT));
        let bottom = top + ROW * count(judged.len());
        for doubling in -3..=3 {
            let doubling = f64::from(doubling);
            let x = middle + doubling / DOUBLINGS * (RIGHT - middle);
            let (width, stroke) = if doubling == 0.0 {
                (1.5, INK)
            } else {
                (1.0, GRID)
            };
            self.line((x, top), (x, bottom), width, stroke);
            let label = match doubling {
                0.0 => "target".to_owned(),
                d if d < 0.0 => format!("1/{}", (-d).exp2()),
                d => format!("{} ×", d.exp2()),
            };
            self.text(x, bottom + 16.0, "middle", 11.0, FAINT, &label);
        }
        for (row, target, value) in judged {
            let y = self.y + ROW / 2.0;
            let at = |value: f64| {
                let doublings = target.margin(value).log2().clamp(-DOUBLINGS, DOUBLINGS);
                middle + doublings / DOUBLINGS * (RIGHT - middle)
            };
            let colour = match row.verdict() {
                Some(Verdict::Hit) => "#1a7f37",
                Some(Verdict::Missed) => "#cf222e",
                Some(Verdict::Open) | None => "#9a6700",
            };
            self.name(row, y);
            self.line((at(value.low), y), (at(value.high), y), 3.0, colour);
            self.dot(at(value.median), y, colour);
            if target.margin(value.median).log2() > DOUBLINGS {
                // Better than the scale shows.
                self.text(RIGHT + 4.0, y + 4.0, "start", 12.0, colour, "›");
            }
            let Estimate {
                median, low, high, ..
            } = value;
            let range = format!("{} ({}..{})", amount(median), amount(low), amount(high));
            self.text(RIGHT + 16.0, y + 4.0, "start", 12.0, INK, &range);
            let verdict = row.verdict().map_or("", Verdict::as_str);
            let asked = row.asked();
            self.text(RIGHT + 190.0, y + 4.0, "start", 12.0, FAINT, &asked);
            self.text(WIDTH - 16.0, y + 4.0, "end", 12.0, colour, verdict);
            self.y += ROW;
        }
        self.y = bottom + 22.0;
    }

    /// CPU time per GiB of both sides of each comparison.
    fn costs(&mut self, rows: &[Row]) {
        let compared: Vec<_> = rows
            .iter()
            .filter_map(|row| Some((row, row.measured.sides?)))
            .collect();
        let most = compared
            .iter()
            .flat_map(|(_, sides)| sides)
            .map(|side| side.sender_cpu + side.receiver_cpu)
            .fold(0.0, f64::max);
        if most <= 0.0 {
            return;
        }
        self.heading(
            "What a GiB costs: CPU seconds of sender and receiver, ours above the other side's",
        );
        for (row, [ours, other]) in compared {
            let y = self.y + BAR_ROW / 2.0;
            self.name(row, y);
            self.cost(y - 10.0, most, ours, [SENDER, RECEIVER]);
            self.cost(y + 1.0, most, other, [SENDER_OTHER, RECEIVER_OTHER]);
            self.y += BAR_ROW;
        }
        let keys = [
            (SENDER, "sender, ours"),
            (RECEIVER, "receiver, ours"),
            (SENDER_OTHER, "sender, other"),
            (RECEIVER_OTHER, "receiver, other"),
        ];
        let y = self.y + 10.0;
        let mut x = LEFT;
        for (colour, text) in keys {
            self.bar(x, y, 12.0, colour);
            self.text(x + 17.0, y + 9.0, "start", 11.0, FAINT, text);
            x += 125.0;
        }
        self.y += 24.0;
    }

    fn cost(&mut self, y: f64, most: f64, side: Side, colours: [&str; 2]) {
        let width = |seconds: f64| seconds / most * (RIGHT - LEFT);
        let (sender, receiver) = (width(side.sender_cpu), width(side.receiver_cpu));
        self.bar(LEFT, y, sender, colours[0]);
        self.bar(LEFT + sender, y, receiver, colours[1]);
        let text = format!(
            "{:.2} + {:.2} s/GiB at {} GiB/s",
            side.sender_cpu,
            side.receiver_cpu,
            amount(side.gib_per_second)
        );
        self.text(RIGHT + 16.0, y + 8.0, "start", 10.0, INK, &text);
    }

    /// A small chart for each row with counts.
    fn growth(&mut self, rows: &[Row]) {
        const GAP: f64 = 40.0;
        const HEIGHT: f64 = 150.0;
        let grown: Vec<_> = rows
            .iter()
            .filter(|row| !row.measured.points.is_empty())
            .collect();
        if grown.is_empty() {
            return;
        }
        self.heading(
            "Growth: throughput as a share of the best, by how many there are (0.8 is asked)",
        );
        let (top, width) = (self.y + 4.0, (WIDTH - 60.0 - 2.0 * GAP) / 3.0);
        for (index, row) in (0..).zip(grown) {
            let left = 44.0 + f64::from(index) * (width + GAP);
            for tenths in [0, 2, 4, 6, 8, 10] {
                let y = top + HEIGHT * (1.0 - f64::from(tenths) / 10.0);
                let asked = tenths == 8;
                let stroke = if asked { INK } else { GRID };
                self.line((left, y), (left + width, y), 1.0, stroke);
                let label = format!("{:.1}", f64::from(tenths) / 10.0);
                self.text(left - 6.0, y + 4.0, "end", 10.0, FAINT, &label);
            }
            self.curve(&row.measured.points, left, width, top, HEIGHT);
            let x = left + width / 2.0;
            self.text(x, top + HEIGHT + 34.0, "middle", 12.0, INK, row.figure.name);
        }
        self.y = top + HEIGHT + 40.0;
    }

    fn curve(&mut self, points: &[Point], left: f64, width: f64, top: f64, height: f64) {
        let most = points.iter().map(|point| point.count).max().unwrap_or(1);
        let places: Vec<_> = points
            .iter()
            .map(|point| {
                let across = f64::from(point.count).log2() / f64::from(most.max(2)).log2();
                let y = |share: f64| top + height * (1.0 - share.clamp(0.0, 1.05));
                (left + across * width, y)
            })
            .collect();
        for (pair, two) in places.windows(2).zip(points.windows(2)) {
            let [(x1, y1), (x2, y2)] = [pair[0], pair[1]];
            let from = (x1, y1(two[0].relative.median));
            let to = (x2, y2(two[1].relative.median));
            self.line(from, to, 1.5, SENDER);
        }
        for ((x, y), point) in places.into_iter().zip(points) {
            let share = point.relative;
            self.line((x, y(share.low)), (x, y(share.high)), 1.0, SENDER);
            self.dot(x, y(share.median), SENDER);
            let count = point.count.to_string();
            self.text(x, top + height + 16.0, "middle", 10.0, FAINT, &count);
        }
    }

    fn name(&mut self, row: &Row, y: f64) {
        self.text(LEFT - 12.0, y + 4.0, "end", 12.0, INK, row.figure.name);
    }
}

fn count(rows: usize) -> f64 {
    f64::from(u16::try_from(rows).unwrap_or(u16::MAX))
}
