"""Every refusal of a configuration, and nothing refused that PEFT writes and the engine takes."""

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core import features
from extproc.errors import MAX_MESSAGE_CHARACTERS, InvalidAdapter
from extproc.stager.adapter.config import MAX_CONFIG_BYTES, MAX_VALUE_BYTES, check_config, read_limited, with_base
from extproc.stager.adapter.rules import Rules
from tests.fakes.adapters import CONFIG

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}
RULES = Rules("base", max_rank=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def config_with(**changes: Any) -> bytes:
    """A good configuration, changed; a value of ... leaves the key out."""
    return json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def test_a_good_configuration_is_read() -> None:
    """What matters of it comes out; the checks of the node are passed."""
    config = check_config(config_with(rank_pattern={"v_proj": 8}), RULES)
    assert config.base_model == "base"
    assert features.ranks(config.fields) == {4, 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": [f"model.layers.{n}.mlp.experts.{n}.up_proj" for n in range(20_000)]},
        {"peft_type": ...},
        {"auto_map": {"AutoModel": "modeling.py"}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "modeling"}},
        {"megatron_core": "megatron.core", "megatron_config": None, "loftq_config": {}, "eva_config": None, "layers_to_transform": [0], "exclude_modules": "x"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {f"model.layers.{n}.self_attn.q_proj": 8 for n in range(10_000)}},
        {"lora_alpha": 8.5},
    ],
    ids="all-linear|pattern|null targets|no targets|full names|no method|auto_map|auto_mapping|other keys|gaussian|many ranks|fraction".split("|"),  # noqa: SIM905
)
def test_what_the_engine_takes_is_taken(changes: dict[str, Any]) -> None:
    """Keys that vLLM does not read may hold anything: none of them makes it run code or fail."""
    check_config(config_with(**changes), RULES)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "other methods than LoRA"),
        ({"base_model_name_or_path": ...}, "no base_model_name_or_path; this node serves 'base'"),
        ({"base_model_name_or_path": 5}, "no base_model_name_or_path"),
        ({"base_model_name_or_path": "base/"}, "this node serves 'base'"),
        ({"base_model_name_or_path": "b" * 5000}, "5000 characters"),
        ({"r": ...}, "has r None"),
        ({"r": 0}, "has r 0"),
        ({"r": -4}, "has r -4"),
        ({"r": 4.0}, "has r 4.0"),
        ({"r": True}, "has r True"),
        ({"r": "4"}, "has r '4'"),
        ({"r": 16}, "has rank 16; this node's engine takes up to 8"),
        ({"rank_pattern": {"q_proj": 16}}, "has rank 16; this node's engine takes up to 8"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"lora_alpha": ...}, "has lora_alpha None"),
        ({"lora_alpha": "8"}, "has lora_alpha '8'"),
        ({"lora_alpha": True}, "has lora_alpha True"),
        ({"target_modules": ...}, "no target_modules"),
        ({"use_dora": True}, "vLLM refuses DoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"modules_to_save": ["x" * MAX_VALUE_BYTES]}, "modules_to_save of"),
    ],
)
def test_a_configuration_is_refused_before_its_weights_are_fetched(changes: dict[str, Any], complaint: str) -> None:
    """The refusal names the file and why, in one short sentence."""
    with pytest.raises(InvalidAdapter, match=CONFIG) as raised:
        check_config(config_with(**changes), RULES)
    assert complaint in str(raised.value)
    assert len(str(raised.value)) <= MAX_MESSAGE_CHARACTERS


def test_the_base_may_be_nobody_where_it_is_not_checked() -> None:
    """PEFT writes null for a model that was built from a configuration."""
    for base in (None, ..., 5, ""):
        assert check_config(config_with(base_model_name_or_path=base), Rules()).base_model == ""


@pytest.mark.parametrize("changes", [{"peft_type": ...}, {"peft_type": "lora"}, {"base_model_name_or_path": None}])
def test_vllms_resolver_needs_more_than_its_api(changes: dict[str, Any]) -> None:
    """It reads the method and the base before it loads, and answers 500 or 404 without them."""
    check_config(config_with(**changes), Rules())
    with pytest.raises(InvalidAdapter, match="vLLM's resolver needs both"):
        check_config(config_with(**changes), Rules(by_resolver=True))


def test_another_engine_refuses_other_things() -> None:
    """SGLang takes no regular expression for the modules; vLLM does."""
    text = config_with(target_modules=".*proj")
    check_config(text, Rules(engine="vllm"))
    with pytest.raises(InvalidAdapter, match="SGLang refuses modules by a regular expression"):
        check_config(text, Rules(engine="sglang"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\x00", "is not JSON"),
        (b"[" * 100_000, "is not a JSON object"),
        (b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "has"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b" " * (MAX_CONFIG_BYTES + 1), "the limit is"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ("{}".encode("utf-16"), "is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n <html lang=en>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML document"),
    ],
    ids="empty|cut|binary|deep|deep inside|long number|list|null|large|BOM|UTF-16|LFS|page|page with a space|XML".split("|"),  # noqa: SIM905
)
def test_a_configuration_that_is_no_object_is_refused(text: bytes, complaint: str) -> None:
    """Whatever lies under the name adapter_config.json is named, and none of its bytes are shown."""
    with pytest.raises(InvalidAdapter, match=complaint):
        check_config(text, Rules())


def test_a_large_file_is_not_read_to_its_end() -> None:
    """Others may put a sparse file of gigabytes there."""

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size == MAX_CONFIG_BYTES + 1
            return b" " * size

    with pytest.raises(InvalidAdapter, match=f"over {MAX_CONFIG_BYTES} bytes"):
        read_limited(Endless())


def test_a_base_model_may_have_other_names() -> None:
    """Patterns; with the name that the engine needs the rest stays as it was."""
    text = config_with(base_model_name_or_path="org/llama-8b")
    rules = Rules("/models/llama", ("org/llama-*",))
    assert check_config(text, rules).base_model == "org/llama-8b"
    with pytest.raises(InvalidAdapter, match="org/llama-8b"):
        check_config(text, Rules("/models/llama", ("else/*",)))
    assert json.loads(with_base(text, "/models/llama")) == {**GOOD, "base_model_name_or_path": "/models/llama"}


@settings(deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_configuration_raises_anything_else(text: bytes) -> None:
    """Random bytes and random JSON."""
    with contextlib.suppress(InvalidAdapter):
        check_config(text, RULES)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, *features.KEYS]), JSON))
def test_no_change_of_a_good_configuration_raises_anything_else(changes: dict[str, Any]) -> None:
    """Random values in the places that are read."""
    with contextlib.suppress(InvalidAdapter):
        check_config(json.dumps({**GOOD, **changes}).encode(), RULES)
