"""Whether tensors are as wide as the base model. vLLM takes narrower ones without a word, and answers with something.

Compared are only projections that read or write the hidden state by the construction of a decoder layer, and only where their whole path is that
of the language model: towers beside it (`vision_tower.`, `apm.`, `tts.`), shared blocks (Zamba2's read twice the hidden state) and experts are not.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .files import WEIGHTS_FILE, refuse
from .safetensors import Header

MAX_BASE_CONFIG_BYTES = 4 * 2**20  # of a base model's config.json; real ones have some kilobytes

# where language models keep their decoder layers, below PEFT's prefix: alone, and inside of multi-modal models as transformers writes and wrote them
_STARTS = ("model", "language_model.model", "model.language_model", "llm.model", "thinker.model")
_READS = {"self_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "mlp": ("gate_proj", "up_proj", "gate_up_proj")}
_WRITES = {"self_attn": ("o_proj",), "mlp": ("down_proj",)}


def hidden_size(path: Path) -> int:
    """The width of a base model, from its `config.json`; 0 if that does not tell. Vision-language models have it under `text_config`. Blocks."""
    try:
        with path.open("rb") as file:
            raw = msgspec.json.decode(file.read(MAX_BASE_CONFIG_BYTES))
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0
    for part in (raw.get("text_config"), raw) if isinstance(raw, dict) else ():
        if isinstance(part, dict) and type(size := part.get("hidden_size")) is int and size > 0:
            return size
    return 0


class Widths:
    """Those of base models, by the path of their configuration. What could not be read is read again: it may be mounted later than this starts."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}  # as many as an engine ever named

    def of(self, path: str) -> int:
        """0 where it cannot be read. Blocks."""
        if path and not self._known.get(path):
            self._known[path] = hidden_size(Path(path))
        return self._known.get(path, 0)


def _pattern(modules: Mapping[str, tuple[str, ...]], side: str) -> str:
    paths = "|".join(rf"{block}\.(?:{'|'.join(names)})" for block, names in modules.items())
    return rf"(?:{paths})\.lora_{side}\.weight"


_STARTS_PATTERN = "|".join(map(re.escape, _STARTS))
_COMPARED = re.compile(rf"(?:base_model\.model\.)?(?:{_STARTS_PATTERN})\.layers\.[0-9]+\.(?:({_pattern(_READS, 'A')})|{_pattern(_WRITES, 'B')})")


def check_width(header: Header, width: int) -> None:
    """Raises InvalidAdapter for the first tensor that cannot belong to a base model of `width`."""
    for name, shape in header.shapes.items():
        match = _COMPARED.fullmatch(name)
        if match is None or len(shape) != 2:
            continue
        found = shape[1] if match[1] else shape[0]
        if found != width:
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} is {found} wide; the base model has {width}", "base_model")
