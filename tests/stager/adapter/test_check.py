"""A whole adapter through its one entry: what the parts refuse, what they let pass, and what goes on into the engine's load call."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from extproc.config.stager import StagerSettings
from extproc.errors import AdapterTooLarge, InvalidAdapter
from extproc.stager.adapter.check import Checked, check, options
from extproc.stager.adapter.rules import Rules
from extproc.stager.threads import through
from tests.fakes.adapters import CONFIG, HIDDEN, LAYERS, PICKLE, RANK, WEIGHTS, small_files, split
from tests.fakes.adapters import safetensors as file_of

from .test_config import config_with

Q = "base_model.model.model.layers.0.self_attn.q_proj"
E = "base_model.model.model.layers.0.mlp.experts"


def put(directory: Path, tensors: dict[str, tuple[int, ...]] | None = None, *, value: float = 1.0, **config: Any) -> Path:
    """A good configuration, changed, and F16 tensors of these shapes beside a good pair."""
    shapes = {f"{Q}.lora_A.weight": (4, 8), f"{Q}.lora_B.weight": (8, 4), **(tensors or {})}
    (directory / CONFIG).write_bytes(config_with(**config))
    safetensors.numpy.save_file({name: np.full(shape, value, np.float16) for name, shape in shapes.items()}, directory / WEIGHTS)
    return directory


def checked(directory: Path, rules: Rules | None = None) -> Checked:
    return through(check(directory, rules or Rules()))


def pair(module: str, rank: int = 4) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": (rank, 8), f"{module}.lora_B.weight": (8, rank)}


def test_the_demonstration_adapters_pass_here_and_in_the_real_library(tmp_path: Path) -> None:
    """What `up` serves is what PEFT would write."""
    for name, data in small_files().items():
        (tmp_path / name).write_bytes(data)
    assert checked(tmp_path) == Checked(LAYERS * 2 * 2, {})
    with safe_open(tmp_path / WEIGHTS, framework="np") as opened:
        assert {tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {(RANK, HIDDEN), (HIDDEN, RANK)}  # noqa: SIM118


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (pair("base_model.model.lm_head"), {"target_modules": ["embed_tokens", "q_proj"]}),
        (pair("base_model.model.model.layers.0.self_attn.qkv_proj"), {"target_modules": []}),
        ({**pair(E, 32), **pair(f"{E}.base_layer", 32)}, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
        (pair(f"{E}.0.up_proj", 8), {"rank_pattern": {"up_proj": 8}}),
        ({"model.embed_tokens.lora_embedding_A": (4, 30), "model.embed_tokens.lora_embedding_B": (8, 4)}, {}),
        ({"base_model.model.model.embed_tokens.base_layer.weight": (30, 8)}, {}),
        (pair("model.layers.1.self_attn.q_proj"), {}),
        (pair("base_model.model.apm.layers.0.self_attn.q_proj"), {}),
        ({"base_model.model.score.weight": (2, 8)}, {"modules_to_save": ["score"]}),
    ],
    ids="tied embeddings|fused names|experts in one tensor|experts|embeddings|base weights|bare names|other towers|head".split("|"),  # noqa: SIM905
)
def test_what_vllm_serves_passes(tmp_path: Path, tensors: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """No rule of our own stands against it, neither the configured modules nor the base model's width."""
    checked(put(tmp_path, tensors, **config), Rules(width=8))


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (pair("_orig_mod.base_model.model.model.layers.0.self_attn.q_proj"), "would answer as the base model"),
        (pair("base_model.model._fsdp_wrapped_module.model.layers.0.self_attn.q_proj"), "would answer as the base model"),
        (pair("module.base_model.model.model.layers.0.self_attn.q_proj"), "would answer as the base model"),
        ({f"{Q}.lora_A.weight": (0,), f"{Q}.lora_B.weight": (0,)}, "ZeRO-3|empty"),
        ({f"{E}.0.up_proj.lora_A.weight": (4, 8)}, "has a lora_A alone"),
        ({f"{E}.0.up_proj.lora_B.weight": (8, 4)}, "has a lora_B alone"),
        ({f"{E}.0.up_proj.lora_A.default.weight": (4, 8), f"{E}.0.up_proj.lora_B.default.weight": (8, 4)}, "another name"),
        ({f"{E}.0.up_proj.lora_A.weight": (4,), f"{E}.0.up_proj.lora_B.weight": (8, 4)}, "1 dimensions"),
        ({"foo.bar": (4,)}, "no LoRA matrices"),
        (pair(f"{E}.0.up_proj", 8), "rank 8, the configuration 4: vLLM would load it, scaled by the configuration's r"),
        ({**pair(E, 30), **pair(f"{E}.base_layer", 8)}, "no multiple of 4"),
        ({"model.embed_tokens.lora_embedding_A": (5, 30), "model.embed_tokens.lora_embedding_B": (8, 5)}, "has rank 5"),
    ],
)
def test_what_loads_nothing_or_not_at_all_is_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]], complaint: str) -> None:
    """Each would cost a download and then be an engine's error, or 200 with the base model's words."""
    with pytest.raises(InvalidAdapter, match=complaint):
        checked(put(tmp_path, tensors))


