"""What was measured, as a table, and whether it is what zero copy promises."""

import statistics

GIB = 1 << 30
# Most CPU time of the sender, as a share of that of plain sends out of the same kind of memory.
COST_MAX = {
    ("msg-zerocopy", "4 KiB"): 1 / 6,
    ("io-uring", "4 KiB"): 1 / 6,
    ("io-uring-fixed", "4 KiB"): 1 / 6,
    ("io-uring-fixed", "huge"): 1 / 20,
}
# Memory that may not be opened for writing, and so cannot be registered.
NO_PIN = "no pin"
# Little memory: what moving it costs is what any transfer costs once.
PIECE, PIECE_MIB = "piece", 8
COLUMNS = (
    ("engine", 14),
    ("active path", 14),
    ("pages", 6),
    ("checksums", 9),
    ("copied", 7),
    ("sender s/GiB", 12),
    ("of plain", 8),
    ("guest s/GiB", 11),
    ("MiB/s", 5),
    ("flush ms", 8),
    ("identical", 9),
)


def summarize(rows):
    """One row per case: medians over the turns, and what has to hold each time for all of them."""
    cases = {}
    for row in rows:
        cases.setdefault((row["engine"], row["pages"], row["integrity"]), []).append(row)
    summary = [summary_of(turns) for turns in cases.values()]
    plain = {(row["pages"], row["integrity"]): row for row in summary if row["engine"] == "off"}
    for row in summary:
        # A live transfer has nothing to be compared with.
        reference = None if row["tracker"] else plain.get((row["pages"], row["integrity"]))
        row["of-plain"] = reference and row["sender-s-per-gib"] / reference["sender-s-per-gib"]
    return summary


def summary_of(turns):
    def median(key, scale):
        return statistics.median(row[key] * scale / row["bytes"] for row in turns)

    first = turns[0]
    return {
        **{key: first[key] for key in ("engine", "pages", "integrity", "passes", "zero-copy")},
        "tracker": first.get("tracker"),
        "downtime-us": max(row["downtime-us"] for row in turns),
        "processor-share": min(row["processor-share"] for row in turns),
        "sends": sum(row["zero-copy"]["sends"] for row in turns),
        "copied": sum(row["zero-copy"]["copied"] for row in turns),
        "sender-s": statistics.median(row["sender-us"] for row in turns) / 1e6,
        "added-s-per-gib": statistics.median(row.get("added-us", 0) * GIB / 1e6 / row["bytes"] for row in turns),
        "sender-s-per-gib": median("sender-us", GIB / 1e6),
        "guest-s-per-gib": median("guest-us", GIB / 1e6),
        "mib-per-s": 1 / median("total-us", (1 << 20) / 1e6),
        "flush-us": statistics.median(row["flush-us"] for row in turns),
        "identical": all(row["identical"] for row in turns),
    }


def missed(summary, costs):
    """What does not hold, in words. Without `costs` only what holds in the shortest run."""
    found = []
    for row in summary:
        name = f"{row['engine']}, {row['pages']} pages, integrity {row['integrity']}"
        if not row["identical"]:
            found.append(f"{name}: the destination is not the source")
        if row["copied"] > 0:
            found.append(f"{name}: {row['copied']} of {row['sends']} sends were copied")
        active = row["zero-copy"]["path"]
        if row["engine"] not in ("off", "auto") and row["sends"] == 0:
            found.append(f"{name}: nothing was lent ({active}: {row['zero-copy']['reason']})")
        if row["engine"] not in ("off", "auto") and active != row["engine"]:
            found.append(f"{name}: went by {active} ({row['zero-copy']['reason']})")
        unregistered = "unregistered" in row["zero-copy"]["reason"]
        if row["engine"] == "io-uring-fixed" and unregistered != (row["pages"] == NO_PIN):
            found.append(f"{name}: registered or not, against what is expected ({row['zero-copy']['reason']})")
        most = COST_MAX.get((row["engine"], row["pages"]))
        if not costs or most is None or row["integrity"] != "off":
            continue
        if row["of-plain"] > most:
            found.append(f"{name}: the sender took {row['of-plain']:.3f} of plain sends, more than {most:.3f}")
    return found


def table(summary):
    """The rows as text."""
    lines = ["  ".join(title.ljust(width) for title, width in COLUMNS)]
    for row in summary:
        if row["pages"] == PIECE:
            continue
        cells = (
            row["engine"],
            row["zero-copy"]["path"],
            row["pages"],
            row["integrity"],
            f"{row['copied']}/{row['sends']}",
            f"{row['sender-s-per-gib']:.2f}",
            "" if row["of-plain"] is None else f"{row['of-plain']:.3f}",
            f"{row['guest-s-per-gib']:.2f}",
            f"{row['mib-per-s']:.0f}",
            f"{row['flush-us'] / 1000:.1f}",
            "yes" if row["identical"] else "NO",
        )
        lines.append("  ".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS)).rstrip())
    lines += notes(summary)
    return "\n".join(lines)


def notes(summary):
    """What the columns have no room for."""
    reasons = {
        f"asked for {row['engine']}, went by {row['zero-copy']['path']}: {row['zero-copy']['reason']}"
        for row in summary
        if row["zero-copy"]["reason"]
    }
    lines = sorted(reasons)
    for row in summary:
        if row["tracker"]:
            lines.append(
                f"{row['engine']} is a live transfer: tracker {row['tracker']['kind']}, {row['passes']} passes, "
                f"downtime {row['downtime-us'] / 1000:.1f} ms"
            )
    for row in summary:
        if row["pages"] == PIECE:
            lines.append(f"moving {PIECE_MIB} MiB takes the sender {row['sender-s']:.2f} s: that much of every row is spent once")
    for pages in ("4 KiB", "huge"):
        added = statistics.median(row["added-s-per-gib"] for row in summary if row["pages"] == pages and not row["tracker"])
        lines.append(f"adding memory took it {added:.2f} s/GiB for {pages} pages: its page tables; in no row")
    share = min(row["processor-share"] for row in summary)
    lines.append(f"the emulator had at least {share:.0%} of a processor whenever the guest wanted it")
    return lines
