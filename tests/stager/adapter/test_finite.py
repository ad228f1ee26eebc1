"""Infinities and NaNs are found in every floating-point type, and no finite number is taken for one."""

import io
import struct
from typing import Any

import numpy as np
import pytest

from extproc.errors import InvalidAdapter
from extproc.stager.adapter.finite import BLOCK_BYTES, MAX_RUNS, Scan, check_finite, first_non_finite, scan_ahead
from extproc.stager.adapter.safetensors import DTYPE_BITS, Header, read_header
from extproc.stager.threads import through
from tests.fakes.adapters import safetensors as file_of

FLOATS: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_number_of_two_bytes_is_judged_as_numpy_does(dtype: str) -> None:
    """All 65,536 of them."""
    for value in range(2**16):
        raw = value.to_bytes(2, "little")
        number = np.frombuffer(raw, np.float16)[0] if dtype == "F16" else np.frombuffer(b"\0\0" + raw, np.float32)[0]
        assert (first_non_finite(dtype, raw) < 0) == np.isfinite(number), hex(value)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_numbers_of_more_bytes_are_judged_as_numpy_does(dtype: str) -> None:
    """The largest, the smallest, and what lies beside the border."""
    info = np.finfo(FLOATS[dtype])
    finite = np.array([0.0, -0.0, 1.0, info.max, info.min, info.tiny, info.smallest_subnormal], FLOATS[dtype])
    assert first_non_finite(dtype, finite.tobytes()) == -1
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        spoilt = np.append(finite, np.array([value, 1.0], FLOATS[dtype]))
        assert first_non_finite(dtype, spoilt.tobytes()) == len(finite)


@pytest.mark.parametrize(
    ("dtype", "spoilt"),
    [
        ("F8_E5M2", {*range(0x7C, 0x80), *range(0xFC, 0x100)}),
        ("F8_E4M3", {0x7F, 0xFF}),
        ("F8_E5M2FNUZ", {0x80}),
        ("F8_E4M3FNUZ", {0x80}),
        ("F8_E8M0", {0xFF}),
        ("I8", set()),
        ("F4", set()),
    ],
)
def test_numbers_of_one_byte_are_judged_by_their_definition(dtype: str, spoilt: set[int]) -> None:
    """The bit patterns that the OCP formats and those without minus zero keep for NaN and infinity."""
    assert {value for value in range(256) if first_non_finite(dtype, bytes([value])) == 0} == spoilt


def test_a_complex_number_is_two_numbers() -> None:
    """The second part may be the spoilt one."""
    assert first_non_finite("C64", struct.pack("<4f", 1, 2, 3, 4)) == -1
    assert first_non_finite("C64", struct.pack("<4f", 1, 2, 3, float("nan"))) >= 0


@pytest.mark.parametrize("at", [0, BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2, BLOCK_BYTES + 5])
def test_the_tensor_is_named_wherever_in_the_file_it_lies(at: int) -> None:
    """Neighbours of one type are read together, in blocks, and each error is still that of one tensor."""
    count = BLOCK_BYTES + 10
    data = np.ones(2 * count, np.float16)
    data[at] = np.nan
    names = {0: "first", 5: "second", 1000: "third", BLOCK_BYTES: "fourth"}
    borders = [*names, count]
    header = {
        name: {"dtype": "F16", "shape": [end - begin], "data_offsets": [2 * begin, 2 * end]}
        for (begin, name), end in zip(names.items(), borders[1:], strict=True)
    }
    raw = file_of(header, data[:count].tobytes())
    expected = names[max(begin for begin in names if begin <= at)]
    with pytest.raises(InvalidAdapter, match=f"tensor '{expected}' holds an infinity or a NaN"):
        scan(raw)


def test_types_that_know_no_nan_are_not_read() -> None:
    """Whole numbers beside floating-point ones: each is read by its own type."""
    ones = np.ones(4, np.float32).tobytes()
    header = {
        "whole": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]},
        "single": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        "half": {"dtype": "BF16", "shape": [2], "data_offsets": [32, 36]},
        "single again": {"dtype": "F32", "shape": [4], "data_offsets": [36, 52]},
    }
    scan(file_of(header, b"\xff" * 16 + ones + b"\0\x3f\0\x3f" + ones))
    with pytest.raises(InvalidAdapter, match="'half'"):
        scan(file_of(header, b"\xff" * 16 + ones + b"\0\x3f\xff\x7f" + ones))


