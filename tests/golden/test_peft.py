"""Every adapter that PEFT wrote, as a real vLLM judged it: the simulated engine and the stager's check against the verdicts that are kept."""

import json
from pathlib import Path

import pytest

from extproc.errors import InvalidAdapter
from extproc.sim.adapters import Adapters, SimError
from extproc.sim.checkpoint import BASE_SHA256
from extproc.stager.adapter.check import check
from extproc.stager.adapter.rules import Rules
from extproc.stager.threads import through
from extproc.up.tiny import HIDDEN, SERVED_NAME, write_base
from tests.golden.peft.bases import LLAMA, MOE, MOE_CONFIG
from tests.golden.peft.judge import ENGINES, HERE, MAX_RANK, MIXED, Engine, Verdict, kept, plain_words

VERDICTS = kept()
ASKED = [(engine, name) for engine in ENGINES for name in VERDICTS[engine.name]]
READS_NO_PICKLES = frozenset({"pickle_bin", "pickle_pt"})  # the simulated engine has no torch


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base models' configurations."""
    root = tmp_path_factory.mktemp("bases")
    write_base(root / LLAMA)
    (root / MOE).mkdir()
    (root / MOE / "config.json").write_text(json.dumps(MOE_CONFIG))
    return root


async def simulated(engine: Engine, name: str, bases: Path) -> Verdict:
    """What the simulated engine says, as `judge` asks a real one."""
    limits = {"max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": MAX_RANK}
    mixed = MIXED in engine.flags
    adapters = Adapters(base_model=SERVED_NAME, root=str(bases / engine.base), cache_dir=str(HERE), mixed_moe_format=mixed, **limits)
    try:
        await adapters.load(name, str(HERE / name), in_place=False, is_3d=engine.is_3d)
    except SimError as error:
        return Verdict(error.status, plain_words(str(error), HERE / name))
    async with adapters.use(name) as loaded:
        return Verdict(200, "", 200, loaded.sha256 != BASE_SHA256) if engine.answers else Verdict(200)


def test_every_golden_has_a_verdict() -> None:
    """At least 40, none without one, and no verdict without an adapter."""
    names = {path.name for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for said in VERDICTS.values() for name in said} == names
    assert len(names) >= 40


@pytest.mark.parametrize(("engine", "name"), ASKED, ids=[f"{engine.name}-{name}" for engine, name in ASKED])
async def test_the_simulated_engine_says_what_vllm_said(engine: Engine, name: str, bases: Path) -> None:
    """Status, words, and whether the adapter changes the answer."""
    said = await simulated(engine, name, bases)
    if name in READS_NO_PICKLES:
        assert said.status == 500
        return
    assert said == VERDICTS[engine.name][name]


# What the stager says otherwise than vLLM, and why.
STRICTER = {
    "a_without_b_scaling_one": "half of a pair", "b_without_a": "half of a pair", "b_without_a_scaling_one": "half of a pair",
    "prefix_on_some": "a part of it would be without effect",
    "rank_differs": "scaled by another rank than it was trained with", "rank_smaller": "scaled by another rank than it was trained with",
    "rank_fraction": "no whole number", "config_not_a_number": "alpha is no number",
    "narrow": "another width than the base model's: it was trained for another model",
    "nan": "spoils other answers", "all_nan": "spoils other answers", "infinite": "spoils other answers",
    "pickle_bin": "may run code; stager.allow_pickle", "pickle_pt": "may run code; stager.allow_pickle",
}  # fmt: skip
LEFT_TO_THE_ENGINE = {
    "unknown_module": "which modules there are, the base model's code knows", "fused_name": "which modules there are, the base model's code knows",
    "vocabulary_differs": "padded by some engines", "modules_to_save_score": "a classifier serves it",
    "only_layer_beyond": "how many layers there are is not compared", "alpha_zero": "it asks for the base model's answer",
}  # fmt: skip


def changes_answers(name: str) -> bool:
    """Whether vLLM loads it and its answers are not the base model's, by the engine that can do most."""
    verdict = VERDICTS["moe_mixed_3d" if name.startswith("moe_") else "llama"][name]
    return verdict.status == 200 and verdict.differs is not False


def refusal(name: str) -> str:
    """Why the stager refuses it, where it knows the base model's width and the engine's highest rank; "" if it does not."""
    try:
        through(check(HERE / name, Rules(max_rank=MAX_RANK, width=HIDDEN)))
    except InvalidAdapter as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", sorted({name for _, name in ASKED}))
def test_the_stager_refuses_what_vllm_refuses_and_nothing_else(name: str) -> None:
    """But for what is written down above."""
    why = refusal(name)
    if name in STRICTER or name in LEFT_TO_THE_ENGINE:
        assert (why != "") is (name in STRICTER)
    else:
        assert (why == "") is changes_answers(name), why
    assert len(why) <= 300
