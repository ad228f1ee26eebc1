"""What is checked before anybody can see an adapter: its configuration, and the safetensors header by the format's own rules.

Every refusal is an InvalidAdapter that names the file and why. Reads headers only, never tensor data.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from ...errors import InvalidAdapter
from .files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE

MAX_CONFIG_BYTES = 2**20  # real ones have some kilobytes
MAX_NUMBER = 2**63 - 1  # readers keep sizes and ranges in machine words
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

# dtype -> bits, as the safetensors format names them
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# Of a decoder's layers: modules that read the hidden state, and modules that write it.
_FROM_HIDDEN = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"})
_TO_HIDDEN = frozenset({"o_proj", "down_proj"})
_TOWERS = ("vision", "visual", "audio", "encoder", "cross", "experts")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of `adapter_config.json` matters here."""

    base_model: str
    rank: int
    ranks: frozenset[int]  # the rank and those of rank_pattern
    target_modules: frozenset[str]  # empty: a pattern, or all linear layers


def check_config(text: bytes, *, base_model: str = "", base_names: Sequence[str] = (), max_rank: int = 0) -> AdapterConfig:
    """Read a PEFT LoRA configuration. `base_model` "" and `max_rank` 0 switch those checks off; `base_names` are patterns of its other names."""
    if len(text) > MAX_CONFIG_BYTES:
        _refuse(CONFIG_FILE, f"has {len(text)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(CONFIG_FILE, f"is not JSON: {error}")
    if not isinstance(raw, dict):
        _refuse(CONFIG_FILE, "is not a JSON object")
    if raw.get("peft_type") != "LORA":
        _refuse(CONFIG_FILE, f"has peft_type {raw.get('peft_type')!r}; LORA is needed")
    if raw.get("auto_map"):
        _refuse(CONFIG_FILE, "has auto_map: code from the repository is never run", "code")
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str):
        _refuse(CONFIG_FILE, "has no base_model_name_or_path")
    if base_model and base != base_model and not any(fnmatchcase(base, pattern) for pattern in base_names):
        _refuse(CONFIG_FILE, f"is for base model {base!r}; this node serves {base_model!r}", "base_model")
    rank = raw.get("r")
    if not isinstance(rank, int) or not _is_count(rank):
        _refuse(CONFIG_FILE, f"has r {rank!r}; a positive whole number is needed")
    alpha = raw.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        _refuse(CONFIG_FILE, "has no lora_alpha that is a number")
    pattern = raw.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(_is_count(r) for r in pattern.values()):
        _refuse(CONFIG_FILE, "has a rank_pattern that is not an object of positive whole numbers")
    ranks = frozenset({rank, *pattern.values()})
    if max_rank and max(ranks) > max_rank:
        _refuse(CONFIG_FILE, f"has rank {max(ranks)}; this node's engine takes up to {max_rank}", "rank")
    targets = raw.get("target_modules")
    if isinstance(targets, str) and targets:
        return AdapterConfig(base, rank, ranks, frozenset())
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        _refuse(CONFIG_FILE, "has no target_modules")
    return AdapterConfig(base, rank, ranks, frozenset(targets))


def with_base(text: bytes, base_model: str) -> bytes:
    """A configuration that was checked, made to name `base_model`."""
    return json.dumps({**json.loads(text), "base_model_name_or_path": base_model}, indent=2).encode()


def hidden_size(path: Path) -> int:
    """The width of a base model, from its `config.json`; 0 if that does not tell. Vision-language models have it under `text_config`. Blocks."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return 0
    for part in (raw, raw.get("text_config")) if isinstance(raw, dict) else ():
        if isinstance(part, dict) and _is_count(part.get("hidden_size")):
            return int(part["hidden_size"])
    return 0


def check_weights(path: Path, config: AdapterConfig, width: int = 0) -> int:
    """Check the safetensors file at `path` against the format and `config`; the number of tensors. Raises InvalidAdapter.

    `width`: the base model's hidden size; 0: not known, not compared.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        text = file.read(header_length(file.read(8), size))
    return check_header(text, size, config, width)


