"""Writes every adapter of `CASES` beside this file, by PEFT, then edits what a trainer, a wrapper or a hand would have changed after saving.

The base models are `up`'s tiny Llama and a Qwen3-MoE of the same width, in BF16 to keep the files small. LoRA weights are drawn from a normal distribution seeded by the case's name, strong
enough that a served adapter answers differently; so two runs write the same bytes.
"""

import argparse
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from extproc.up.tiny import HIDDEN, VOCABULARY, write_base

from .bases import LLAMA, MOE, write_moe

HERE = Path(__file__).parent
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK = 2
OVER_THE_LIMIT = 9  # `judge` starts its engine with --max-lora-rank 8
PROJECTIONS = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One adapter: what PEFT is told, for which base model, and what happens to the files afterwards."""

    config: PeftConfig
    base: str = LLAMA
    edits: tuple[Edit, ...] = ()
    save: dict[str, Any] | None = None  # more arguments for save_pretrained


def lora(**how: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **how})


def plain(*edits: Edit) -> Case:
    """PEFT's plainest adapter, changed after saving."""
    return Case(lora(), edits=edits)


# -- edits of the configuration


def keys(**values: Any) -> Edit:
    """Set keys of the configuration."""
    return lambda directory: _write_config(directory, {**_read_config(directory), **values})


def without(*names: str) -> Edit:
    """Leave keys out of the configuration."""
    return lambda directory: _write_config(directory, {name: value for name, value in _read_config(directory).items() if name not in names})


def config_bytes(change: Callable[[bytes], bytes]) -> Edit:
    """Change the configuration's text."""
    return partial(_rewrite, CONFIG, change)


def _read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return config


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _rewrite(file: str, change: Callable[[bytes], bytes], directory: Path) -> None:
    (directory / file).write_bytes(change((directory / file).read_bytes()))


# -- edits of the weights


def tensors(change: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None) -> Edit:
    """Change the tensors by name."""

    def edit(directory: Path) -> None:
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(directory / WEIGHTS)).items()}
        save_file(changed, directory / WEIGHTS, metadata={"format": "pt"} if metadata is None else metadata or None)

    return edit


def renamed(old: str, new: str) -> Edit:
    return tensors(lambda all_: {name.replace(old, new): tensor for name, tensor in all_.items()})


def prefixed(prefix: str) -> Edit:
    return tensors(lambda all_: {prefix + name: tensor for name, tensor in all_.items()})


def cast(dtype: torch.dtype) -> Edit:
    return tensors(lambda all_: {name: tensor.to(dtype) for name, tensor in all_.items()})


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return tensors(lambda all_: {name: change(tensor) for name, tensor in all_.items()})


def only(part: str) -> Edit:
    return tensors(lambda all_: {name: tensor for name, tensor in all_.items() if part in name})


def also(**more: torch.Tensor) -> Edit:
    """Add tensors; a `__` in a name is a dot."""
    return tensors(lambda all_: {**all_, **{name.replace("__", "."): tensor for name, tensor in more.items()}})


def small_base(directory: Path) -> None:
    """Whole matrices of the base model as bytes: nobody reads them, and they are checked in."""
    tensors(lambda all_: {name: tensor if "lora_" in name else tensor.to(torch.float8_e4m3fn) for name, tensor in all_.items()})(directory)


def weights_bytes(change: Callable[[bytes], bytes]) -> Edit:
    return partial(_rewrite, WEIGHTS, change)


def metadata_null(text: bytes) -> bytes:
    """`"__metadata__": null` instead of what was written, in as many bytes."""
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    changed = json.dumps({**header, "__metadata__": None}, separators=(",", ":")).encode()
    return text[:8] + changed.ljust(length) + text[8 + length :]


