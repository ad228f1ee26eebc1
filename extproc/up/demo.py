"""Eight demonstration adapters: valid PEFT directories with real safetensors of 10 to 40 MB, the same bytes on every machine."""

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path

NAMES = tuple(f"demo/{name}" for name in ("sql", "legal", "support", "medical", "code-review", "summarize", "translate", "json"))
BASE_MODEL = "demo/base"

_PIECE_BYTES = 2**26  # written at once; a multiple of the generator's words, so that the bytes are the same as in one piece
# Of a BF16 number the higher byte has the sign and seven bits of the exponent: any byte becomes one of a number between 2^-15 and 2^-7, as weights are.
_SMALL = bytes(value & 0x83 | 0x38 for value in range(256))
_HIDDEN, _LAYERS = 4096, 16
_RANKS = (16, 24, 32, 40)  # 2 bytes x 16 layers x 2 modules x 2 matrices x 4096 x rank = 8.4 to 21 MB; two modules more double it


def write_demo_adapters(origin: Path) -> None:
    """Write what is missing of the eight below `origin`; each directory appears whole."""
    for index, name in enumerate(NAMES):
        directory = origin / name
        if not (directory / "adapter_config.json").exists():
            modules = ("q_proj", "v_proj") if index % 2 else ("q_proj", "k_proj", "v_proj")
            write_adapter(directory, seed=index, rank=_RANKS[index % len(_RANKS)], modules=modules)


def write_adapter(
    directory: Path,
    *,
    seed: int,
    rank: int = 8,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    hidden: int = _HIDDEN,
    layers: int = _LAYERS,
    base_model: str = BASE_MODEL,
) -> Path:
    """Write one PEFT LoRA adapter of random BF16 tensors; the weights' path. The configuration is written last."""
    directory.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for layer in range(layers):
        for module in modules:
            for side, shape in (("lora_A", [rank, hidden]), ("lora_B", [hidden, rank])):
                size = 2 * rank * hidden
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{side}.weight"
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    weights = directory / "adapter_model.safetensors"
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        source = random.Random(seed)  # noqa: S311  # the same adapter each time, not a secret
        for begin in range(0, offset, _PIECE_BYTES):
            piece = bytearray(source.randbytes(min(_PIECE_BYTES, offset - begin)))
            piece[1::2] = piece[1::2].translate(_SMALL)
            file.write(piece)
    write_config(directory, base_model=base_model, rank=rank, modules=modules)
    return weights


def write_config(directory: Path, *, base_model: str, rank: int, modules: Sequence[str]) -> None:
    """A PEFT LoRA configuration."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
