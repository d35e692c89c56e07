#!/usr/bin/python3 -B
"""Puts figures of `memferry bench --json` into docs/performance.md.

    memferry bench --json --svg docs/performance.svg > small.json
    docs/performance.py small=small.json huge=huge.json

Each NAME=FILE replaces what stands between `<!-- bench NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().with_suffix(".md")


def main():
    text = PAGE.read_text()
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        bench = json.loads(Path(path).read_text())
        pattern = re.compile(rf"(<!-- bench {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda marks: marks[1] + section(bench) + marks[2], text)
        if found != 1:
            sys.exit(f"{PAGE} has no one section called {name}")
    PAGE.write_text(text)


def section(bench):
    machine = bench["machine"]
    lines = [
        "",
        f"memferry {machine['version']}, {machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, load "
        f"{machine['load']} when it began; {machine['size']} in `{machine['directory']}` ({machine['pages']} pages); "
        f"QEMU {machine['qemu'] or 'not installed'}.",
        "",
        "| figure | what | target | median | interval | runs | | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in bench["rows"]:
        value = row.get("value")
        measured = ["", "", ""]
        if value:
            measured = [amount(value["median"]), f"{amount(value['low'])}–{amount(value['high'])}", str(value["runs"])]
        note = row.get("elsewhere") or row["note"]
        lines.append(cells(f"`{row['name']}`", row["what"], row["target-text"], *measured, row["judged"], note))
    lines += [
        "",
        "| comparison | ours, GiB/s | other | ours, CPU s/GiB sender + receiver | other |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in bench["rows"]:
        if "ours" in row:
            speed = [amount(row[side]["gib-per-second"]) for side in ("ours", "other")]
            cost = [
                f"{row[side]['sender-cpu-seconds-per-gib']:.2f} + {row[side]['receiver-cpu-seconds-per-gib']:.2f}"
                for side in ("ours", "other")
            ]
            lines.append(cells(f"`{row['name']}`", *speed, *cost))
    for row in bench["rows"]:
        points = row.get("points", [])
        if points:
            counts = [str(point["count"]) for point in points]
            lines += ["", cells(f"`{row['name']}`", *counts), cells(*["---"] * (len(counts) + 1))]
            lines.append(cells("GiB/s", *[amount(point["gib-per-second"]) for point in points]))
            lines.append(cells("of the best", *[amount(point["relative"]["median"]) for point in points]))
    return "\n".join([*lines, "", ""])


def cells(*texts):
    return f"| {' | '.join(texts)} |"


def amount(value):
    """Three digits that count."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
