"""The header of a safetensors file: the format's rules, its bounds, and the real library as judge."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from extproc.errors import InvalidAdapter
from extproc.stager.adapter.safetensors import DTYPE_BITS, MAX_DIMENSIONS, MAX_HEADER_BYTES, Header, header_length, read_header
from extproc.stager.threads import through
from tests.fakes.adapters import WEIGHTS
from tests.fakes.adapters import safetensors as file_of

from .test_config import JSON

A = "model.q_proj.lora_A.weight"
B = "model.q_proj.lora_B.weight"
Layout = dict[str, dict[str, Any]]


def layout() -> Layout:
    """Two F32 matrices of rank 4 and width 8, 256 bytes of data."""
    return {
        A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [128, 256]},
    }


def read(raw: bytes) -> Header:
    return through(read_header(io.BytesIO(raw), len(raw)))


def header_of(header: object, data: bytes = bytes(256)) -> Header:
    return read(file_of(header, data))


def test_a_good_header_is_read() -> None:
    """Names, shapes and places come out; the metadata does not."""
    header = header_of({"__metadata__": {"format": "pt"}, **layout()})
    assert header.shapes == {A: (4, 8), B: (8, 4)}
    assert (header.names, list(header.ends), header.runs) == ([A, B], [128, 256], [("F32", 256)])
    assert [header.name_at(offset) for offset in (0, 127, 128, 255)] == [A, A, B, B]


def test_tensors_may_stand_in_any_order() -> None:
    """The header's order is not the data's: other writers sort it by name."""
    pieces = [(n * 4, n * 4 + 4) for n in range(8)]
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6], [0, 2, 4, 6, 1, 3, 5, 7]):
        header = header_of({f"t{n}": {"dtype": "F32" if n < 4 else "I32", "shape": [1], "data_offsets": list(pieces[n])} for n in order}, bytes(32))
        assert header.names == [f"t{n}" for n in range(8)]
        assert header.runs == [("F32", 16), ("I32", 32)]


@pytest.mark.parametrize("spaces", [",:", ", : "], ids=["compact", "spaced"])
def test_a_header_may_be_written_in_any_way_that_json_allows(spaces: str) -> None:
    """Other writers put spaces, other orders of keys, escapes and keys that nobody knows."""
    comma, colon = (spaces[:1], spaces[1:]) if len(spaces) == 2 else (", ", " : ")
    header = {key: dict(reversed([*value.items(), ("new", {"x": [1]})])) for key, value in layout().items()}
    text = json.dumps(header, separators=(comma, colon)).replace("model", "\\u006dodel")
    assert header_of(f"{text}  \n".encode()).shapes == {A: (4, 8), B: (8, 4)}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "settings": '{"a": [1, 2]}, ' * 20_000}])
def test_metadata_may_be_null_or_long(metadata: object) -> None:
    """safetensors 0.8 takes null, and some trainers keep their settings there."""
    assert len(header_of({**layout(), "__metadata__": metadata}).shapes) == 2


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_real_library_is_known(tmp_path: Path, dtype: str) -> None:
    """What `safetensors` opens is read here, too."""
    raw = file_of({A: {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, DTYPE_BITS[dtype]]}}, bytes(DTYPE_BITS[dtype]))
    (tmp_path / WEIGHTS).write_bytes(raw)
    with safe_open(tmp_path / WEIGHTS, framework="np") as opened:
        assert opened.get_slice(A).get_dtype() == dtype
    assert read(raw).runs == [(dtype, DTYPE_BITS[dtype])]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_real_library_writes_is_read(tmp_path: Path, dtype: str) -> None:
    """Files of `safetensors` itself, in its own order and with its own padding."""
    shapes = {A: (4, 8), B: (8, 4), "base_model.model.layers.0.q_proj.lora_A.weight": (4, 3), "x.q_proj.lora_B.weight": (5, 4), "none": (0, 3)}
    tensors = {name: np.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt", "note": "é" * 5})
    assert read((tmp_path / WEIGHTS).read_bytes()).shapes == shapes


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "no safetensors header"),
        (b"\x01\x02\x03", "no safetensors header"),
        (b"\xff" * 64, "is no safetensors file, or cut short"),
        ((3).to_bytes(8, "little") + b"{}", "is no safetensors file, or cut short"),
        ((0).to_bytes(8, "little"), "does not begin with"),
        (file_of(b" {}"), "does not begin with"),
        (file_of(b"[]"), "does not begin with"),
        (file_of(b"{nonsense}"), "broken header"),
        (file_of(b'{"a": "\xff"}'), "broken header"),
        (file_of(b'{"a":' * 100_000), "broken header"),
        (file_of(b'{"__metadata__":null,}'), "broken header"),
        (file_of(b'{"\\ud800":1}'), "broken header"),
        (file_of(b"{} {}"), "broken header"),
        (file_of(b'{"__metadata__": {}, "__metadata__": {}}'), "a name appears twice"),
        (b"\x80\x04\x95" + b"pickle" * 20, "is no safetensors file, or cut short"),
        (b"PK\x03\x04\x14\x00\x08\x08 a zip, as torch.save writes it", "is a zip archive or a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"<!doctype html><title>Sign in</title>", "is a web page"),
        (b"<html><body>404", "is a web page"),
    ],
)
def test_a_file_without_a_safetensors_header_is_refused(raw: bytes, complaint: str) -> None:
    """The format's own rules for the first bytes and the header, and a name for what often lies in its place."""
    with pytest.raises(InvalidAdapter, match=WEIGHTS) as raised:
        read(raw)
    assert complaint in str(raised.value)


