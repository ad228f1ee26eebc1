"""Every refusal of a configuration and of weights, and nothing refused that the real library writes."""

import contextlib
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
from extproc.stager.adapter.check import MAX_CONFIG_BYTES, AdapterConfig, check_config, check_files, check_weights, hidden_size, with_base
from tests.fakes.adapters import CONFIG, HIDDEN, LAYERS, PICKLE, RANK, WEIGHTS, small_files, split
from tests.fakes.adapters import safetensors as file_of

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}
LORA = AdapterConfig("base", 4, frozenset({4}), frozenset({"q_proj"}))
A = "model.q_proj.lora_A.weight"
B = "model.q_proj.lora_B.weight"
Layout = dict[str, dict[str, Any]]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def config_with(**changes: Any) -> bytes:
    """A good configuration, changed; a value of ... leaves the key out."""
    return json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def layout() -> Layout:
    """Two F32 matrices of rank 4 and width 8, 256 bytes of data."""
    return {
        A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [128, 256]},
    }


def weights_at(directory: Path, header: object, data: bytes = bytes(256)) -> Path:
    path = directory / WEIGHTS
    path.write_bytes(file_of(header, data))
    return path


# -- adapter_config.json


def test_a_good_configuration_is_read() -> None:
    """What matters of it comes out; the checks of the node are passed."""
    config = check_config(config_with(rank_pattern={"v_proj": 8}), base_model="base", max_rank=8)
    assert config == AdapterConfig("base", 4, frozenset({4, 8}), frozenset({"q_proj", "v_proj"}))


def test_target_modules_may_be_a_pattern() -> None:
    """PEFT takes a regular expression or `all-linear`; which modules those are, only the model can say."""
    assert check_config(config_with(target_modules="all-linear")).target_modules == frozenset()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": ...}, "peft_type None"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"base_model_name_or_path": ...}, "no base_model_name_or_path"),
        ({"base_model_name_or_path": 5}, "no base_model_name_or_path"),
        ({"base_model_name_or_path": "base/"}, "this node serves 'base'"),
        ({"r": ...}, "has r None"),
        ({"r": 0}, "has r 0"),
        ({"r": -4}, "has r -4"),
        ({"r": 4.0}, "has r 4.0"),
        ({"r": True}, "has r True"),
        ({"r": "4"}, "has r '4'"),
        ({"r": 16}, "has rank 16; this node's engine takes up to 8"),
        ({"rank_pattern": {"q_proj": 16}}, "has rank 16; this node's engine takes up to 8"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"lora_alpha": ...}, "no lora_alpha"),
        ({"lora_alpha": "8"}, "no lora_alpha"),
        ({"lora_alpha": True}, "no lora_alpha"),
        ({"lora_alpha": float("nan")}, "no lora_alpha"),
        ({"lora_alpha": float("inf")}, "no lora_alpha"),
        ({"target_modules": ...}, "no target_modules"),
        ({"target_modules": []}, "no target_modules"),
        ({"target_modules": ""}, "no target_modules"),
        ({"target_modules": ["q_proj", 5]}, "no target_modules"),
        ({"target_modules": [""]}, "no target_modules"),
    ],
)
def test_a_configuration_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """The refusal names the file and why."""
    with pytest.raises(InvalidAdapter, match=CONFIG) as raised:
        check_config(config_with(**changes), base_model="base", max_rank=8)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b" " * (MAX_CONFIG_BYTES + 1), "the limit is"),
    ],
    ids=["empty", "cut", "binary", "deep", "long number", "list", "null", "large"],
)
def test_a_configuration_that_is_no_object_is_refused(text: bytes, complaint: str) -> None:
    """Whatever lies under the name adapter_config.json."""
    with pytest.raises(InvalidAdapter, match=complaint):
        check_config(text)


@settings(deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_configuration_raises_anything_else(text: bytes) -> None:
    """Random bytes and random JSON."""
    with contextlib.suppress(InvalidAdapter):
        check_config(text, base_model="base", max_rank=8)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "auto_map", "rank_pattern"]), JSON))
def test_no_change_of_a_good_configuration_raises_anything_else(changes: dict[str, Any]) -> None:
    """Random values in the places that are read."""
    with contextlib.suppress(InvalidAdapter):
        check_config(json.dumps({**GOOD, **changes}).encode(), base_model="base", max_rank=8)


# -- adapter_model.safetensors


