"""An adapter's files as a vLLM worker reads them: what it refuses, in its words, and what it loads without effect.

What shows a feature and whether vLLM serves it stands in `core/features.py`. Here is only what a running vLLM does beside that: the order of its checks, its
words, and the arithmetic in which it stumbles over what it never checks. Read in vLLM 0.32's `lora/peft_helper.py`, `lora_model.py` and
`model_manager.py`; tests/golden/peft holds this module to a real one's verdicts.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import features
from ..core.features import VLLM, Feature, Verdict
from .base import Base

BASE_SHA256 = "base"  # stands for the weights of an answer that no adapter had a part in

_PACKED = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})  # stacked with others in one layer, where one matrix of a pair may lack
_LM_HEAD_PADDING = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE: lm_head has rows for a multiple of so many tokens

_WORDS: Mapping[Feature, str] = {  # in the order in which vLLM says them
    features.WHOLE: 'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification models. '
    "Unsupported modules_to_save: {modules_to_save}",
    features.DORA: "vLLM does not yet support DoRA.",
    features.LORA_BIAS: "vLLM does not support LoRA bias (lora_bias).",
    features.CHANGED_BASE: "vLLM does not support init_lora_weights={init_lora_weights!r}. Inits such as PiSSA, OLoRA, CorDA and LoftQ modify the base model "
    "weights when PEFT loads the adapter. Convert it to a regular LoRA adapter with PEFT's path_initial_model_for_weight_conversion, or set "
    "init_lora_weights to true if the served base model already contains the modified weights.",
    features.ALORA: "vLLM does not support Activated LoRA (aLoRA).",
    features.REPLICATION: "vLLM does not support layer_replication.",
    features.BDLORA: "vLLM does not support block-diagonal LoRA (BD-LoRA).",
    features.QALORA: "vLLM does not support QALoRA.",
}
_BIAS = "Adapter bias is not supported."
_TOO_FEW_DIMENSIONS = "tuple index out of range"  # Python's words, for a shape without a second number


class LoadError(Exception):
    """The worker could not load an adapter's files."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in memory: `sha256` of its weights file, in hex, is all that its answers depend on; BASE_SHA256 if vLLM would apply none of them."""

    name: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the engine was started with: `--max-lora-rank` and `--enable-mixed-moe-lora-format`."""

    max_lora_rank: int
    mixed_moe_format: bool = False


@dataclass(frozen=True, slots=True)
class _Module:
    """The two matrices of one module, by shape; None where the file lacks one."""

    a: Sequence[int] | None = None
    b: Sequence[int] | None = None


def read_adapter(name: str, path: str, abilities: Abilities, base: Base, *, is_3d: bool = False) -> Loaded:
    """Read an adapter's files as a worker does. Raises FileNotFoundError or LoadError."""
    with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
        try:
            config = json.load(file)
            config["vllm_max_position_embeddings"] = None  # as vLLM does before it has looked whether it is an object
            _check_config(config, abilities)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LoadError(str(error)) from None
    weights_path = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(weights_path):
        raise LoadError(f"{path} doesn't contain tensors")  # a vLLM reads pickles, too; this engine has no torch
    shapes, sha256 = _read_weights(weights_path)
    try:
        has_effect = _check_weights(config, shapes, path, abilities, base, is_3d=is_3d)
    except (TypeError, KeyError, IndexError, AttributeError, re.error) as error:
        raise LoadError(str(error)) from None
    return Loaded(name, path, sha256 if has_effect else BASE_SHA256)


# -- the configuration


