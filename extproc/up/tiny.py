"""A language model of 600 KB that talks nonsense, and adapters for it, for a real vLLM on two CPU cores. Made of the standard library, without a network.

A random Llama of two layers; its tokenizer has a token per byte and no merges. Adapters are strong enough that each answers differently.
"""

import json
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .demo import NAMES, write_config

SERVED_NAME = "tiny"
HIDDEN, LAYERS, HEADS, INNER, VOCABULARY = 64, 2, 2, 128, 512
MAX_POSITIONS = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Tensors = Mapping[str, Sequence[int]]


def write_tiny(directory: Path, origin: Path) -> Path:
    """Write what is missing of the base model below `directory`, and of the demonstration's adapters for it below `origin`; the base model's path."""
    base = directory / "tiny-model"
    if not (base / "config.json").exists():
        write_base(base)
    for seed, name in enumerate(NAMES):
        if not (origin / name / "adapter_config.json").exists():
            write_lora(origin / name, base_model=str(base), seed=seed)
    return base


def write_base(directory: Path) -> None:
    """The base model; its configuration is written last."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory)
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    norms = ["model.norm.weight"]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        norms += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
    _write_safetensors(directory / "model.safetensors", shapes, seed=0, scale=0.1, ones=norms)
    _dump(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    _dump(directory / "config.json", config)


def write_lora(
    directory: Path, *, base_model: str, seed: int, rank: int = 4, modules: Sequence[str] = ("q_proj", "v_proj"), width: int = HIDDEN, scale: float = 1.0
) -> Path:
    """One adapter of 10 KB; the weights' path. The configuration is written last."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, Sequence[int]] = {}
    for layer in range(LAYERS):
        for module in modules:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}."
            shapes |= {f"{prefix}lora_A.weight": (rank, width), f"{prefix}lora_B.weight": (width, rank)}
    weights = directory / "adapter_model.safetensors"
    _write_safetensors(weights, shapes, seed=seed + 1, scale=scale)
    write_config(directory, base_model=base_model, rank=rank, modules=modules)
    return weights


def _write_safetensors(path: Path, shapes: Tensors, *, seed: int, scale: float, ones: Iterable[str] = ()) -> None:
    """Normally distributed F32 tensors, and norms that are one."""
    source = random.Random(seed)  # noqa: S311  # the same model each time, not a secret
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()

    def add(name: str, shape: Sequence[int], values: Sequence[float]) -> None:
        begin = len(data)
        data.extend(struct.pack(f"<{len(values)}f", *values))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(data)]}

    for name, (rows, columns) in shapes.items():
        add(name, (rows, columns), [source.gauss(0.0, scale) for _ in range(rows * columns)])
    for name in ones:
        add(name, (HIDDEN,), [1.0] * HIDDEN)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_tokenizer(directory: Path) -> None:
    """Byte-level BPE without merges."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *_byte_letters()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **added} for index, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    _dump(directory / "tokenizer.json", tokenizer)
    names = {"bos_token": SPECIAL[0], "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    _dump(
        directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS, "chat_template": CHAT, **names}
    )


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte, as GPT-2's byte-level BPE has it: itself where it is printable, else from U+0100 on."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in itself else chr(next(others)) for byte in range(256)]


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
