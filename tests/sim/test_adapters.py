"""What the simulated engine keeps in memory and what it reads again: the sharp edges of a vLLM that the stager is built around."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest

from extproc.sim.adapters import Adapters, EngineDeadError, SimError
from extproc.sim.base import Base
from extproc.sim.checkpoint import BASE_SHA256, Abilities, Loaded, LoadError, read_adapter
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import CONFIG, WEIGHTS, safetensors, sha256, small_files, write_small
from tests.fakes.wait import turns, until
from tests.golden.peft.bases import MOE_CONFIG
from tests.golden.peft.judge import HERE


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """alpha, beta and acme/gamma."""
    for seed, name in enumerate(("alpha", "beta", "acme/gamma")):
        write_small(tmp_path / name, seed=seed)
    return tmp_path


def engine(loras: Path, *, max_loras: int = 1, max_cpu_loras: int = 1) -> Adapters:
    return Adapters(base_model="tiny", root=BASE_MODEL, cache_dir=str(loras), max_loras=max_loras, max_cpu_loras=max_cpu_loras, max_lora_rank=8)


def read(directory: Path, max_lora_rank: int = 8) -> Loaded:
    return read_adapter(directory.name, str(directory), Abilities(max_lora_rank), Base())


async def ask(adapters: Adapters, name: str) -> str:
    """One request: the SHA-256 of the weights that answered."""
    if name not in adapters.registry:
        await adapters.resolve(name)
    async with adapters.use(name) as loaded:
        return loaded.sha256


# -- the resolver


@pytest.mark.parametrize("name", ["alpha", "acme/gamma", "linked"])
async def test_a_name_is_a_path_below_the_directory(loras: Path, name: str) -> None:
    """Flat, with a slash, or a link: the answer is made with that directory's weights."""
    (loras / "linked").symlink_to("beta")
    adapters = engine(loras)
    assert await ask(adapters, name) == sha256((loras / name / WEIGHTS).read_bytes())
    assert adapters.registry == {name: str(loras / name)}


@pytest.mark.parametrize("name", ["../{dir}/alpha", "./alpha", "alpha/", "{abs}/alpha"])
async def test_names_are_not_cleaned(loras: Path, name: str) -> None:
    """Each spelling is a model of its own: that is why a router refuses such names."""
    adapters = engine(loras)
    await ask(adapters, "alpha")
    await ask(adapters, name.format(dir=loras.name, abs=loras))
    assert len(adapters.registry) == 2


async def test_concurrent_first_requests_load_once(loras: Path) -> None:
    """A lock per name."""
    adapters = engine(loras)
    await asyncio.gather(*(ask(adapters, "alpha") for _ in range(8)))
    assert adapters.loads == 1


