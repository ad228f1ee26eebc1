"""What the simulated engine knows of its base model, and what it makes of a directory that has none."""

import json
from pathlib import Path
from typing import Any

import pytest

from extproc.errors import StartError
from extproc.sim.base import Base
from tests.golden.peft.bases import MOE_CONFIG

CONFIG = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 500, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def base_of(directory: Path, config: object) -> Base:
    (directory / "config.json").write_text(json.dumps(config))
    return Base.of(str(directory))


@pytest.mark.parametrize("root", ["", "some/name", "/dev/null"])
def test_a_name_alone_tells_nothing(root: str) -> None:
    """A Llama of any width, with any number of layers."""
    base = Base.of(root)
    assert base.widths == {}
    assert base.has("model.layers.99.self_attn.q_proj")


@pytest.mark.parametrize("wrapped", [False, True])
def test_widths_come_from_the_configuration(wrapped: bool, tmp_path: Path) -> None:
    """With fewer heads for keys than for queries; of a multi-modal model, its language model's."""
    base = base_of(tmp_path, {"text_config": CONFIG} if wrapped else CONFIG)
    assert (base.widths["q_proj"], base.widths["k_proj"], base.widths["down_proj"]) == ((64, 64), (64, 32), (128, 64))
    assert (base.vocabulary, base.layers, base.experts) == (500, 2, 0)


def test_a_layer_that_is_not_there_has_no_effect(tmp_path: Path) -> None:
    """Nor has any name that is not exactly a module's."""
    base = base_of(tmp_path, CONFIG)
    assert base.has("model.layers.1.self_attn.q_proj")
    assert base.has("lm_head")
    assert not base.has("model.layers.2.self_attn.q_proj")
    assert not base.has("_orig_mod.model.layers.1.self_attn.q_proj")


def test_experts_have_names_of_their_own(tmp_path: Path) -> None:
    """All in one, or one by one."""
    base = base_of(tmp_path, MOE_CONFIG)
    assert base.experts == 4
    assert base.has_experts("experts")
    assert base.has_experts("experts.3.up_proj")
    assert not base.has_experts("experts.4.up_proj")
    assert not Base().has_experts("experts")


@pytest.mark.parametrize("config", [[], {}, {**CONFIG, "hidden_size": "64"}, {**CONFIG, "num_attention_heads": None}])
def test_a_configuration_of_something_else_is_told_at_the_start(config: Any, tmp_path: Path) -> None:
    """With its path."""
    with pytest.raises(StartError, match="not the configuration of a language model"):
        base_of(tmp_path, config)