def narrow(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The same tensor as for a base model of another width."""
    wide = torch.cat([tensor, tensor], dim=0 if tensor.shape[0] == HIDDEN else 1)
    return wide[:width] if tensor.shape[0] == HIDDEN else wide[:, :width]


def not_a_number(value: float) -> Edit:
    """One weight of one tensor."""

    def change(all_: Tensors) -> Tensors:
        first = min(all_)
        spoiled = all_[first].clone()
        spoiled[0, 0] = value
        return {**all_, first: spoiled}

    return tensors(change)


def one_expert_each(all_: Tensors) -> Tensors:
    """Experts as PEFT before 0.17 named them, one module per expert: the same numbers under other names."""
    result = {name: tensor for name, tensor in all_.items() if ".experts." not in name}
    for layer in range(2):
        for expert in range(4):
            for name, rows, columns in (("gate_proj", 32, HIDDEN), ("up_proj", 32, HIDDEN), ("down_proj", HIDDEN, 32)):
                prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                generator = torch.Generator().manual_seed(layer * 100 + expert * 10 + rows)
                result[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
                result[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return result


def pickled(name: str) -> Edit:
    """The weights as torch.save writes them, under `name`."""

    def edit(directory: Path) -> None:
        torch.save(load_file(directory / WEIGHTS), directory / name)
        (directory / WEIGHTS).unlink()

    return edit


def removed(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 6832600\n"
WEB_PAGE = b"<!doctype html><html><head><title>Sign in</title></head><body></body></html>\n"
LAYER = "base_model.model.model.layers"

CASES: dict[str, Case] = {
    # what PEFT writes for LoRA
    "plain": plain(),
    "rslora": Case(lora(use_rslora=True)),
    "all_linear": Case(lora(target_modules="all-linear")),
    "regex_targets": Case(lora(target_modules=r".*\.(q|k)_proj")),
    "full_names": Case(lora(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"])),
    "rank_pattern": Case(lora(rank_pattern={"q_proj": 4})),
    "alpha_pattern": Case(lora(alpha_pattern={r"layers\.0\.self_attn\.q_proj": 8})),
    "rank_and_alpha_pattern": Case(lora(rank_pattern={"v_proj": 1}, alpha_pattern={"v_proj": 3}, use_rslora=True)),
    "layers_to_transform": Case(lora(layers_to_transform=[1], layers_pattern="layers")),
    "exclude_modules": Case(lora(target_modules="all-linear", exclude_modules=["gate_proj", "up_proj", "down_proj"])),
    "dropout_and_more": Case(lora(lora_dropout=0.1, fan_in_fan_out=False, revision="main")),
    "embed_tokens": Case(lora(target_modules=["embed_tokens"]), save={"save_embedding_layers": False}),
    "embed_tokens_and_more": Case(lora(target_modules=["embed_tokens", "q_proj"]), save={"save_embedding_layers": False}),
    "embed_tokens_base_layer": Case(lora(target_modules=["embed_tokens", "q_proj"]), edits=(small_base,)),
    "embed_tokens_rank_over_the_limit": Case(
        lora(target_modules=["embed_tokens"], rank_pattern={"embed_tokens": OVER_THE_LIMIT}), save={"save_embedding_layers": False}
    ),
    "lm_head": Case(lora(target_modules=["lm_head"]), save={"save_embedding_layers": False}),
    "tied": Case(lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), base="tied", edits=(small_base,)),
    "gaussian": Case(lora(init_lora_weights="gaussian")),
    "orthogonal": Case(lora(init_lora_weights="orthogonal")),
    "mica": Case(lora(init_lora_weights="mica")),
    "eva": plain(keys(init_lora_weights="eva", eva_config={"rho": 2.0})),
    "lora_ga": plain(keys(init_lora_weights="lora_ga")),
    "pissa": Case(lora(init_lora_weights="pissa")),
    "pissa_niter": Case(lora(init_lora_weights="pissa_niter_2")),
    "olora": Case(lora(init_lora_weights="olora")),
    "corda": plain(keys(init_lora_weights="corda", corda_config={"corda_method": "ipm"})),
    "loftq": plain(keys(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
    "pissa_config_init_true": Case(lora(init_lora_weights="pissa"), edits=(keys(init_lora_weights=True),)),
    "dora": Case(lora(use_dora=True)),
    "dora_said_only": plain(keys(use_dora=True)),
    "lora_bias": Case(lora(lora_bias=True)),
    "bias_all": Case(lora(bias="all")),
    "bias_lora_only": Case(lora(bias="lora_only")),
    "alora": Case(lora(alora_invocation_tokens=[1, 2, 3])),
    "alora_empty": plain(keys(alora_invocation_tokens=[])),
    "layer_replication": Case(lora(layer_replication=[(0, 2), (1, 2)])),
    "qalora": plain(keys(use_qalora=True)),
    "bdlora": plain(keys(use_bdlora={"nblocks": 2})),
    "modules_to_save": Case(lora(modules_to_save=["lm_head"]), edits=(small_base,)),
    "modules_to_save_empty": plain(keys(modules_to_save=[])),
    "modules_to_save_score": Case(lora(task_type="SEQ_CLS"), base="classifier"),
    "modules_to_save_score_said_only": plain(keys(modules_to_save=["classifier", "score"])),
    "trainable_token_indices": Case(lora(trainable_token_indices=[1, 5])),
    # other methods of PEFT
    "adalora": Case(peft.AdaLoraConfig(target_modules=PROJECTIONS, init_r=RANK, target_r=1, total_step=10, task_type="CAUSAL_LM")),
    "loha": Case(peft.LoHaConfig(r=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")),
    "ia3": Case(peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=[], task_type="CAUSAL_LM")),
    "prompt_tuning": Case(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    # a mixture of experts: fused tensors, whose rank is r times the number of experts
    "moe_attention": Case(lora(), base=MOE),
    "moe_router": Case(lora(target_modules=["q_proj", "gate"]), base=MOE),
    "moe_parameters": Case(lora(target_modules=[], target_parameters=EXPERTS), base=MOE),
    "moe_parameters_and_modules": Case(lora(target_parameters=EXPERTS), base=MOE),
    "moe_parameters_rank_pattern": Case(lora(target_modules=[], target_parameters=EXPERTS, rank_pattern={"gate_up_proj": 4, "down_proj": 4}), base=MOE),
    "moe_gate_up_only": Case(lora(target_modules=[], target_parameters=EXPERTS[:1]), base=MOE),
    "moe_down_only": Case(lora(target_modules=[], target_parameters=EXPERTS[1:]), base=MOE),
    "moe_all_linear": Case(lora(target_modules="all-linear"), base=MOE),
    "moe_one_by_one": Case(lora(), base=MOE, edits=(keys(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]), tensors(one_expert_each))),
    # dtypes and the container
    "f16": plain(cast(torch.float16)),
    "f32": plain(cast(torch.float32)),
    "f64": plain(cast(torch.float64)),
    "f8_e4m3": plain(cast(torch.float8_e4m3fn)),
    "f8_e5m2": plain(cast(torch.float8_e5m2)),
    "f8_e4m3fnuz": plain(cast(torch.float8_e4m3fnuz)),
    "f8_e5m2fnuz": plain(cast(torch.float8_e5m2fnuz)),
    "i8": plain(cast(torch.int8)),
    "metadata_null": plain(weights_bytes(metadata_null)),
    "metadata_absent": plain(tensors(dict, metadata={})),
    "truncated": plain(weights_bytes(lambda text: text[:-100])),
    "git_lfs_weights": plain(weights_bytes(lambda _: GIT_LFS)),
    "web_page_weights": plain(weights_bytes(lambda _: WEB_PAGE)),
    "no_weights": plain(removed),
    "pickle_bin": plain(pickled("adapter_model.bin")),
    "pickle_pt": plain(pickled("adapter_model.pt")),
    # names of tensors
    "no_prefix": plain(renamed("base_model.model.", "")),
    "prefix_orig_mod": plain(prefixed("_orig_mod.")),
    "prefix_fsdp": plain(prefixed("_fsdp_wrapped_module.")),
    "prefix_module": plain(prefixed("module.")),
    "prefix_inside": plain(renamed("base_model.model.model.", "base_model.model._orig_mod.model.")),
    "prefix_on_some": plain(renamed(f"{LAYER}.0.", "_orig_mod.base_model.model.model.layers.0.")),
    "default_names": plain(renamed(".weight", ".default.weight")),
    "a_without_b": plain(only("lora_A")),
    "a_without_b_scaling_one": plain(only("lora_A"), keys(lora_alpha=RANK)),
    "b_without_a": plain(only("lora_B")),
    "b_without_a_scaling_one": plain(only("lora_B"), keys(lora_alpha=RANK)),
    "one_a_without_b": plain(tensors(lambda all_: {name: tensor for name, tensor in all_.items() if name != f"{LAYER}.1.self_attn.v_proj.lora_B.weight"})),
    "no_tensors": plain(tensors(lambda _: {})),
    "zero3_empty": plain(each(lambda _: torch.empty(0))),
    "zero3_some_empty": plain(tensors(lambda all_: {name: torch.empty(0) if ".0." in name else tensor for name, tensor in all_.items()})),
    "one_dimension": plain(tensors(lambda all_: {name: tensor.flatten() if "lora_A" in name else tensor for name, tensor in all_.items()})),
    "unknown_tensor": plain(also(foo__bar=torch.ones(2))),
    "magnitude_vectors": Case(lora(use_dora=True), edits=(keys(use_dora=False),)),
    "base_weights_inside": plain(also(base_model__model__model__layers__0__self_attn__q_proj__base_layer__weight=torch.ones(4, 4))),
    "unknown_module": plain(renamed("q_proj", "zz_proj"), keys(target_modules=["zz_proj", "v_proj"])),
    "modules_beyond_targets": Case(lora(target_modules=["q_proj", "v_proj", "o_proj"]), edits=(keys(target_modules=["q_proj"]),)),
    "targets_beyond_modules": plain(keys(target_modules=["q_proj", "v_proj", "w_proj"])),
    "fused_name": plain(renamed("q_proj", "qkv_proj")),
    "layer_beyond": plain(renamed(f"{LAYER}.1.", f"{LAYER}.9.")),
    "only_layer_beyond": plain(only(f"{LAYER}.1."), renamed(f"{LAYER}.1.", f"{LAYER}.9.")),
    "wide": plain(each(lambda tensor: narrow(tensor, 2 * HIDDEN))),
    "narrow": plain(each(lambda tensor: narrow(tensor, HIDDEN // 2))),
    "vocabulary_differs": Case(
        lora(target_modules=["embed_tokens"]),
        save={"save_embedding_layers": False},
        edits=(tensors(lambda all_: {name: tensor[:, : VOCABULARY // 2] if name.endswith("_A") else tensor for name, tensor in all_.items()}),),
    ),
    "nan": plain(not_a_number(float("nan"))),
    "all_nan": plain(each(lambda tensor: torch.full_like(tensor, float("nan")))),
    "infinite": plain(not_a_number(float("inf"))),
    # the configuration
    "rank_over_the_limit": Case(lora(r=OVER_THE_LIMIT)),
    "rank_pattern_over_the_limit": Case(lora(rank_pattern={"q_proj": OVER_THE_LIMIT})),
    "rank_pattern_unused_over_the_limit": plain(keys(rank_pattern={"nothing": OVER_THE_LIMIT})),
    "rank_pattern_null": plain(keys(rank_pattern=None, alpha_pattern=None)),
    "rank_pattern_text": plain(keys(rank_pattern={"q_proj": "4"})),
    "rank_differs": plain(keys(r=2 * RANK)),
    "rank_smaller": plain(keys(r=1)),
    "rank_zero": plain(keys(r=0)),
    "rank_text": plain(keys(r="2")),
    "rank_null": plain(keys(r=None)),
    "rank_fraction": plain(keys(r=2.0)),
    "rank_missing": plain(without("r")),
    "alpha_text": plain(keys(lora_alpha="4")),
    "alpha_null": plain(keys(lora_alpha=None)),
    "alpha_missing": plain(without("lora_alpha")),
    "alpha_zero": plain(keys(lora_alpha=0)),
    "alpha_fraction": plain(keys(lora_alpha=4.5)),
    "base_null": plain(keys(base_model_name_or_path=None)),
    "base_missing": plain(without("base_model_name_or_path")),
    "targets_null": plain(keys(target_modules=None)),
    "targets_empty": plain(keys(target_modules=[])),
    "targets_missing": plain(without("target_modules")),
    "peft_type_missing": plain(without("peft_type")),
    "peft_type_lower": plain(keys(peft_type="lora")),
    "auto_map": plain(keys(auto_map={"AutoModel": "code.py--Model"})),
    "unknown_keys": plain(keys(some_new_option={"a": [1, 2]}, another=True)),
    "megatron": plain(keys(megatron_config={"hidden_size": 64}, megatron_core="megatron.core")),
    "bias_null": plain(keys(bias=None)),
    "bias_missing": plain(without("bias")),
    "dora_text": plain(keys(use_dora="false")),
    "minimal": plain(lambda directory: _write_config(directory, {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": PROJECTIONS})),
    "config_bom": plain(config_bytes(lambda text: b"\xef\xbb\xbf" + text)),
    "config_utf16": plain(config_bytes(lambda text: text.decode().encode("utf-16"))),
    "config_latin1": plain(keys(note="@"), config_bytes(lambda text: text.replace(b'"@"', b'"\xe9"'))),
    "config_list": plain(config_bytes(lambda text: b"[" + text + b"]")),
    "config_null": plain(config_bytes(lambda _: b"null")),
    "config_cut": plain(config_bytes(lambda text: text[:100])),
    "config_duplicate_key": plain(config_bytes(lambda text: text.replace(b'"r": 2', b'"r": 64,\n  "r": 2'))),
    "config_not_a_number": plain(config_bytes(lambda text: text.replace(b'"lora_alpha": 4', b'"lora_alpha": NaN'))),
    "git_lfs_config": plain(config_bytes(lambda _: GIT_LFS)),
    "web_page_config": plain(config_bytes(lambda _: WEB_PAGE)),
}


def write(name: str, bases: Path, root: Path = HERE) -> None:
    """One adapter below `root`."""
    case = CASES[name]
    directory = root / name
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = peft.get_peft_model(_base(case.base, bases), case.config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if ".lora_A." in parameter or ".lora_B." in parameter or ".lora_embedding_" in parameter:
                value.normal_()
    model.save_pretrained(str(directory), **(case.save or {}))
    (directory / "README.md").unlink(missing_ok=True)  # a model card
    config = _read_config(directory)
    lists = {name: sorted(config[name]) for name in ("target_modules", "target_parameters", "exclude_modules") if isinstance(config.get(name), list)}
    keys(base_model_name_or_path=f"tiny-{case.base}", **lists)(directory)  # not where it lay on this machine, nor in the order of a set
    for edit in case.edits:
        edit(directory)


def _base(name: str, bases: Path) -> Any:
    if name == "classifier":
        return AutoModelForSequenceClassification.from_pretrained(bases / LLAMA, num_labels=2, dtype=torch.bfloat16)
    if name == "tied":
        return LlamaForCausalLM(LlamaConfig.from_pretrained(bases / LLAMA, tie_word_embeddings=True)).to(torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(bases / name, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="the cases to write; none: all")
    names = parser.parse_args().names or list(CASES)
    with tempfile.TemporaryDirectory() as temporary:
        bases = Path(temporary)
        write_base(bases / LLAMA)
        write_moe(bases / MOE)
        for name in names:
            write(name, bases)
            print(f"{name}: {sum(path.stat().st_size for path in (HERE / name).iterdir())} bytes", flush=True)


if __name__ == "__main__":
    main()
