"""Debian packages, unpacked and not installed, kept in a cache outside of the tree.

Neither the machine's package lists nor its sources are touched: apt runs on lists of its own, one per
suite, against the mirror that the machine uses already.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

# Kernel series, and the Debian suite that has it.
SUITES = {"6.1": "bookworm", "6.12": "bookworm-backports"}
BASE_SUITE = "bookworm"
APT_SECONDS = 300


class Missing(Exception):
    """Something that this machine does not have; the text says what to do."""


def cache():
    """Where everything that is made or downloaded stays between runs; as for tests/systemd."""
    return Path(os.environ.get("MEMFERRY_LAB", "/var/tmp/memferry-lab")) / "guest"


def require_commands():
    """All commands that the lab runs, checked before anything is downloaded."""
    needed = {
        "apt-get": "apt, on Debian 12 (amd64)",
        "dpkg": "apt, on Debian 12 (amd64)",
        "ip": "iproute2",
        "ldd": "libc-bin",
        "qemu-system-x86_64": "qemu-system-x86",
        "setpriv": "util-linux",
        "unshare": "util-linux",
    }
    missing = {package for command, package in needed.items() if not shutil.which(command)}
    if missing:
        raise Missing(f"install {', '.join(sorted(missing))}: apt-get install --no-install-recommends")
    if os.geteuid() != 0:
        raise Missing("needs root: it makes a network namespace with a tap device")
    if not Path("/dev/net/tun").exists():
        raise Missing("/dev/net/tun is not there: the kernel needs CONFIG_TUN")


def busybox():
    """A statically linked busybox."""
    return unpacked(BASE_SUITE, "busybox-static") / "bin/busybox"


def kernel(series):
    """The directory of an unpacked kernel package: boot/vmlinuz-* and lib/modules/*."""
    return unpacked(SUITES[series], "linux-image-cloud-amd64", dependency=r"linux-image-[0-9].*")


def unpacked(suite, package, dependency=None):
    """The contents of `package`, or of the one that it depends on and whose name matches `dependency`."""
    target = cache() / suite / package
    if target.is_dir():
        return target
    apt = Apt(suite)
    if dependency:
        package = apt.dependency(package, dependency)
    new = target.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    deb = apt.download(package, new)
    check(["dpkg", "-x", str(deb), str(new)])
    deb.unlink()
    new.rename(target)
    return target


class Apt:
    """apt on lists of its own, with one suite in them."""

    def __init__(self, suite):
        self.suite = suite
        state = cache() / "apt" / suite
        for directory in ("lists/partial", "archives/partial"):
            (state / directory).mkdir(parents=True, exist_ok=True)
        source = state / "sources.list"
        source.write_text(f"deb {mirror()} {suite} main\n", encoding="utf-8")
        # Nothing counts as installed: the candidate is what the suite has.
        (state / "status").touch()
        settings = {
            "APT::Sandbox::User": "root",
            "Dir::Cache": state,
            "Dir::Etc::SourceList": source,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": state,
            "Dir::State::status": state / "status",
        }
        self.options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        self.run("apt-get", "update", "-qq")

    def run(self, command, *words, cwd=None):
        """The output of an apt command; `Missing` if it fails."""
        try:
            return check([command, *self.options, *words], cwd=cwd)
        except Missing as error:
            raise Missing(f"{error}\nnothing was had from the suite {self.suite}: is the mirror reachable?") from None

    def dependency(self, package, pattern):
        """The name of what `package` depends on: a meta package names the newest kernel."""
        listed = self.run("apt-cache", "depends", "--important", package)
        found = re.search(rf"Depends: ({pattern})$", listed, re.MULTILINE)
        if not found:
            raise Missing(f"{package} of {self.suite} depends on nothing like {pattern}")
        return found[1]

    def download(self, package, directory):
        """The package's file, in `directory`."""
        self.run("apt-get", "download", "-qq", package, cwd=directory)
        return next(directory.glob("*.deb"))


def mirror():
    """The mirror of Debian that this machine is set up with."""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    for line in check(["apt-get", "indextargets", "--format", form]).splitlines():
        uri, *rest = line.split()
        if rest == [BASE_SUITE, "main"]:
            return uri
    raise Missing(f"no apt source of this machine has Debian {BASE_SUITE} main, where the kernels come from")


def check(words, cwd=None):
    """Runs a command to its end and returns its output; `Missing` if it fails."""
    try:
        ended = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=APT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Missing(f"{' '.join(words)}: not done after {APT_SECONDS} s") from None
    if ended.returncode != 0:
        raise Missing(f"{' '.join(words)}: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout
