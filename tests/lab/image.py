"""The guest's first file system: busybox, memferry with its libraries, network modules, `init`."""

import lzma
import re
import shutil
import subprocess
from pathlib import Path

import packages

HERE = Path(__file__).resolve().parent
# In the order in which they have to be loaded; what a kernel has built in is not there as a file.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
)


def build(series, binary, work):
    """Makes the kernel and the initramfs of `series`; their paths."""
    unpacked = packages.kernel(series)
    kernel = next((unpacked / "boot").glob("vmlinuz-*"))
    root = work / "root"
    for directory in ("bin", "dev", "etc", "huge", "lib64", "modules", "proc", "run", "sys", "tmp"):
        (root / directory).mkdir(parents=True)
    shutil.copy(packages.busybox(), root / "bin/busybox")
    shutil.copy(HERE / "init", root / "init")
    install_program(binary, root)
    for number, name in enumerate(MODULES):
        install_module(unpacked, name, root / f"modules/{number}-{name}.ko")
    archive = work / "initramfs.cpio"
    pack(root, archive)
    return kernel, archive


def install_program(binary, root):
    """Copies the program, without what only debuggers need, and the libraries it is linked to."""
    target = root / "bin/memferry"
    shutil.copy(binary, target)
    if shutil.which("strip"):
        packages.check(["strip", str(target)])
    for library in re.findall(r"(/\S+) \(0x", packages.check(["ldd", str(binary)])):
        # Where the loader was told to look for it: the path as it is, links followed.
        copy = root / library.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, copy)


def install_module(unpacked, name, target):
    """Copies a kernel module, decompressed."""
    found = next(unpacked.rglob(f"{name}.ko*"), None)
    if found is None:
        return
    content = found.read_bytes()
    target.write_bytes(lzma.decompress(content) if found.suffix == ".xz" else content)


def pack(root, archive):
    """Writes `root` as the kernel wants it: a cpio archive of the new form."""
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with archive.open("wb") as out:
        subprocess.run(
            [packages.busybox(), "cpio", "-o", "-H", "newc", "-R", "0:0"],
            cwd=root,
            input=names.encode(),
            stdout=out,
            stderr=subprocess.DEVNULL,
            check=True,
        )
