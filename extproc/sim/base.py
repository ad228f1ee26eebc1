"""What the simulated engine knows of its base model: which modules LoRA may be on, how wide each is, how many layers there are.

Read from the model's `config.json` where `root` is a directory that has one; otherwise a Llama whose widths nobody knows, so nothing is compared with them.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import StartError

_ATTENTION, _MLP, _EDGES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("embed_tokens", "lm_head")
_LAYER = re.compile(r"model\.layers\.(\d+)\..+")


@dataclass(frozen=True, slots=True)
class Base:
    """`widths` gives (what it reads, what it writes) per module; `vocabulary`, `layers`: 0 where they are not known; `experts`: 0 without any."""

    modules: frozenset[str] = frozenset({*_ATTENTION, *_MLP, *_EDGES})
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    vocabulary: int = 0
    layers: int = 0
    experts: int = 0
    experts_apart: frozenset[str] = frozenset()  # "experts.0.gate_proj" and so on: the names where each has its own

    @classmethod
    def of(cls, root: str) -> "Base":
        """The model below `root`, which may be a name only. Raises StartError if its configuration is none that is known here."""
        path = os.path.join(root, "config.json")
        if not root or not os.path.exists(path):
            return cls()
        try:
            with open(path, "rb") as file:
                config = json.load(file)
            return cls._from_config(config.get("text_config") or config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StartError(f"{path}: not the configuration of a language model: {error!r}") from None

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> "Base":
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries, keys = head * config["num_attention_heads"], head * config.get("num_key_value_heads", config["num_attention_heads"])
        widths = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden)}
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        if experts:
            widths["gate"] = (hidden, experts)
        else:
            widths |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        widths |= {"embed_tokens": (vocabulary, hidden), "lm_head": (hidden, vocabulary)}
        apart = frozenset(f"experts.{number}.{matrix}" for number in range(experts) for matrix in _MLP)
        return cls(frozenset(widths), widths, vocabulary, config["num_hidden_layers"], experts, apart)

    def has_experts(self, name: str) -> bool:
        """Whether `name`, what a module's name has from "experts" on, is that of all experts or of one expert's matrix."""
        return bool(self.experts) and (name == "experts" or name in self.experts_apart)

    def has(self, module: str) -> bool:
        """Whether LoRA on a module of this full name changes an answer. A vLLM passes over every other name without a word."""
        if module in ("lm_head", "model.embed_tokens"):
            return True
        layer = _LAYER.fullmatch(module)
        return layer is not None and not (self.layers and int(layer[1]) >= self.layers)