def _check_config(config: dict[str, Any], abilities: Abilities) -> None:
    """As `PEFTHelper`: what is missing, what is no number, then every feature it does not serve."""
    if missing := [key for key in ("lora_alpha", "r", "target_modules") if key not in config]:
        raise LoadError(f"Missing required configuration fields: {_set(missing)}")
    if config["r"] <= 0:
        raise LoadError(f"LoRA rank `r` must be a positive integer, got {config['r']}.")
    pattern = config.get("rank_pattern") or {}
    for key, rank in pattern.items():
        if not isinstance(rank, int) or rank <= 0:
            raise LoadError(f"LoRA rank for `{key}` in `rank_pattern` must be a positive integer, got {rank}.")
    _scale(config, config["r"], config["lora_alpha"])
    shown = {found.feature for found in features.of_config(config) if found.feature.verdict(VLLM) is Verdict.REFUSES}
    told = {**config, "modules_to_save": [module for module in config.get("modules_to_save") or () if module not in features.WHOLE_MODULES]}
    words = [text.format_map(told) for feature, text in _WORDS.items() if feature in shown]
    if (highest := max([config["r"], *pattern.values()])) > abilities.max_lora_rank:
        words.append(f"LoRA rank {highest} is greater than max_lora_rank {abilities.max_lora_rank}.")
    if features.BIAS in shown:
        words.append(_BIAS)
    if words:
        raise LoadError(" ".join(words))


def _scale(config: Mapping[str, Any], rank: Any, alpha: Any) -> float:
    """What `lora_B` is multiplied by. Raises TypeError as vLLM does where alpha is no number."""
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _scale_of(config: Mapping[str, Any], module: str) -> float:
    """The same with `rank_pattern` and `alpha_pattern`, whose keys are ends of names; for experts in one tensor, of the parameter's name."""
    experts = module.removesuffix(".base_layer")
    name = module if not experts.endswith(".experts") else f"{experts}.{'down_proj' if experts == module else 'gate_up_proj'}"
    values = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        match = next((value for end, value in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({end})$", name)), None)
        values.append(config[key] if match is None else match)
    return _scale(config, *values)


def _set(names: Iterable[str]) -> str:
    """As Python prints a set, but always in the same order."""
    return f"{{{', '.join(map(repr, sorted(names)))}}}"


# -- the weights


def _read_weights(path: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes by name, in the names' order, and the file's SHA-256."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > size - 8:
                raise LoadError("Error while deserializing header: header too large")
            tensors = json.loads(file.read(length))
            tensors.pop("__metadata__", None)
            if max((t["data_offsets"][1] for t in tensors.values()), default=0) != size - 8 - length:
                raise LoadError("Error while deserializing header: incomplete metadata, file not fully covered")
            file.seek(0)
            return {name: tuple(tensors[name]["shape"]) for name in sorted(tensors)}, hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise LoadError(f"Error while deserializing header: {error}") from error


def _check_weights(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], path: str, abilities: Abilities, base: Base, *, is_3d: bool) -> bool:
    """As `LoRAModel.from_local_checkpoint` and the manager after it; whether any tensor changes an answer. Raises LoadError."""
    _check_names(config, shapes, path, base)
    modules, heads = _modules(config, shapes, base)
    if base.experts:
        _check_experts(modules, abilities, base, is_3d=is_3d)
    if heads:
        raise LoadError(f"Cannot load full module {heads[0]!r}: the model does not expose a unique ClassificationHeadWithLoRA.")
    if not modules:
        raise LoadError("")  # a StopIteration, which has no words
    scales = {name: _scale_of(config, name) for name in modules}
    if any(module.b is None and scales[name] != 1 for name, module in modules.items()):
        raise LoadError("unsupported operand type(s) for *=: 'NoneType' and 'float'")
    used = {name: module for name, module in modules.items() if base.has(name)}
    for name, module in used.items():
        _check_fit(name, module, abilities, base)
    return any(module.a is not None and module.b is not None and scales[name] != 0 for name, module in used.items())


def _check_names(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], path: str, base: Base) -> None:
    """Every name is a LoRA matrix of a module that the model has somewhere, or is passed over."""
    unexpected = []
    saved = config.get("modules_to_save") or ()
    for name in shapes:
        if name.endswith(features.BASE_WEIGHTS) or "base_layer" in name:
            continue
        module = _parse(name)[0]
        last = module.rpartition(".")[2]
        experts = module[module.find(".experts") + 1 :] if ".experts" in module else None
        if (last not in base.modules and last not in saved) if experts is None else not base.has_experts(experts):
            unexpected.append(module)
    if unexpected:
        raise LoadError(
            f"While loading {path}, expected target modules in {_set(base.modules)} but received {unexpected}. "
            "Please verify that the loaded LoRA module is correct"
        )


def _parse(name: str) -> tuple[str, str, bool]:
    """The module that a tensor belongs to, the matrix ("A", "B"; "" for a head that was saved whole), and whether the module is an embedding."""
    parts = name.removeprefix(features.PREFIX).split(".")
    read = features.matrix(parts)
    if read is not None:
        return read
    if parts[-1] in ("weight", "bias") and len(parts) >= 2 and parts[-2] in features.WHOLE_MODULES:
        return parts[-2], "", False
    raise LoadError(f"{name} is unsupported LoRA weight")


def _modules(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], base: Base) -> tuple[dict[str, _Module], list[str]]:
    """Modules by full name, and the heads that are there whole."""
    modules: dict[str, _Module] = {}
    heads = []
    for name, shape in shapes.items():
        if name.endswith(features.BASE_WEIGHTS):
            continue
        module, side, is_embedding = _parse(name)
        if not side and module in (config.get("modules_to_save") or ()):
            heads.append(module)
            continue
        if is_embedding and side == "A" and base.vocabulary and shape[1] != base.vocabulary:
            raise LoadError(f"The embedding LoRA size({shape[1]}) must be consistent with the base model's vocabulary size({base.vocabulary}).")
        known = modules.get(module, _Module())
        modules[module] = _Module(shape, known.b) if side == "A" else _Module(known.a, shape)
    return modules, heads


