"""The base models that the goldens were made for: `up`'s tiny Llama, and a Qwen3-MoE of the same width and vocabulary, of 4 experts.

python -m tests.golden.peft.bases DIR    # under a Python that has transformers: writes DIR/llama and DIR/moe
"""

import sys
from pathlib import Path

from extproc.up.tiny import HEADS, HIDDEN, LAYERS, MAX_POSITIONS, VOCABULARY, write_base

LLAMA, MOE = "llama", "moe"
MOE_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


def write_moe(directory: Path) -> None:
    """The mixture of experts, by transformers, with the tokenizer of the Llama."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    write_base(directory)  # for the tokenizer's files; the rest is written over
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE_CONFIG)).save_pretrained(directory)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_base(root / LLAMA)
    write_moe(root / MOE)