def test_a_file_of_eight_bytes_tells_what_its_header_needs() -> None:
    """A header can be fetched by a range when its first 8 bytes are known; what it says beyond the limits is refused then."""
    assert header_length((100).to_bytes(8, "little"), 1000) == 100
    with pytest.raises(InvalidAdapter, match="longer than its 107 bytes"):
        header_length((100).to_bytes(8, "little"), 107)
    with pytest.raises(InvalidAdapter, match=f"the limit is {MAX_HEADER_BYTES}"):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2**40)
    with pytest.raises(InvalidAdapter, match="Git LFS"):
        header_length(b"version ", 132)


def test_no_bytes_of_a_file_are_shown() -> None:
    """A link below an origin may lead to somebody's secret."""
    with pytest.raises(InvalidAdapter) as raised:
        read(b"hunter2!" * 100)
    assert "hunter" not in str(raised.value)
    assert str(int.from_bytes(b"hunter2!", "little")) not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({A: 5}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": [4, 8]}}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": None}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": 32, "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8.0], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, True], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [-4, -8], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [128, 0]}}, "ends before it begins"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": "ab"}}, "whole numbers"),
        ({A: {"dtype": "F31", "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype, 'F31'"),
        ({A: {"dtype": None, "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype"),
        ({A: {"dtype": ["F32"], "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype"),
        ({A: {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 128]}}, "does not take 128 bytes"),
        ({A: {"dtype": "F32", "shape": [4, 9], "data_offsets": [0, 128]}}, "does not take 128 bytes"),
        ({A: {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, "does not take 1 bytes"),
        ({B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [132, 260]}}, "begins at byte 132"),
        ({B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [124, 252]}}, "byte 124"),
        ({B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}}, "where another does"),
        ({A: {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}, "byte 128"),
        ({A: {"dtype": "F32", "shape": [4, 8] + [1] * MAX_DIMENSIONS, "data_offsets": [0, 128]}}, "10 dimensions; the limit is 8"),
        ({A: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 128]}}, "elements"),
        ({A: {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}, "elements"),
    ],
)
def test_a_header_that_breaks_the_layout_is_refused(change: Layout, complaint: str) -> None:
    """Types, dtypes, sizes, holes, overlaps."""
    with pytest.raises(InvalidAdapter, match=WEIGHTS) as raised:
        header_of({**layout(), **change})
    assert complaint in str(raised.value)


def test_two_tensors_of_one_name_are_refused() -> None:
    """Readers differ in which of the two they take."""
    text = json.dumps(layout())
    with pytest.raises(InvalidAdapter, match="a name appears twice"):
        header_of(text[:-1].encode() + b"," + text[1:].encode())
    with pytest.raises(InvalidAdapter, match="broken header"):
        header_of(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}', bytes(4))


@pytest.mark.parametrize("length", [255, 0, 257])
def test_truncated_or_padded_data_is_refused(length: int) -> None:
    """The tensors cover the data exactly."""
    with pytest.raises(InvalidAdapter, match="cut short or padded"):
        header_of(layout(), bytes(length))


def test_a_header_is_read_in_steps() -> None:
    """Between two of them a thread may let others run, and whoever gives up ends the reading."""
    tensors = {f"m{n}.lora_A.weight": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(10_000)}
    raw = file_of(tensors, bytes(10_000))
    assert sum(1 for _ in read_header(io.BytesIO(raw), len(raw))) >= 10


@settings(deadline=None)
@given(st.binary(max_size=200) | st.builds(file_of, JSON, st.binary(max_size=16)) | st.builds(file_of, st.dictionaries(st.text(max_size=20), JSON)))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    """Random bytes, and random headers with a right length."""
    with contextlib.suppress(InvalidAdapter):
        read(raw)


NAMES = st.sampled_from([A, B, "lora_A.weight", "lora_B", "model.q_proj.lora_A", "x.lora_A_x.lora_A.weight", "other"])
NUMBERS = st.sampled_from([0, 1, 4, 8, 16, 64, 128, 256, -1, True, 4.0, None, "4", 2**64, 2**70])
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "x", None, [], {}, 4]),
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.tuples(NUMBERS, NUMBERS).map(list) | JSON,
    }
)


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(NAMES, TENSORS | JSON, max_size=3))
@example({A: {"dtype": [], "shape": [4, 8], "data_offsets": [0, 128]}})
def test_no_header_of_nearly_right_shape_raises_anything_else(header: dict[str, Any]) -> None:
    """The keys are those that are read; the values are not what they should be."""
    with contextlib.suppress(InvalidAdapter):
        header_of(header)


METADATA = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers() | st.none() | st.lists(st.text(max_size=2), max_size=2), max_size=3) | JSON
EXTRAS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F4", "F6_E2M3", "C64", "U8"]), "shape": st.lists(NUMBERS, max_size=2), "data_offsets": st.just([256, 256])}
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(st.fixed_dictionaries({}, optional={"__metadata__": METADATA, "empty": EXTRAS}))
@example({"__metadata__": {"epoch": 3}})
@example({"__metadata__": None})
@example({"empty": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [256, 256]}})
def test_what_passes_here_the_real_library_can_open(tmp_path: Path, more: dict[str, Any]) -> None:
    """An engine reads with `safetensors`: what that library refuses must not be published, and what it takes is not refused."""
    raw = file_of({**layout(), **more}, bytes(256))
    (tmp_path / WEIGHTS).write_bytes(raw)
    try:
        read(raw)
        passes = True
    except InvalidAdapter:
        passes = False
    try:
        with safe_open(tmp_path / WEIGHTS, framework="np") as opened:
            assert A in opened.keys()  # noqa: SIM118
        opens = True
    except SafetensorError:
        opens = False
    assert opens or not passes
    if "empty" not in more:
        assert passes == opens