def _check_experts(modules: Mapping[str, _Module], abilities: Abilities, base: Base, *, is_3d: bool) -> None:
    """A model that keeps its experts apart takes them in one tensor only where it was started and asked for that, and then both halves of them."""
    for name, module in modules.items():
        if not name.endswith(".experts"):
            continue
        if not (abilities.mixed_moe_format and is_3d):
            raise LoadError(
                f"LoRA adapter 1 contains fused 3D MoE weights for {name!r}, but the model uses a 2D MoE LoRA wrapper. Start the engine with "
                "enable_mixed_moe_lora_format=True (--enable-mixed-moe-lora-format) and set is_3d_lora_weight=True on the LoRA request."
            )
        for one in (module, modules.get(f"{name}.base_layer")):
            if one is None or one.a is None or one.b is None:
                raise LoadError("")  # an assertion, which has no words
            if one.a[0] % base.experts:
                raise LoadError(f"shape '[{base.experts}, -1, {one.a[1]}]' is invalid for input of size {one.a[0] * one.a[1]}")
            if (rank := one.a[0] // base.experts) > abilities.max_lora_rank:
                raise _mismatch(abilities.max_lora_rank, rank, 1)
    apart = {name.rpartition(".experts.")[0] for name in modules if ".experts." in name and not name.endswith(".base_layer")}
    wanted = [f"{layer}.{name}" for layer in apart if base.has(layer) for name in base.experts_apart]
    if any(name not in modules for name in wanted):
        raise LoadError("")  # an assertion, too: one expert without LoRA is not thought of


def _check_fit(name: str, module: _Module, abilities: Abilities, base: Base) -> None:
    """The matrices are copied into slots of the engine's rank and the model's widths: narrower ones fit, and so nobody notices them."""
    last = name.rpartition(".")[2]
    if (module.a is None or module.b is None) and last not in _PACKED:
        raise LoadError("")  # an assertion, which has no words
    if ".experts" in name:
        return
    reads, writes = base.widths.get(last, (0, 0))
    if last == "lm_head":
        writes = -(-writes // _LM_HEAD_PADDING) * _LM_HEAD_PADDING
    for shape, limits in ((module.a, (abilities.max_lora_rank, reads)), (module.b, (writes, abilities.max_lora_rank))):
        if shape is None:
            continue
        if len(shape) < 2:
            raise LoadError(_TOO_FEW_DIMENSIONS)
        for dimension in (1, 0):  # as torch compares them: from the last
            limit, given = limits[dimension], shape[dimension]
            if limit and given > limit:
                raise _mismatch(limit, given, dimension)


def _mismatch(limit: int, given: int, dimension: int) -> LoadError:
    """What torch says when a tensor is copied into a smaller place."""
    return LoadError(f"The size of tensor a ({limit}) must match the size of tensor b ({given}) at non-singleton dimension {dimension}")
