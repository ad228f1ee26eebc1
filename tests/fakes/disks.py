"""File systems that are full, read-only, over their quota or dead, and mended again: real ones, mounted by root.

| disk | what goes wrong | how |
| --- | --- | --- |
| `tmpfs` | ENOSPC | it has two megabytes |
| `tmpfs` | EROFS, and well again | remounted, where nothing is open for writing |
| `ext4` | EROFS for good | its own answer to an error, `errors=remount-ro`; the kernel lets one be reported through sysfs |
| `ext4` | EIO for good | shut down by its own ioctl, as when the device is gone |
| `btrfs` | EDQUOT | a subvolume with a limit; ext4's and tmpfs's quotas need kernel options that are often left out, and exempt root |
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM_BYTES = 2 * 2**20
_EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
_GOING_FLAGS_NOLOGFLUSH = 2


class Disk:
    """A mounted file system. `node` is a directory on it."""

    def __init__(self, place: Path) -> None:
        self.place = place / "disk"
        self.place.mkdir()
        self.image = place / "image"

    @property
    def node(self) -> Path:
        return self.place / "node"

    def fill(self) -> None:
        """Leave no room for a byte. A page that no longer fits is refused whole, though blocks smaller than a page may be left: those come last."""
        with (self.place / "ballast").open("wb", buffering=0) as ballast:
            for size in (4096, 1024):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(os.urandom(size))  # which no file system compresses

    def empty(self) -> None:
        (self.place / "ballast").unlink()

    def turn_read_only(self) -> None:
        for _ in range(100):  # busy while a probe of the stager is open for writing
            if subprocess.run(["mount", "-o", "remount,ro", str(self.place)], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.02)
        pytest.skip("the kernel keeps the tmpfs busy: it cannot be made read-only now")

    def mend(self) -> None:
        run("mount", "-o", "remount,rw", str(self.place))


class Ext4(Disk):
    def make(self) -> None:
        with self.image.open("wb") as image:
            image.truncate(32 * 2**20)
        run("mkfs.ext4", "-q", "-F", str(self.image))
        self._mount()

    def _mount(self) -> None:
        mount("-o", "loop,errors=remount-ro", str(self.image), str(self.place))

    def turn_read_only(self) -> None:
        device = run("findmnt", "-no", "SOURCE", str(self.place)).strip()
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("x")

    def die(self) -> None:
        """From now on everything is EIO."""
        directory = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, _EXT4_IOC_SHUTDOWN, struct.pack("I", _GOING_FLAGS_NOLOGFLUSH))
        finally:
            os.close(directory)

    def mend(self) -> None:
        """Another device in its place, with what this one had kept. Who has files open here keeps the dead one."""
        run("umount", "-l", str(self.place))
        copy = self.image.with_suffix(".copy")
        shutil.copy(self.image, copy)
        self.image = copy
        self._mount()


class Btrfs(Disk):
    def make(self) -> None:
        with self.image.open("wb") as image:
            image.truncate(120 * 2**20)
        run("mkfs.btrfs", "-q", str(self.image))
        mount("-o", "loop", str(self.image), str(self.place))
        run("btrfs", "subvolume", "create", str(self.place / "limited"))
        run("btrfs", "quota", "enable", str(self.place))
        run("btrfs", "qgroup", "limit", str(ROOM_BYTES), str(self.place / "limited"))
        self.place /= "limited"


@contextlib.contextmanager
def tmpfs(place: Path, options: str = f"size={ROOM_BYTES}") -> Iterator[Disk]:
    disk = Disk(place)
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(disk.place))
    with _unmounted(disk.place):
        yield disk


@contextlib.contextmanager
def ext4(place: Path) -> Iterator[Ext4]:
    disk = Ext4(place)
    disk.make()
    with _unmounted(disk.place):
        yield disk


@contextlib.contextmanager
def btrfs(place: Path) -> Iterator[Disk]:
    disk = Btrfs(place)
    top = disk.place
    with _unmounted(top):
        disk.make()
        yield disk


def run(*command: str) -> str:
    """What it prints. Skips the test where there is no such command."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def mount(*arguments: str) -> None:
    """Skips the test where it is not allowed."""
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mount {' '.join(arguments[:3])}: {mounted.stderr.strip()}")


@contextlib.contextmanager
def _unmounted(place: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=True)
