"""Tensors of another width than the base model are refused where their width is known by construction, and nowhere else."""

import json
from pathlib import Path

import pytest

from extproc.errors import InvalidAdapter
from extproc.stager.adapter.safetensors import Header
from extproc.stager.adapter.width import check_width, hidden_size

LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (4, 4)),
        (f"{LAYER}self_attn.o_proj.lora_B.weight", (16, 4)),
        (f"{LAYER}mlp.down_proj.lora_B.weight", (32, 4)),
        ("model.layers.10.mlp.gate_up_proj.lora_A.weight", (4, 16)),
        ("base_model.model.model.language_model.layers.1.self_attn.k_proj.lora_A.weight", (4, 16)),
    ],
)
def test_tensors_of_another_width_than_the_base_model_are_refused(name: str, shape: tuple[int, int]) -> None:
    """vLLM would take narrower ones without a word."""
    with pytest.raises(InvalidAdapter, match="the base model has 8"):
        check_width(Header(0, {name: shape}), 8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (4, 8)),
        (f"{LAYER}self_attn.q_proj.lora_B.weight", (4, 4)),  # grouped heads, or others than hidden / heads: not ours to know
        (f"{LAYER}mlp.down_proj.lora_A.weight", (4, 32)),
        (f"{LAYER}mlp.experts.0.up_proj.lora_A.weight", (4, 4)),
        (f"{LAYER}mlp.shared_expert.up_proj.lora_A.weight", (4, 4)),
        (f"{LAYER}shared_transformer.self_attn.q_proj.lora_A.weight", (4, 16)),  # Zamba2: twice the hidden state
        ("base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", (4, 4)),
        ("base_model.model.model.visual.layers.0.self_attn.q_proj.lora_A.weight", (4, 4)),
        ("base_model.model.apm.layers.0.self_attn.q_proj.lora_A.weight", (4, 4)),  # MiniCPM-o's audio tower
        ("base_model.model.tts.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 4)),  # and its speech head
        ("base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight", (4, 4)),
        ("base_model.model.lm_head.lora_A.weight", (4, 4)),
        ("q_proj.lora_A.weight", (4, 4)),
    ],
)
def test_other_widths_are_not_ours_to_know(name: str, shape: tuple[int, int]) -> None:
    """Only what reads or writes a decoder's hidden state is compared."""
    check_width(Header(0, {name: shape}), 8)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ('{"hidden_size": 64}', 64),
        ('{"text_config": {"hidden_size": 32}, "vision_config": {"hidden_size": 16}}', 32),
        ('{"hidden_size": 16, "text_config": {"hidden_size": 32}}', 32),
        ('{"hidden_size": 64, "text_config": null}', 64),
        ("{}", 0),
        ('{"hidden_size": "64"}', 0),
        ('{"hidden_size": true}', 0),
        ("[]", 0),
        ("{", 0),
        (json.dumps({"x": []}).replace("[]", "[" * 5000 + "]" * 5000), 0),
    ],
)
def test_a_base_models_width_is_read_where_it_stands(tmp_path: Path, text: str, width: int) -> None:
    """What cannot be read is not known, and nothing is compared."""
    file = tmp_path / "config.json"
    assert hidden_size(file) == 0
    file.write_text(text)
    assert hidden_size(file) == width