async def test_a_failure_is_not_remembered(loras: Path) -> None:
    """Put right, it is found: unknown -> created, broken -> repaired."""
    adapters = engine(loras)
    with pytest.raises(SimError):
        await ask(adapters, "new")
    write_small(loras / "new")
    (loras / "new" / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(SimError) as raised:
        await ask(adapters, "new")
    assert raised.value.status == 400
    write_small(loras / "new")
    assert await ask(adapters, "new") == sha256(small_files()[WEIGHTS])


# -- memory and disk


async def test_what_is_in_memory_needs_no_files(loras: Path) -> None:
    """Deleted, and still answering."""
    adapters = engine(loras)
    before = await ask(adapters, "alpha")
    shutil.rmtree(loras / "alpha")
    assert await ask(adapters, "alpha") == before
    assert "alpha" in adapters.registry


async def test_what_fell_out_of_memory_is_read_again(loras: Path) -> None:
    """The registry only grows; the cache is smaller; a second use reads the files."""
    adapters = engine(loras)
    for name in ("alpha", "beta", "alpha"):
        await ask(adapters, name)
    assert adapters.loads == 3
    assert set(adapters.registry) == {"alpha", "beta"}


async def test_the_least_recently_used_falls_out(loras: Path) -> None:
    """alpha was used after beta: gamma takes beta's place."""
    adapters = engine(loras, max_cpu_loras=2)
    for name in ("alpha", "beta", "alpha", "acme/gamma"):
        await ask(adapters, name)
    loads = adapters.loads
    await ask(adapters, "alpha")
    assert adapters.loads == loads
    await ask(adapters, "beta")
    assert adapters.loads == loads + 1


@pytest.mark.parametrize("spoil", ["deleted", "corrupted"])
async def test_the_engine_dies_of_files_that_are_gone_when_it_reads_again(loras: Path, spoil: str) -> None:
    """Deleted without unload, fallen out of memory, then one request."""
    adapters = engine(loras)
    await ask(adapters, "alpha")
    if spoil == "deleted":
        shutil.rmtree(loras / "alpha")
    else:
        (loras / "alpha" / WEIGHTS).write_bytes(b"\xff" * 100)
    await ask(adapters, "beta")
    with pytest.raises(EngineDeadError):
        await ask(adapters, "alpha")


async def test_unload_then_delete_is_the_safe_order(loras: Path) -> None:
    """The next request is a 404, and the engine lives."""
    adapters = engine(loras)
    await ask(adapters, "alpha")
    adapters.unload("alpha")
    shutil.rmtree(loras / "alpha")
    await ask(adapters, "beta")
    with pytest.raises(SimError) as raised:
        await ask(adapters, "alpha")
    assert raised.value.status == 404


async def test_unloading_alone_disables_nothing(loras: Path) -> None:
    """The resolver finds it again."""
    adapters = engine(loras)
    before = await ask(adapters, "alpha")
    adapters.unload("alpha")
    assert await ask(adapters, "alpha") == before


async def test_swapped_files_come_in_when_they_are_read_again(loras: Path) -> None:
    """Resident: the old weights go on. Fallen out: silently the new ones. So a new version needs a new path."""
    adapters = engine(loras)
    old = await ask(adapters, "alpha")
    write_small(loras / "alpha", seed=9)
    assert await ask(adapters, "alpha") == old
    await ask(adapters, "beta")
    assert await ask(adapters, "alpha") == sha256(small_files(seed=9)[WEIGHTS])


async def test_a_failed_load_evicts_nothing(loras: Path) -> None:
    """The good one is still in memory."""
    adapters = engine(loras)
    await ask(adapters, "alpha")
    (loras / "beta" / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(SimError):
        await ask(adapters, "beta")
    loads = adapters.loads
    await ask(adapters, "alpha")
    assert adapters.loads == loads


# -- slots


async def test_other_adapters_wait_for_a_slot(loras: Path) -> None:
    """max_loras adapters run at once; requests of one that runs share its slot."""
    adapters = engine(loras, max_loras=1, max_cpu_loras=4)
    await ask(adapters, "alpha")
    async with adapters.use("alpha"):
        assert await ask(adapters, "alpha")
        waiting = asyncio.create_task(ask(adapters, "beta"))
        await until(lambda: "beta" in adapters.registry)
        await turns()
        assert not waiting.done()
        assert set(adapters.scheduler.running) == {"alpha"}
    assert await waiting == sha256((loras / "beta" / WEIGHTS).read_bytes())


async def test_two_slots_run_two(loras: Path) -> None:
    """And a third waits until one of them is done."""
    adapters = engine(loras, max_loras=2)
    await ask(adapters, "alpha")
    await ask(adapters, "beta")
    async with adapters.use("alpha"), adapters.use("beta"):
        third = asyncio.create_task(ask(adapters, "acme/gamma"))
        await until(lambda: "acme/gamma" in adapters.registry)
        await turns()
        assert not third.done()
    await third


async def test_a_cancelled_wait_takes_no_slot(loras: Path) -> None:
    """A client that hangs up in the queue."""
    adapters = engine(loras, max_loras=1, max_cpu_loras=4)
    await ask(adapters, "alpha")
    await ask(adapters, "beta")
    async with adapters.use("alpha"):
        waiting = asyncio.create_task(ask(adapters, "beta"))
        await turns()
        waiting.cancel()
        await asyncio.wait({waiting})
    assert not adapters.scheduler.running
    await ask(adapters, "acme/gamma")


async def test_what_runs_does_not_fall_out_of_memory(loras: Path) -> None:
    """A stream in flight keeps its weights while others are loaded."""
    adapters = engine(loras, max_loras=1, max_cpu_loras=1)
    await ask(adapters, "alpha")
    async with adapters.use("alpha"):
        await adapters.resolve("beta")
        loads = adapters.loads
        await ask(adapters, "alpha")
        assert adapters.loads == loads


# -- reading


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\x00",
        b"\xff" * 64,
        safetensors(b"{nonsense}"),
        safetensors(b"[]"),
        safetensors({"a": 5}),
        safetensors({"a": {"dtype": "F32"}}),
        small_files()[WEIGHTS][:-1],
    ],
    ids=["empty", "short", "huge header", "not JSON", "a list", "no tensor", "no offsets", "truncated"],
)
async def test_broken_weights_are_a_load_error(loras: Path, weights: bytes) -> None:
    """Whatever is wrong with them: 400 to the client, and the engine lives."""
    (loras / "alpha" / WEIGHTS).write_bytes(weights)
    with pytest.raises(LoadError):
        read(loras / "alpha")
    with pytest.raises(SimError) as raised:
        await ask(engine(loras), "alpha")
    assert (raised.value.status, raised.value.kind) == (400, "BadRequestError")


