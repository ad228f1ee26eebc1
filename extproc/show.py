"""What the command line draws: a bar while an adapter arrives, a table of what a node has."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table
from rich.text import Text

from .client import Disk, OnDisk
from .client import Progress as Flight

UNWRAPPED = 10_000  # columns, where nobody looks at a screen: a program that reads the table finds whole names
_ORDER: dict[str, Callable[[OnDisk], Any]] = {
    "size": lambda adapter: -adapter.bytes,
    "checked": lambda adapter: -adapter.checked_seconds,
    "name": lambda adapter: adapter.name,
}


class StageBar:
    """Bytes, rate and time left of one flight, on standard error; nothing where that is no terminal or `enabled` is off."""

    def __init__(self, name: str, *, enabled: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))
        self._name = name
        self._task = self._progress.add_task(name, total=None)

    def show(self, flight: Flight) -> None:
        of = f" from {flight.origin}" if flight.origin else ""
        self._progress.update(self._task, description=f"{self._name}: {flight.phase}{of}", completed=flight.done_bytes, total=flight.total_bytes or None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


def show_list(disk: Disk, sort: str) -> None:
    """One row per adapter, then the disk's budget."""
    table = Table(*(Column(heading, overflow="fold") for heading in ("adapter", "size", "idle", "held by", "origin", "checked", "digest")))
    adapters = sorted(disk.adapters, key=_ORDER[sort]) if sort in _ORDER else disk.adapters  # as it comes: least recently used first
    for a in adapters:
        holds = [
            *(["pin"] if a.pinned else []),
            *([f"lease, {a.leased_seconds:.0f} s"] if a.leased_seconds >= 0.5 else []),
            *(["its owner"] if a.adopted else []),
            *(["engine"] if a.loaded else []),
        ]
        checked = a.refresh_error or ("-" if a.checked_seconds < 0 else f"{a.checked_seconds:.0f} s ago")
        cells = (a.name, _mib(a.bytes), f"{a.idle_seconds:.0f} s", ", ".join(holds) or "-", a.origin, checked, a.digest[:12])
        table.add_row(*(Text(cell) for cell in cells))  # as they are: names and messages may hold what is markup to rich
    console = Console(width=None if sys.stdout.isatty() else UNWRAPPED)
    console.print(table)
    console.print(f"{_mib(disk.used_bytes)} used, {_mib(disk.reserved_bytes)} reserved, limit {_mib(disk.max_bytes)}", highlight=False)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