def header_length(prefix: bytes, size: int) -> int:
    """Bytes of the header that follows `prefix`, the first eight bytes of a file of `size` bytes. Raises InvalidAdapter."""
    if len(prefix) < 8:
        _refuse(WEIGHTS_FILE, f"has {size} bytes: no safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or length > size - 8:
        _refuse(WEIGHTS_FILE, f"says its header has {length} bytes; the file has {size} and the format allows {MAX_HEADER_BYTES}")
    return int(length)


def check_header(text: bytes, size: int, config: AdapterConfig, width: int = 0) -> int:
    """Check the header `text` of a safetensors file of `size` bytes, as check_weights does; the number of tensors. Raises InvalidAdapter."""
    if not text.startswith(b"{"):
        _refuse(WEIGHTS_FILE, "has a header that does not begin with '{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _refuse(WEIGHTS_FILE, f"has a broken header: {error}")
    if not isinstance(header, dict):
        _refuse(WEIGHTS_FILE, "has a header that is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(WEIGHTS_FILE, "has a __metadata__ that is not made of strings")
    _check_layout(header, size - 8 - len(text))
    _check_lora(header, config)
    if width:
        _check_width(header, width)
    return len(header)


def check_files(directory: Path, config: AdapterConfig, *, allow_pickle: bool, width: int = 0) -> None:
    """Check what is in an artifact's directory beside its configuration, before it is published."""
    if os.path.lexists(directory / WEIGHTS_FILE):
        check_weights(directory / WEIGHTS_FILE, config, width)
    elif not (allow_pickle and any((directory / path).exists() for path in PICKLE_FILES)):
        _refuse(WEIGHTS_FILE, "is missing")


def _check_layout(header: Mapping[str, Any], data_bytes: int) -> None:
    """Ranges in order without holes or overlap, each as long as dtype and shape say, together as long as the data."""
    spans: list[tuple[int, int, str]] = []
    for name, tensor in header.items():
        try:
            dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        except (TypeError, KeyError, ValueError):
            _refuse(WEIGHTS_FILE, f"tensor {name!r} lacks dtype, shape or data_offsets")
        numbers = (*shape, begin, end) if isinstance(shape, list) else (None,)
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_NUMBER for n in numbers) or begin > end:
            _refuse(WEIGHTS_FILE, f"tensor {name!r} has a shape or range that is not made of whole numbers")
        if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
            _refuse(WEIGHTS_FILE, f"tensor {name!r} has unknown dtype {dtype!r}")
        if math.prod(shape) * _DTYPE_BITS[dtype] != (end - begin) * 8:
            _refuse(WEIGHTS_FILE, f"tensor {name!r}: shape {shape} of {dtype} does not take {end - begin} bytes")
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            _refuse(WEIGHTS_FILE, f"tensor {name!r} begins at byte {begin} of the data; {expected} was expected")
        expected = end
    if expected != data_bytes:
        _refuse(WEIGHTS_FILE, f"tensors take {expected} bytes; the file holds {data_bytes} (cut short or padded)")


def _check_lora(header: Mapping[str, Any], config: AdapterConfig) -> None:
    """Tensors that are LoRA matrices of the configured rank and modules."""
    matrices = 0
    for name, tensor in header.items():
        parts = name.split(".")
        side = next((p for p in parts if p in ("lora_A", "lora_B")), None)
        if side is None:
            continue
        matrices += 1
        shape = tensor["shape"]
        if len(shape) == 2:
            rank = shape[0] if side == "lora_A" else shape[1]
            if rank not in config.ranks:
                _refuse(WEIGHTS_FILE, f"tensor {name!r} has rank {rank}; {CONFIG_FILE} says {config.rank}")
        module = ".".join(parts[: parts.index(side)])
        if not module:
            _refuse(WEIGHTS_FILE, f"tensor {name!r} names no module")
        if config.target_modules and not any(module == t or module.endswith(f".{t}") for t in config.target_modules):
            _refuse(WEIGHTS_FILE, f"tensor {name!r} is for a module that {CONFIG_FILE} does not target")
    if not matrices:
        _refuse(WEIGHTS_FILE, "holds no lora_A or lora_B tensor")


def _check_width(header: Mapping[str, Any], width: int) -> None:
    """vLLM takes tensors that are narrower than the model without a word, and answers with something. Towers beside the language model differ in width."""
    for name, tensor in header.items():
        parts = name.split(".")
        if not any(name.endswith(f".{side}.weight") for side in ("lora_A", "lora_B")) or len(tensor["shape"]) != 2 or len(parts) < 3:
            continue
        module, side = parts[-3], parts[-2]
        if "layers" not in parts or any(tower in name for tower in _TOWERS):
            continue
        found = (
            tensor["shape"][1] if side == "lora_A" and module in _FROM_HIDDEN else tensor["shape"][0] if side == "lora_B" and module in _TO_HIDDEN else width
        )
        if found != width:
            _refuse(WEIGHTS_FILE, f"tensor {name!r} is {found} wide; the base model has {width}", "base_model")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse(file: str, why: str, what: str = "") -> NoReturn:
    raise InvalidAdapter(f"{file} {why}", what or ("config" if file == CONFIG_FILE else "weights"))
