"""What is outside of the guest: the tap device, and a receiver with memory of its own to receive into."""

import hashlib
import subprocess
import time
import urllib.request

from guest import GuestError

TAP = "tap0"
# From a block that is set aside for documentation: in this namespace there is nothing else.
OUTSIDE, INSIDE = "192.0.2.1", "192.0.2.2"
START_SECONDS = 30
FETCH_SECONDS = 60

NETWORK = f"""
ip link set lo up
ip tuntap add dev {TAP} mode tap vnet_hdr
ip addr add {OUTSIDE}/24 dev {TAP}
ip link set {TAP} up
"""

CONFIG = """
[control]
socket = "{work}/receiver.sock"
[receive]
listen = ["tcp:{address}:4440"]
directory = "{work}/received"
insecure-plaintext = true
[state]
runtime-directory = "{work}/run"
[log]
filter = "warn"
"""


class Receiver:
    """A context manager. Expects to be in network and mount namespaces of its own, and leaves both as they are."""

    def __init__(self, binary, work):
        self.binary = binary
        self.work = work
        self.directory = work / "received"

    def __enter__(self):
        # Without vnet_hdr the card in the guest cannot gather from several places, and its kernel copies.
        for words in NETWORK.strip().splitlines():
            subprocess.run(words.split(), check=True)
        self.directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=advise,mode=0700", "tmpfs", self.directory], check=True)
        (self.work / "run").mkdir(mode=0o700)
        config = self.work / "receiver.toml"
        config.write_text(CONFIG.format(work=self.work, address=OUTSIDE), encoding="utf-8")
        log = self.work / "receiver.log"
        with log.open("wb") as out:
            command = ["setpriv", "--pdeathsig", "KILL", self.binary, "receiver", "--config", config]
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + START_SECONDS
        while not (self.work / "receiver.sock").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise GuestError(f"the receiver did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def digest(self, name):
        """The checksum of a Region that has arrived; it then makes room for the next."""
        path = self.directory / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path.unlink()
        return digest


def source_digest(path):
    """The checksum of a file in the guest, fetched by its web server."""
    with urllib.request.urlopen(f"http://{INSIDE}{path}", timeout=FETCH_SECONDS) as answer:
        return hashlib.file_digest(answer, "sha256").hexdigest()
