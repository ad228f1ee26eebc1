"""Whether weights hold infinities or NaNs. One request to an adapter of NaNs spoiled the answers of the next two adapters on a vLLM 0.32.

Both have all bits of the exponent set (IEEE 754-2019, 3.4), or, in the 8-bit formats without infinities, are one or two bit patterns. So one or two
bytes of each element tell, and those are gathered by a slice and searched for by `memchr`: no arithmetic, and no array library for it.
"""

from typing import IO

from ..threads import Steps
from .files import WEIGHTS_FILE, refuse
from .safetensors import Header

BLOCK_BYTES = 2**18  # a slice of one holds the interpreter for some tenths of a millisecond
BLOCKS_PER_STEP = 16

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


def check_finite(file: IO[bytes], header: Header) -> Steps[None]:
    """Read all weights of floating-point types. Raises InvalidAdapter with the first tensor that holds an infinity or a NaN."""
    at = blocks = 0
    for dtype, end in header.runs:
        if dtype not in _PATTERNS:
            at = end
            continue
        size = _PATTERNS[dtype][0]
        file.seek(header.data_begin + at)
        while at < end:
            block = file.read(min(BLOCK_BYTES, end - at))
            if not block or len(block) % size:
                refuse(WEIGHTS_FILE, "is cut short: it became shorter while it was read")
            if (index := first_non_finite(dtype, block)) >= 0:
                name = header.name_at(at + index * size)
                refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} holds an infinity or a NaN, which can spoil others' answers; stager.verify.finite allows it")
            at += len(block)
            blocks += 1
            if blocks % BLOCKS_PER_STEP == 0:
                yield


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
