"""Numbers that the workers of one router share: each writes its own row of a memory file, and everybody reads all rows.

A limit of the settings is of the whole router, while connections are not spread so evenly that each worker could have its part of the limit. So a
worker adds what the other rows say to its own count. Nobody locks: two workers that count at the same moment may together go over a limit by what each
of them takes then. A number is eight aligned bytes, which one store writes. The parent clears the row of a worker that has ended.

How many wait for one adapter is counted by the CRC of its name in one of BINS bins. Two adapters that share a bin count together: of 20,000 requests
that wait (`router.max_waiting`) a bin has five of other adapters on average, beside a limit of 5,000.
"""

import mmap
import os
from enum import IntEnum
from zlib import crc32

BINS = 4096
_BEATS, _STATE, _TAKEN, _COUNTED, _CONNECTIONS, _BUSY, _WAITING, _HELD_BYTES, _BINS = range(9)
_COLUMNS = _BINS + BINS
_NUMBER_BYTES = 8


class State(IntEnum):
    """What a worker says of itself."""

    STARTING = 0
    SERVING = 1
    LEAVING = 2  # drains, and takes no new connections


class Board:
    """All rows, in the memory file `file`, which a child inherits by its number."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.workers = os.fstat(file).st_size // (_COLUMNS * _NUMBER_BYTES)
        self.numbers = memoryview(mmap.mmap(file, 0)).cast("q")

    @classmethod
    def of(cls, workers: int) -> "Board":
        """A new one, all zeros."""
        file = os.memfd_create("workers")
        os.ftruncate(file, workers * _COLUMNS * _NUMBER_BYTES)
        return cls(file)

    def row(self, worker: int) -> "Row":
        return Row(self, worker)

    def clear(self, worker: int) -> None:
        """Its worker has ended: it holds nothing any more."""
        first = worker * _COLUMNS
        self.numbers[first : first + _COLUMNS] = memoryview(bytes(_COLUMNS * _NUMBER_BYTES)).cast("q")

    def close(self) -> None:
        os.close(self.file)


class Row:
    """One worker's. Only that worker writes it, as long as it lives."""

    def __init__(self, board: Board, worker: int) -> None:
        self._numbers = board.numbers
        self._first = worker * _COLUMNS

    # -- how the worker is

    def beat(self) -> None:
        """The worker's event loop runs."""
        self._numbers[self._first + _BEATS] += 1

    def count(self, connections: int, busy: int) -> None:
        """The worker has so many connections, of which so many carry requests."""
        self._numbers[self._first + _CONNECTIONS] = connections
        self._numbers[self._first + _BUSY] = busy
        self._numbers[self._first + _COUNTED] = self._numbers[self._first + _TAKEN]

    def take(self) -> None:
        """One more connection has come from the parent."""
        self._numbers[self._first + _TAKEN] += 1

    def become(self, state: State) -> None:
        self._numbers[self._first + _STATE] = state

    @property
    def state(self) -> State:
        return State(self._numbers[self._first + _STATE])

    @property
    def beats(self) -> int:
        return self._numbers[self._first + _BEATS]

    @property
    def taken(self) -> int:
        """Connections that came from the parent, since the worker's start."""
        return self._numbers[self._first + _TAKEN]

    @property
    def counted(self) -> int:
        """Those of them that had come when connections were counted last."""
        return self._numbers[self._first + _COUNTED]

    @property
    def connections(self) -> int:
        return self._numbers[self._first + _CONNECTIONS]

    @property
    def busy(self) -> int:
        return self._numbers[self._first + _BUSY]

    # -- what is held, here and in all

    def all_waiting(self) -> int:
        """Requests that wait, in all workers."""
        return sum(self._numbers[_WAITING::_COLUMNS])

    def all_waiting_for(self, adapter: str) -> int:
        """The same for one adapter, and for those that share its bin."""
        return sum(self._numbers[_bin(adapter) :: _COLUMNS])

    def wait(self, adapter: str, by: int) -> None:
        """So many more requests wait here for that adapter."""
        self._numbers[self._first + _WAITING] += by
        self._numbers[self._first + _bin(adapter)] += by

    def hold(self, held_bytes: int) -> int:
        """Bodies take so many bytes here; the bytes that they take in all workers."""
        self._numbers[self._first + _HELD_BYTES] = held_bytes
        return sum(self._numbers[_HELD_BYTES::_COLUMNS])


def _bin(adapter: str) -> int:
    return _BINS + crc32(adapter.encode()) % BINS
