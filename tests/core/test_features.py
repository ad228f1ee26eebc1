"""Each row of the table is shown by a configuration or by tensors, means what the engine's source says, and stands in README."""

import re
from pathlib import Path
from typing import Any

import pytest

from extproc.core import features
from extproc.core.features import SGLANG, TABLE, VLLM, Feature, Verdict, complaint, features_table, load_options, of_config, of_tensors, ranks

README = Path(__file__).parents[2] / "README.md"
GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
E = "base_model.model.model.layers.0.mlp.experts"
PAIR = {f"{Q}.lora_A.weight": [4, 8], f"{Q}.lora_B.weight": [8, 4]}


def shown(config: dict[str, Any] | None = None, tensors: dict[str, list[int]] | None = None) -> list[Feature]:
    """The features of a good adapter with these changes."""
    whole = {**GOOD, **(config or {})}
    return [found.feature for found in (*of_config(whole), *of_tensors(whole, {**PAIR, **(tensors or {})}))]


def pair(module: str, rank: int = 4) -> dict[str, list[int]]:
    return {f"{module}.lora_A.weight": [rank, 8], f"{module}.lora_B.weight": [8, rank]}


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"use_rslora": True}, features.RSLORA),
        ({"rank_pattern": {"q_proj": 8}}, features.PATTERNS),
        ({"alpha_pattern": {"q_proj": 8}}, features.PATTERNS),
        ({"target_modules": ".*q_proj"}, features.EXPRESSION),
        ({"target_modules": None}, features.NO_TARGETS),
        ({"peft_type": None}, features.NO_METHOD),
        ({"peft_type": "IA3"}, features.OTHER_METHOD),
        ({"modules_to_save": ["score"]}, features.HEAD),
        ({"modules_to_save": ["lm_head", "score"]}, features.WHOLE),
        ({"modules_to_save": "lm_head"}, features.WHOLE),
        ({"use_dora": True}, features.DORA),
        ({"init_lora_weights": "pissa_niter_16"}, features.CHANGED_BASE),
        ({"init_lora_weights": "olora"}, features.CHANGED_BASE),
        ({"init_lora_weights": "corda"}, features.CHANGED_BASE),
        ({"init_lora_weights": "loftq"}, features.CHANGED_BASE),
        ({"bias": "lora_only"}, features.BIAS),
        ({"lora_bias": True}, features.LORA_BIAS),
        ({"alora_invocation_tokens": [1, 2]}, features.ALORA),
        ({"layer_replication": [[0, 2]]}, features.REPLICATION),
        ({"use_bdlora": {"nblocks": 2}}, features.BDLORA),
        ({"use_qalora": True}, features.QALORA),
        ({"trainable_token_indices": [3]}, features.TOKENS),
    ],
)
def test_a_configuration_shows_a_feature(changes: dict[str, Any], feature: Feature) -> None:
    """By the key that PEFT writes for it, and nothing else shows."""
    assert shown(changes) == [feature]


@pytest.mark.parametrize(
    ("tensors", "feature"),
    [
        ({**pair(E, 32), **pair(f"{E}.base_layer", 32)}, features.EXPERTS),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": [4, 9], "base_model.model.model.embed_tokens.lora_embedding_B": [8, 4]}, features.EMBEDDING),
        ({"base_model.model.lm_head.base_layer.weight": [9, 8]}, features.BASE_WEIGHT),
        (pair("model.layers.0.self_attn.q_proj"), features.BARE),
        (pair(f"base_model.model._orig_mod.{Q[17:]}"), features.WRAPPED),
        (pair(f"base_model.model.module.{Q[17:]}"), features.WRAPPED),
        (pair("base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj"), features.WRAPPED),
        (pair(f"policy.{Q}"), features.WRAPPED),
        (pair(f"model.base_model.model.{Q}"), features.WRAPPED),
        ({f"{Q}.lora_A.default.weight": [4, 8]}, features.NAMED),
        ({"foo.bar": [1]}, features.OTHER_TENSOR),
        ({f"{Q}.lora_magnitude_vector": [8]}, features.OTHER_TENSOR),
        ({"base_model.model.score.weight": [2, 8]}, features.OTHER_TENSOR),
        ({f"{Q}x.lora_A.weight": [4, 8]}, features.ONE_SIDED),
        ({f"{Q}x.lora_B.weight": [8, 4]}, features.ONE_SIDED),
        ({f"{Q}x.lora_A.weight": [4], f"{Q}x.lora_B.weight": [8, 4]}, features.NOT_A_MATRIX),
        (pair(f"{Q}x", 8), features.OTHER_RANK),
        (pair(E, 33), features.OTHER_RANK),
        ({"model.embed_tokens.lora_embedding_A": [5, 9], "model.embed_tokens.lora_embedding_B": [8, 5]}, features.OTHER_RANK),
    ],
)
def test_tensors_show_a_feature(tensors: dict[str, list[int]], feature: Feature) -> None:
    """By their names and shapes, beside a good pair."""
    assert feature in shown(tensors=tensors)