def test_good_weights_pass(tmp_path: Path) -> None:
    """Both matrices are counted, the metadata is not."""
    assert check_weights(weights_at(tmp_path, {"__metadata__": {"format": "pt"}, **layout()}), LORA) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_real_library_writes_passes(tmp_path: Path, dtype: str) -> None:
    """Files of `safetensors` itself, in its own order and with its own padding."""
    shapes = {A: (4, 8), B: (8, 4), "base_model.model.layers.0.q_proj.lora_A.weight": (4, 3), "x.q_proj.lora_B.weight": (5, 4)}
    tensors = {name: np.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt", "note": "é" * 5})
    assert check_weights(tmp_path / WEIGHTS, LORA) == 4


def test_the_demonstration_adapters_pass_here_and_in_the_real_library(tmp_path: Path) -> None:
    """What `up` serves is what PEFT would write."""
    files = small_files()
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    assert check_weights(tmp_path / WEIGHTS, check_config(files[CONFIG])) == LAYERS * 2 * 2
    with safe_open(tmp_path / WEIGHTS, framework="np") as opened:
        assert {tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {(RANK, HIDDEN), (HIDDEN, RANK)}  # noqa: SIM118


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "no safetensors header"),
        (b"\x01\x02\x03", "no safetensors header"),
        (b"\xff" * 64, "says its header has"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "says its header has"),
        ((3).to_bytes(8, "little") + b"{}", "says its header has 3 bytes; the file has 10"),
        ((0).to_bytes(8, "little"), "does not begin with"),
        (file_of(b" {}"), "does not begin with"),
        (file_of(b"[]"), "does not begin with"),
        (file_of(b"{nonsense}"), "broken header"),
        (file_of(b'{"a": "\xff"}'), "broken header"),
        (file_of(b'{"a":' * 100_000), "broken header"),
        (file_of(b'{"a": 1, "a": 1}'), "a name appears twice"),
        (b"\x80\x04\x95" + b"pickle" * 20, "says its header has"),
        (b"PK\x03\x04\x14\x00\x08\x08 a zip, as torch.save writes it", "says its header has"),
    ],
    ids="empty|short|huge length|over the limit|longer than the file|no header|leading space|list|not JSON|not UTF-8|deep|duplicate|pickle|zip".split("|"),  # noqa: SIM905
)
def test_a_file_without_a_safetensors_header_is_refused(tmp_path: Path, raw: bytes, complaint: str) -> None:
    """The format's own rules for the first bytes and the header."""
    (tmp_path / WEIGHTS).write_bytes(raw)
    with pytest.raises(InvalidAdapter, match=WEIGHTS) as raised:
        check_weights(tmp_path / WEIGHTS, LORA)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({A: 5}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": [4, 8]}}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0]}}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": None}}, "lacks dtype"),
        ({A: {"dtype": "F32", "shape": 32, "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8.0], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, True], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [-4, -8], "data_offsets": [0, 128]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [128, 0]}}, "whole numbers"),
        ({A: {"dtype": "F32", "shape": [4, 8], "data_offsets": "ab"}}, "whole numbers"),
        ({A: {"dtype": "F31", "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype 'F31'"),
        ({A: {"dtype": None, "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype None"),
        ({A: {"dtype": ["F32"], "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype"),
        ({A: {"dtype": {}, "shape": [4, 8], "data_offsets": [0, 128]}}, "unknown dtype"),
        ({A: {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 128]}}, "does not take 128 bytes"),
        ({A: {"dtype": "F32", "shape": [4, 9], "data_offsets": [0, 128]}}, "does not take 128 bytes"),
        ({B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [132, 260]}}, "begins at byte 132"),
        ({B: {"dtype": "F32", "shape": [8, 4], "data_offsets": [124, 252]}}, "begins at byte 124"),
        ({A: {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}, "begins at byte 128"),
        ({A: {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]}, B: {"dtype": "F32", "shape": [6, 4], "data_offsets": [160, 256]}}, "has rank 5"),
        ({B: {"dtype": "F32", "shape": [4, 8], "data_offsets": [128, 256]}}, "has rank 8"),
    ],
)
def test_a_header_that_breaks_the_layout_is_refused(tmp_path: Path, change: Layout, complaint: str) -> None:
    """Types, dtypes, sizes, holes, overlaps, ranks."""
    with pytest.raises(InvalidAdapter, match=WEIGHTS) as raised:
        check_weights(weights_at(tmp_path, {**layout(), **change}), LORA)
    assert complaint in str(raised.value)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Readers differ in which of the two they take."""
    text = json.dumps(layout())
    with pytest.raises(InvalidAdapter, match="a name appears twice"):
        check_weights(weights_at(tmp_path, text[:-1].encode() + b"," + text[1:].encode()), LORA)


@pytest.mark.parametrize("length", [255, 0, 257])
def test_truncated_or_padded_data_is_refused(tmp_path: Path, length: int) -> None:
    """The tensors cover the data exactly."""
    with pytest.raises(InvalidAdapter, match="cut short or padded"):
        check_weights(weights_at(tmp_path, layout(), bytes(length)), LORA)


def test_a_tensor_of_a_module_that_is_not_targeted_is_refused(tmp_path: Path) -> None:
    """vLLM refuses such an adapter when it loads it; here it is refused before anybody sees it."""
    with pytest.raises(InvalidAdapter, match="does not target"):
        check_weights(weights_at(tmp_path, layout()), AdapterConfig("base", 4, frozenset({4}), frozenset({"proj"})))


def test_a_target_may_name_a_module_by_the_end_of_its_path(tmp_path: Path) -> None:
    """`model.q_proj` is targeted by itself and by `q_proj`."""
    for target in ("q_proj", "model.q_proj"):
        assert check_weights(weights_at(tmp_path, layout()), AdapterConfig("base", 4, frozenset({4}), frozenset({target}))) == 2


def test_weights_without_lora_matrices_are_refused(tmp_path: Path) -> None:
    """A whole model, or nothing at all."""
    whole = {"model.embed": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}
    for header, data in ((whole, bytes(256)), ({}, b"")):
        with pytest.raises(InvalidAdapter, match="no lora_A or lora_B"):
            check_weights(weights_at(tmp_path, header, data), LORA)


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_A", "lora_B.q_proj.weight"])
def test_a_matrix_that_names_no_module_is_refused(tmp_path: Path, name: str) -> None:
    """There is nothing before `lora_A` that could be a module."""
    shape = [4, 16] if "lora_A" in name else [16, 4]
    with pytest.raises(InvalidAdapter, match=WEIGHTS):
        check_weights(weights_at(tmp_path, {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 256]}}), LORA)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.builds(file_of, JSON, st.binary(max_size=16)) | st.builds(file_of, st.dictionaries(st.text(max_size=20), JSON)))
def test_no_bytes_raise_anything_else(tmp_path: Path, raw: bytes) -> None:
    """Random bytes, and random headers with a right length."""
    (tmp_path / WEIGHTS).write_bytes(raw)
    with contextlib.suppress(InvalidAdapter):
        check_weights(tmp_path / WEIGHTS, LORA)


NAMES = st.sampled_from([A, B, "lora_A.weight", "lora_B", "model.q_proj.lora_A", "x.lora_A_x.lora_A.weight", "other"])
NUMBERS = st.sampled_from([0, 1, 4, 8, 16, 64, 128, 256, -1, True, 4.0, None, "4", 2**64, 2**70])
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "x", None, [], {}, 4]),
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.tuples(NUMBERS, NUMBERS).map(list) | JSON,
    }
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(st.dictionaries(NAMES, TENSORS | JSON, max_size=3))
@example({A: {"dtype": [], "shape": [4, 8], "data_offsets": [0, 128]}})
def test_no_header_of_nearly_right_shape_raises_anything_else(tmp_path: Path, header: dict[str, Any]) -> None:
    """The keys are those that are read; the values are not what they should be."""
    with contextlib.suppress(InvalidAdapter):
        check_weights(weights_at(tmp_path, header), LORA)


METADATA = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers() | st.none() | st.lists(st.text(max_size=2), max_size=2), max_size=3) | JSON
EXTRAS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F4", "F6_E2M3", "C64", "U8"]), "shape": st.lists(NUMBERS, max_size=2), "data_offsets": st.just([256, 256])}
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(st.fixed_dictionaries({}, optional={"__metadata__": METADATA, "empty": EXTRAS}))
@example({"__metadata__": {"epoch": 3}})
@example({"empty": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [256, 256]}})
def test_what_passes_here_the_real_library_can_open(tmp_path: Path, more: dict[str, Any]) -> None:
    """An engine reads with `safetensors`: what that library refuses must not be published."""
    path = weights_at(tmp_path, {**layout(), **more})
    try:
        check_weights(path, LORA)
    except InvalidAdapter:
        return
    try:
        with safe_open(path, framework="np") as opened:
            assert A in opened.keys()  # noqa: SIM118
    except SafetensorError as error:
        raise AssertionError(f"published, though the engine cannot load it: {error}") from error


def test_a_mutilated_adapter_of_the_demonstration_is_refused(tmp_path: Path) -> None:
    """Each tensor of it left out, one at a time, leaves a hole."""
    files = small_files()
    header, data = split(files[WEIGHTS])
    for name in [name for name in header if name != "__metadata__"]:
        with pytest.raises(InvalidAdapter):
            check_weights(weights_at(tmp_path, {key: value for key, value in header.items() if key != name}, data), check_config(files[CONFIG]))


# -- the directory


def test_a_directory_needs_weights(tmp_path: Path) -> None:
    """A configuration alone is no adapter."""
    with pytest.raises(InvalidAdapter, match="is missing"):
        check_files(tmp_path, LORA, allow_pickle=True)


def test_pickled_weights_pass_only_where_they_are_allowed(tmp_path: Path) -> None:
    """They can run code when an engine loads them."""
    (tmp_path / PICKLE).write_bytes(b"\x80\x04.")
    check_files(tmp_path, LORA, allow_pickle=True)
    with pytest.raises(InvalidAdapter, match="is missing"):
        check_files(tmp_path, LORA, allow_pickle=False)


def test_safetensors_are_checked_though_pickle_is_allowed_and_there(tmp_path: Path) -> None:
    """The engine prefers the safetensors file."""
    (tmp_path / PICKLE).write_bytes(b"\x80\x04.")
    (tmp_path / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(InvalidAdapter, match="no safetensors header"):
        check_files(tmp_path, LORA, allow_pickle=True)


# -- against the base model


LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("name", "shape", "is_refused"),
    [
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (4, 8), False),
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (4, 4), True),
        (f"{LAYER}self_attn.q_proj.lora_B.weight", (4, 4), False),  # grouped heads, or others than hidden / heads: not ours to know
        (f"{LAYER}self_attn.o_proj.lora_B.weight", (16, 4), True),
        (f"{LAYER}mlp.down_proj.lora_A.weight", (4, 32), False),
        (f"{LAYER}mlp.down_proj.lora_B.weight", (32, 4), True),
        (f"{LAYER}mlp.experts.0.up_proj.lora_A.weight", (4, 4), False),
        ("base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", (4, 4), False),
        ("base_model.model.lm_head.lora_A.weight", (4, 4), False),
        ("q_proj.lora_A.weight", (4, 4), False),
    ],
)
def test_tensors_of_another_width_than_the_base_model_are_refused(tmp_path: Path, name: str, shape: tuple[int, int], is_refused: bool) -> None:
    """vLLM would take narrower ones without a word. Only what reads or writes a decoder's hidden state is compared, and only where it is known."""
    size = shape[0] * shape[1] * 4
    path = weights_at(tmp_path, {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}, bytes(size))
    config = AdapterConfig("base", 4, frozenset({4}), frozenset())
    check_weights(path, config)
    if is_refused:
        with pytest.raises(InvalidAdapter, match="the base model has 8"):
            check_weights(path, config, 8)
    else:
        check_weights(path, config, 8)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ('{"hidden_size": 64}', 64),
        ('{"text_config": {"hidden_size": 32}, "vision_config": {"hidden_size": 16}}', 32),
        ("{}", 0),
        ('{"hidden_size": "64"}', 0),
        ('{"hidden_size": true}', 0),
        ("[]", 0),
        ("{", 0),
    ],
)
def test_a_base_models_width_is_read_where_it_stands(tmp_path: Path, text: str, width: int) -> None:
    """What cannot be read is not known, and nothing is compared."""
    file = tmp_path / "config.json"
    assert hidden_size(file) == 0
    file.write_text(text)
    assert hidden_size(file) == width


def test_a_base_model_may_have_other_names() -> None:
    """Patterns; with the name that the engine needs the rest stays as it was."""
    text = config_with(base_model_name_or_path="org/llama-8b")
    assert check_config(text, base_model="/models/llama", base_names=("org/llama-*",)).base_model == "org/llama-8b"
    with pytest.raises(InvalidAdapter, match="org/llama-8b"):
        check_config(text, base_model="/models/llama", base_names=("else/*",))
    assert json.loads(with_base(text, "/models/llama")) == {**GOOD, "base_model_name_or_path": "/models/llama"}
