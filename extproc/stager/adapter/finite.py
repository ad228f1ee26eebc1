"""Whether weights hold infinities or NaNs. One request to an adapter of NaNs spoiled the answers of the next two adapters on a vLLM 0.32.

Both have all bits of the exponent set (IEEE 754-2019, 3.4), or, in the 8-bit formats without infinities, are one or two bit patterns. So one or two
bytes of each element tell, and those are gathered by a slice and searched for by `memchr`: no arithmetic, and no array library for it.
"""

from collections.abc import Sequence
from typing import IO

from ..threads import Steps
from .files import WEIGHTS_FILE, refuse
from .safetensors import Header

BLOCK_BYTES = 2**18  # a slice of one holds the interpreter for some tenths of a millisecond
BLOCKS_PER_STEP = 16
MAX_RUNS = 1000  # of neighbours of one type, in weights that are looked through while they arrive: real adapters have one or two

_ONES_AND_SIGN = bytes([0x7F, 0xFF])
_FIVE_BITS = bytes(value for value in range(256) if value & 0x7C == 0x7C)
_FOUR_BITS = bytes(range(0xF0, 0x100))
_TOP_BIT = bytes(range(0x80, 0x100))
_SINGLE = 4, ((3, _ONES_AND_SIGN), (2, _TOP_BIT))

# dtype -> bytes of an element, and which values of which of its bytes (the first is the lowest) make it infinite or NaN when they come together
_PATTERNS: dict[str, tuple[int, tuple[tuple[int, bytes], ...]]] = {
    "F64": (8, ((7, _ONES_AND_SIGN), (6, bytes(value for value in range(256) if value & 0xF0 == 0xF0)))),
    "F32": _SINGLE,
    "C64": _SINGLE,  # a pair of them
    "BF16": (2, ((1, _ONES_AND_SIGN), (0, _TOP_BIT))),
    "F16": (2, ((1, _FIVE_BITS),)),
    "F8_E5M2": (1, ((0, _FIVE_BITS),)),
    "F8_E4M3": (1, ((0, _ONES_AND_SIGN),)),  # no infinities
    "F8_E5M2FNUZ": (1, ((0, b"\x80"),)),  # what would be minus zero
    "F8_E4M3FNUZ": (1, ((0, b"\x80"),)),
    "F8_E8M0": (1, ((0, b"\xff"),)),
}  # fmt: skip
# per byte of an element: a table for bytes.translate, 1 for the values that count
_TABLES = {values: bytes(value in values for value in range(256)) for _, bytes_ in _PATTERNS.values() for _, values in bytes_}


class Scan:
    """How far the weights of one file are known to be finite. While they still arrive it may go on behind what has come without a gap."""

    def __init__(self, data_begin: int, runs: Sequence[tuple[str, int]]) -> None:
        self._data_begin = data_begin
        self._runs = runs  # as a Header has them
        self._run = 0  # which of them the scan has come to
        self._at = 0  # bytes of the data before which nothing is infinite or NaN

    @property
    def reached(self) -> int:
        """Up to which byte of the file all is well."""
        return self._data_begin + self._at

    def anew(self) -> "Scan":
        """From the start, for a file that is written again."""
        return Scan(self._data_begin, self._runs)

    def is_of(self, header: Header) -> bool:
        """Whether it was made for data that is laid out as `header` says."""
        return self._data_begin == header.data_begin and self._runs == header.runs

    def advance(self, file: IO[bytes], end: int) -> Steps[int]:
        """Go on up to byte `end` of the file. Which byte of the data begins the first element that is infinite or NaN; -1 if none does.

        The scan stays before what it has found. Raises InvalidAdapter where the file ends before `end`.
        """
        blocks = 0
        for dtype, run_end in self._runs[self._run :]:
            if dtype in _PATTERNS:
                size = _PATTERNS[dtype][0]
                until = min(run_end, end - self._data_begin)
                until -= (until - self._at) % size
                file.seek(self.reached)
                while self._at < until:
                    block = file.read(min(BLOCK_BYTES, until - self._at))
                    if not block or len(block) % size:
                        refuse(WEIGHTS_FILE, "is cut short: it became shorter while it was read")
                    if (index := first_non_finite(dtype, block)) >= 0:
                        return self._at + index * size
                    self._at += len(block)
                    blocks += 1
                    if blocks % BLOCKS_PER_STEP == 0:
                        yield
                if self._at < run_end:
                    return -1
            self._at = run_end
            self._run += 1
        return -1


def scan_ahead(header: Header) -> Scan | None:
    """For weights that still arrive; None for those that would take much memory as long as they do."""
    return Scan(header.data_begin, header.runs) if len(header.runs) <= MAX_RUNS else None


def check_finite(file: IO[bytes], header: Header, begun: Scan | None = None) -> Steps[None]:
    """Read all weights of floating-point types, but for those that `begun` has been through. Raises InvalidAdapter with the first tensor that holds an
    infinity or a NaN.
    """
    scan = begun if begun is not None and begun.is_of(header) else Scan(header.data_begin, header.runs)
    if (at := (yield from scan.advance(file, header.data_begin + header.data_bytes))) >= 0:
        name = header.name_at(at)
        refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} holds an infinity or a NaN, which can spoil others' answers; stager.verify.finite allows it")


def first_non_finite(dtype: str, block: bytes) -> int:
    """Which element of `block` is the first that is infinite or NaN; -1 if none is. All types but those with such values: -1."""
    if dtype not in _PATTERNS:
        return -1
    size, ((place, values), *more) = _PATTERNS[dtype]
    plane = block[place::size] if size > 1 else block
    if not any(value in plane for value in values):  # one `memchr` each: nearly always the end of it
        return -1
    marks = plane.translate(_TABLES[values])
    for place, values in more:  # the next byte of the same elements
        both = int.from_bytes(marks, "little") & int.from_bytes(block[place::size].translate(_TABLES[values]), "little")
        marks = both.to_bytes(len(marks), "little")
    return marks.find(1)
