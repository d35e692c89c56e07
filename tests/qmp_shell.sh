#!/bin/bash
# qmp-shell, the client that QEMU's developers publish, against a real sender: it connects, completes
# the names of our commands, and runs one. Ends with PASS, or with what went wrong and exit code 1.
#
#   tests/qmp_shell.sh [path to the memferry binary]
#
# Needs Python 3 with venv, and a Python package index the first time. Set MEMFERRY_QMP_VENV to a
# directory to keep what is installed between runs.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
binary=$(realpath "${1:-$top/target/release/memferry}")

say() { printf '%s\n' "$*" >&2; }
die() {
    say "FAIL: $*"
    exit 1
}
[ -x "$binary" ] || die "$binary is not there: cargo build --release, or name another binary"

work=$(mktemp -d)
sender=
clean_up() {
    if [ -n "$sender" ]; then
        kill "$sender" 2>/dev/null || true
        wait "$sender" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT

venv=${MEMFERRY_QMP_VENV:-$work/venv}
if [ ! -x "$venv/bin/qmp-shell" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check qemu.qmp==0.0.6
fi

cat >"$work/sender.toml" <<TOML
[control]
socket = "$work/sender.sock"
[state]
directory = "$work"
runtime-directory = "$work/journal"
TOML
"$binary" sender --config "$work/sender.toml" 2>"$work/sender.log" &
sender=$!
for _ in $(seq 200); do
    [ -S "$work/sender.sock" ] && break
    kill -0 "$sender" 2>/dev/null || die "the sender did not start: $(cat "$work/sender.log")"
    sleep 0.05
done

# HOME: the shell keeps a history there. Its standard input is a pipe, so it reads line by line.
say "qmp-shell runs query-migrate"
shell() { HOME=$work timeout 30 "$venv/bin/qmp-shell" "$@" "$work/sender.sock"; }
answer=$(printf 'query-migrate\nquery-status\n' | shell) || die "qmp-shell ended with $?: $answer"
grep -q 'Connected' <<<"$answer" || die "it did not connect: $answer"
grep -qF '{"return": {}}' <<<"$answer" || die "query-migrate was not answered: $answer"
grep -qF '"running"' <<<"$answer" || die "query-status was not answered: $answer"

say "qmp-shell completes our commands"
HOME=$work timeout 30 "$venv/bin/python" - "$work/sender.sock" <<'PYTHON' || die "completion"
import sys

from qemu.qmp.qmp_shell import QMPShell

shell = QMPShell(sys.argv[1])
shell.connect(negotiate=True)
# What the Tab key makes of a beginning.
wanted = {
    "query-mi": "query-migrate",
    "migrate_": "migrate_cancel",
    "region-a": "region-add",
    "qui": "quit",
}
found = {begun: shell._completer.complete(begun, 0) for begun in wanted}
shell.close()
if found != wanted:
    sys.exit(f"completed as {found}, not {wanted}")
PYTHON

printf 'PASS\n'