def test_a_rank_above_the_engine_s_is_a_load_error(loras: Path) -> None:
    """Equal is fine."""
    assert read(loras / "alpha", 4).sha256 == sha256((loras / "alpha" / WEIGHTS).read_bytes())
    with pytest.raises(LoadError, match=r"LoRA rank 4 is greater than max_lora_rank 2\."):
        read(loras / "alpha", 2)


def test_a_tensor_of_another_rank_is_accepted(loras: Path) -> None:
    """As a vLLM does, silently: that is why the stager checks it."""
    config = json.loads((loras / "alpha" / CONFIG).read_text())
    (loras / "alpha" / CONFIG).write_text(json.dumps({**config, "r": 2}))
    read(loras / "alpha")


# -- what PEFT wrote


def golden(base: Path, *, mixed: bool) -> Adapters:
    """An engine for the goldens, which has room for one of them in memory."""
    limits = {"max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": 8}
    return Adapters(base_model="tiny", root=str(base), cache_dir=str(HERE), mixed_moe_format=mixed, **limits)


async def test_experts_in_one_tensor_are_read_again_as_they_were_loaded(tmp_path: Path) -> None:
    """What the load call said of them counts until the name is forgotten; a resolver never says it."""
    (tmp_path / "config.json").write_text(json.dumps(MOE_CONFIG))
    adapters = golden(tmp_path, mixed=True)
    for name in ("moe_parameters", "moe_attention"):
        await adapters.load(name, str(HERE / name), in_place=False, is_3d=name == "moe_parameters")
    weights = sha256((HERE / "moe_parameters" / WEIGHTS).read_bytes())
    assert await ask(adapters, "moe_parameters") == weights
    adapters.unload("moe_parameters")
    with pytest.raises(SimError, match="contains fused 3D MoE weights"):
        await adapters.load("moe_parameters", str(HERE / "moe_parameters"), in_place=False)


@pytest.mark.parametrize(("name", "status"), [("config_bom", 400), ("config_utf16", 400), ("config_list", 500), ("peft_type_missing", 500)])
async def test_the_resolver_reads_a_configuration_as_text(name: str, status: int) -> None:
    """UTF-8 without a mark, an object, and its method in it."""
    adapters = Adapters(base_model="tiny", root="", cache_dir=str(HERE), max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    with pytest.raises(SimError) as raised:
        await adapters.resolve(name)
    assert raised.value.status == status


async def test_an_adapter_without_effect_answers_as_the_base_model() -> None:
    """Names that no module has are passed over without a word."""
    adapters = Adapters(base_model="tiny", root="", cache_dir=str(HERE), max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    assert await ask(adapters, "prefix_orig_mod") == BASE_SHA256


async def test_a_load_takes_as_long_as_it_is_told_to(loras: Path) -> None:
    """So that what is not warm yet can be seen to cost something; a request for what is in memory costs nothing."""
    adapters = Adapters(base_model="tiny", root=BASE_MODEL, cache_dir=str(loras), max_loras=1, max_cpu_loras=1, max_lora_rank=8, load_s=0.2)
    began = time.monotonic()
    await ask(adapters, "alpha")
    assert time.monotonic() - began >= 0.2
    adapters_before = adapters.loads
    await ask(adapters, "alpha")
    assert adapters.loads == adapters_before == 1