def test_experts_in_one_tensor_are_told_to_the_engine(tmp_path: Path) -> None:
    """vLLM needs `is_3d_lora_weight` in the load call."""
    put(tmp_path, {**pair(E, 32), **pair(f"{E}.base_layer", 32)})
    assert checked(tmp_path).options == {"is_3d_lora_weight": True}
    assert through(options(tmp_path)) == {"is_3d_lora_weight": True}


def test_weights_that_are_not_finite_are_refused_unless_that_is_switched_off(tmp_path: Path) -> None:
    """A request to such an adapter spoils the answers of others on the same engine."""
    put(tmp_path, value=float("nan"))
    with pytest.raises(InvalidAdapter, match=rf"tensor '{Q}.lora_A.weight' holds an infinity or a NaN"):
        checked(tmp_path)
    checked(tmp_path, Rules(finite=False))


def test_tensors_of_another_width_are_refused_where_the_width_is_known(tmp_path: Path) -> None:
    """It is read from the base model's own configuration."""
    put(tmp_path)
    checked(tmp_path, Rules(width=8))
    with pytest.raises(InvalidAdapter, match="is 8 wide; the base model has 16"):
        checked(tmp_path, Rules(width=16))


def test_a_mutilated_adapter_of_the_demonstration_is_refused(tmp_path: Path) -> None:
    """Each tensor of it left out, one at a time, leaves a hole."""
    files = small_files()
    (tmp_path / CONFIG).write_bytes(files[CONFIG])
    header, data = split(files[WEIGHTS])
    for name in [name for name in header if name != "__metadata__"]:
        (tmp_path / WEIGHTS).write_bytes(file_of({key: value for key, value in header.items() if key != name}, data))
        with pytest.raises(InvalidAdapter):
            checked(tmp_path)


def test_limits_of_size_count_for_what_is_on_the_disk(tmp_path: Path) -> None:
    """Of one file, and of all that an engine reads; 0 is no limit. Other files are nobody's business."""
    put(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(bytes(10_000))
    weights, config = ((tmp_path / name).stat().st_size for name in (WEIGHTS, CONFIG))
    checked(tmp_path, Rules(max_bytes=weights + config, max_file_bytes=max(weights, config)))
    with pytest.raises(AdapterTooLarge, match="max_file_bytes"):
        checked(tmp_path, Rules(max_file_bytes=max(weights, config) - 1))
    with pytest.raises(AdapterTooLarge, match="max_adapter_bytes"):
        checked(tmp_path, Rules(max_bytes=weights + config - 1))


def test_a_directory_needs_both_files(tmp_path: Path) -> None:
    """A configuration alone is no adapter, nor are weights."""
    with pytest.raises(FileNotFoundError):
        checked(tmp_path)
    (tmp_path / CONFIG).write_bytes(config_with())
    with pytest.raises(InvalidAdapter, match="is missing"):
        checked(tmp_path, Rules(allow_pickle=True))


def test_pickled_weights_pass_only_where_they_are_allowed(tmp_path: Path) -> None:
    """They can run code when an engine loads them, and whoever put them there is told so."""
    (tmp_path / CONFIG).write_bytes(config_with())
    (tmp_path / PICKLE).write_bytes(b"\x80\x04.")
    assert checked(tmp_path, Rules(allow_pickle=True)) == Checked(0, {})
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.bin holds pickled weights") as raised:
        checked(tmp_path)
    assert raised.value.what == "pickle"


def test_safetensors_are_checked_though_pickle_is_allowed_and_there(tmp_path: Path) -> None:
    """The engine prefers the safetensors file."""
    (tmp_path / CONFIG).write_bytes(config_with())
    (tmp_path / PICKLE).write_bytes(b"\x80\x04.")
    (tmp_path / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(InvalidAdapter, match="no safetensors header"):
        checked(tmp_path, Rules(allow_pickle=True))


def test_rules_are_what_the_settings_say() -> None:
    """The engine's own limit counts before the settings'; what is adopted under vLLM's resolver must name the base model exactly."""
    raw = {"engine": {"base_model": "b", "base_names": ["c*"], "max_lora_rank": 8, "mode": "resolver"}, "allow_pickle": True, "verify": {"finite": False}}
    settings = StagerSettings.model_validate(raw)
    rules = Rules.of(settings, max_rank=16, width=64)
    sizes = {"max_bytes": settings.max_adapter_bytes, "max_file_bytes": settings.max_file_bytes}
    assert rules == Rules("b", ("c*",), 16, 64, "vllm", "", by_resolver=True, allow_pickle=True, finite=False, **sizes)
    assert Rules.of(settings).max_rank == 8
    assert Rules.of(settings, adopted=True).base_names == ()
    by_api = StagerSettings.model_validate(json.loads(json.dumps(raw).replace("resolver", "api")))
    assert Rules.of(by_api, adopted=True).base_names == ("c*",)
