"""A guest under QEMU's software emulation, driven over its serial console."""

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

MEMORY_MIB = 2048
# QEMU 7.2 sometimes spoils the flags when it emulates CMPXCHG16B, which the kernel's allocator uses wherever it is
# there: about one boot of Linux 6.12 in three ended in a panic. Without it none did.
CPU = "max,-cx16"
BOOT_SECONDS = 120
BOOT_ATTEMPTS = 4
MARK = "@lab "


class GuestError(Exception):
    """The guest did not do what it was told; the text has what it said."""


class Guest:
    """Boots with a card on a tap device of this network namespace. A context manager: it ends with the block."""

    def __init__(self, kernel, initramfs, tap, log):
        self.command = [
            # Whatever happens to this process, the emulator does not outlive it.
            *("setpriv", "--pdeathsig", "KILL"),
            *("qemu-system-x86_64", "-name", "lab,debug-threads=on"),
            *("-accel", "tcg", "-cpu", CPU, "-m", str(MEMORY_MIB)),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-kernel", str(kernel), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 quiet oops=panic panic=-1 no_timer_check"),
            *("-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
        ]
        self.log = Path(log).open("ab", buffering=0)
        self.began = time.monotonic()

    def __enter__(self):
        # The emulator now and then gets an instruction wrong while the kernel starts, and that panics.
        for attempt in range(BOOT_ATTEMPTS):
            try:
                self.boot()
                return self
            except GuestError as error:
                self.end()
                print(f"lab: boot {attempt + 1} of {BOOT_ATTEMPTS}: {error}", file=sys.stderr)
            except BaseException:
                self.end()
                raise
        raise GuestError(f"the guest did not come up in {BOOT_ATTEMPTS} attempts")

    def __exit__(self, *_):
        self.end()

    def boot(self):
        """Starts the emulator and waits until the guest takes commands."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines = Lines(self.process.stdout, self.log)
        self.answer("boot", BOOT_SECONDS)

    def end(self):
        """Nothing in the guest is worth an orderly end."""
        self.process.kill()
        self.process.wait()

    def run(self, *words, seconds=60):
        """Has the guest run one of the functions of `init`; what it printed as JSON, a list."""
        self.start(*words)
        return self.answer(words[0], seconds)

    def start(self, *words):
        """Tells the guest to run a function; `answer` has to follow."""
        self.log.write(f"[{time.monotonic() - self.began:.1f} s] {' '.join(words)}\n".encode())
        self.process.stdin.write(" ".join(words).encode() + b"\n")
        self.process.stdin.flush()

    def cpu_ns(self):
        """CPU time that this machine has given to the guest's processor so far."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            if (task / "comm").read_text(encoding="ascii").startswith("CPU 0"):
                return int((task / "schedstat").read_text(encoding="ascii").split()[0])
        raise GuestError("the emulator has no thread for the guest's processor")

    def answer(self, what, seconds=60):
        """What the guest says until it is done."""
        said, rest = [], []
        deadline = time.monotonic() + seconds
        while True:
            line = self.lines.next(deadline)
            if line is None:
                raise GuestError(f"{what}: no answer after {seconds} s")
            if not line.startswith(MARK):
                rest.append(line)
                continue
            word = line.removeprefix(MARK)
            if word == "ended 0":
                return said
            if word.startswith("ended "):
                raise GuestError("\n".join([f"{what}: failed in the guest ({word})", *rest[-20:]]))
            said.append(json.loads(word))


class Lines:
    """Lines from a pipe, with a deadline. What comes is also written to a file."""

    def __init__(self, pipe, log):
        self.fd = pipe.fileno()
        self.log = log
        self.pending = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.fd, selectors.EVENT_READ)

    def next(self, deadline):
        """The next line; `None` if there was none before `deadline`."""
        while b"\n" not in self.pending:
            if not self.selector.select(max(0, deadline - time.monotonic())):
                return None
            chunk = os.read(self.fd, 65536)
            if not chunk:
                raise GuestError("the emulator ended")
            self.log.write(chunk)
            self.pending += chunk
        line, self.pending = self.pending.split(b"\n", 1)
        return line.decode(errors="replace").rstrip("\r")