def test_a_file_that_becomes_shorter_is_refused() -> None:
    """Others may write to what they put here while it is read."""
    raw = file_of({"x": {"dtype": "F16", "shape": [8], "data_offsets": [0, 16]}}, bytes(16))
    header = through(read_header(io.BytesIO(raw), len(raw)))
    with pytest.raises(InvalidAdapter, match="cut short"):
        through(check_finite(io.BytesIO(raw[:-3]), header))


def test_every_floating_point_type_is_known() -> None:
    """A type that the format has and this module does not would pass unread; of 6 and 4 bits there are only finite numbers."""
    floats = {dtype for dtype in DTYPE_BITS if dtype.startswith(("F", "BF", "C"))} - {"F6_E2M3", "F6_E3M2", "F4"}
    assert all(first_non_finite(dtype, b"\xff" * 8) == 0 or first_non_finite(dtype, b"\x80" * 8) == 0 for dtype in floats)


@pytest.mark.parametrize("bad", [None, 3, 20, 43])
@pytest.mark.parametrize("ends", [(1,), (40, 41, 46, 47, 60), (500,)])
def test_a_scan_that_comes_with_the_bytes_finds_what_one_of_the_whole_finds(ends: tuple[int, ...], bad: int | None) -> None:
    """Wherever the bytes end for the moment: within an element, between two types, behind the end. It stays before what it has found."""
    raw = mixed(bad)
    header = header_of(raw)
    ahead = scan_ahead(header)
    assert ahead is not None
    for end in (header.data_begin + end for end in ends):
        present = io.BytesIO(raw[:end])
        before = ahead.reached
        found = through(ahead.advance(present, min(end, len(raw))))
        assert before <= ahead.reached
        assert (found >= 0) <= (bad is not None)
    if bad is None:
        through(check_finite(io.BytesIO(raw), header, ahead))
    else:
        with pytest.raises(InvalidAdapter, match="single" if bad < 40 else "half"):
            through(check_finite(io.BytesIO(raw), header, ahead))


def test_what_was_looked_through_is_not_read_again() -> None:
    """The check of the whole begins where the scan has come to."""
    raw = mixed(None)
    header = header_of(raw)
    ahead = scan_ahead(header)
    assert ahead is not None
    through(ahead.advance(io.BytesIO(raw), header.data_begin + 40))
    through(check_finite(io.BytesIO(b"\xff" * (header.data_begin + 40) + raw[header.data_begin + 40 :]), header, ahead))


def test_a_scan_of_another_layout_counts_for_nothing() -> None:
    """The file that was published has another header than the one that came first: all of it is read."""
    raw = mixed(3)
    header = header_of(raw)
    other = Scan(header.data_begin, [("I32", 40), ("BF16", 48)])
    assert through(other.advance(io.BytesIO(raw), len(raw))) == -1
    with pytest.raises(InvalidAdapter, match="single"):
        through(check_finite(io.BytesIO(raw), header, other))


def test_weights_of_very_many_changes_of_type_are_looked_through_at_the_end() -> None:
    """What is kept as long as a transfer takes is bounded."""
    header = Header(8)
    header.runs = [("F16" if number % 2 else "F32", number) for number in range(MAX_RUNS + 1)]
    assert scan_ahead(header) is None
    header.runs.pop()
    assert scan_ahead(header) is not None


def mixed(bad: int | None) -> bytes:
    """Forty bytes of F32 and eight of BF16; the element of which `bad` is a byte is a NaN."""
    header = {
        "single": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]},
        "half": {"dtype": "BF16", "shape": [4], "data_offsets": [40, 48]},
    }
    data = bytearray(b"\0\0\x80\x3f" * 10 + b"\x80\x3f" * 4)
    if bad is not None:
        size = 4 if bad < 40 else 2
        begin = bad - bad % size
        data[begin : begin + size] = b"\xff" * size
    return file_of(header, bytes(data))


def header_of(raw: bytes) -> Header:
    return through(read_header(io.BytesIO(raw), len(raw)))


def scan(raw: bytes) -> None:
    file = io.BytesIO(raw)
    through(check_finite(file, through(read_header(file, len(raw)))))