def test_a_plain_adapter_shows_nothing() -> None:
    """A null, an empty or a default value of any key is no feature, and an init that leaves the base model alone is none."""
    plain: dict[str, Any] = {
        "modules_to_save": None,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
        "rank_pattern": {},
        "layer_replication": None,
    }
    assert shown(plain) == []
    assert shown({"init_lora_weights": "EVA", "target_modules": "all-linear"}) == []


def test_a_head_may_be_saved_whole_where_the_configuration_says_so() -> None:
    """vLLM takes `score.weight` where `modules_to_save` lists it; without that the tensor is one that it does not know."""
    assert shown({"modules_to_save": ["score"]}, {"base_model.model.score.weight": [2, 8]}) == [features.HEAD, features.HEAD]


def test_an_empty_file_of_tensors_and_empty_tensors_show() -> None:
    """What ZeRO-3 saves without gathering has dimensions of 0."""
    assert [found.feature for found in of_tensors(GOOD, {})] == [features.NO_MATRIX]
    assert features.EMPTY in shown(tensors={f"{Q}.lora_A.weight": [0]})


def test_only_experts_in_one_tensor_ask_for_an_option_of_the_load() -> None:
    """vLLM must be told of the layout in the load call."""
    assert load_options(PAIR) == {}
    assert load_options(pair(f"{E}.0.up_proj")) == {}
    assert load_options(pair(E, 32)) == {"is_3d_lora_weight": True}


def test_ranks_are_the_configurations_and_the_patterns() -> None:
    """The engine has to take the highest of them."""
    assert ranks({**GOOD, "rank_pattern": {"v_proj": 8}}) == {4, 8}
    assert ranks(GOOD) == {4}


def test_a_verdict_depends_on_the_version() -> None:
    """vLLM honours rank_pattern from 0.32 and has refused PiSSA since; the newest known counts where the version is not known."""
    assert [features.PATTERNS.verdict(VLLM, version) for version in ("0.31.0+cpu", "0.32.0rc1", "", "sim")] == [
        Verdict.IGNORES,
        *(Verdict.SERVES,) * 3,
    ]
    assert [features.CHANGED_BASE.verdict(VLLM, version) for version in ("0.9.2", "0.32", "1.0")] == [Verdict.IGNORES, Verdict.REFUSES, Verdict.REFUSES]


def test_a_refusal_names_what_shows_and_what_the_engine_does() -> None:
    """One sentence; none for what is served."""
    (dora,) = of_config({**GOOD, "use_dora": True})
    assert dora.refusal(VLLM) == "has use_dora: vLLM refuses DoRA; train without it, or merge it"
    (other,) = of_tensors(GOOD, pair(Q, 8))
    assert other.refusal(VLLM).endswith(
        "has rank 8, the configuration 4: vLLM would load it, scaled by the configuration's r; set r to the rank of the tensors"
    )
    (rslora,) = of_config({**GOOD, "use_rslora": True})
    assert rslora.refusal(VLLM) == ""
    assert "SGLang would load the adapter and answer as if that were not there" in rslora.refusal(SGLANG)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": None}, "has r None"),
        ({"r": True}, "has r True"),
        ({"r": "4"}, "has r '4'"),
        ({"r": [4] * 1000}, "has r of type list"),
        ({"lora_alpha": "8" * 1000}, "has lora_alpha '888"),
        ({"lora_alpha": float("inf")}, "has lora_alpha inf"),
        ({"lora_alpha": 1e39}, "has lora_alpha 1e+39"),
        ({"alpha_pattern": {"q": -1e39}}, "alpha_pattern"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern"),
    ],
)
def test_a_configuration_that_no_engine_can_read_is_complained_of(changes: dict[str, Any], said: str) -> None:
    """Shortly, whatever the value is."""
    text = complaint({**GOOD, **changes})
    assert said in text
    assert len(text) <= 150


def test_target_modules_may_hold_anything_but_must_be_there() -> None:
    """vLLM needs the key and takes the names of the tensors for the truth."""
    assert [complaint({**GOOD, "target_modules": value}) for value in (None, [], "all-linear", ["a.b.c"])] == [""] * 4
    assert complaint({key: value for key, value in GOOD.items() if key != "target_modules"}) == "has no target_modules"


def test_every_verdict_has_a_version_to_begin_with() -> None:
    """A history begins with whatever came before, and no feature stands in the table twice."""
    assert all(history[0][0] == "" for one in TABLE for history in (one.vllm, one.sglang))
    assert len({one.name for one in TABLE}) == len(TABLE)


def test_readme_shows_the_table() -> None:
    """The block between the heading and the next one; `python -c` with `features_table()` prints it."""
    found = re.search(r"^#+ What adapters are served\n(.*?)^#", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    assert features_table() in found[1]
