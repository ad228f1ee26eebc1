"""What this project concludes from an engine's answers, asked of the simulated engine and of a real vLLM: the same questions, the same answers."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from extproc.config.stager import EngineSettings
from extproc.errors import EngineUnreachable, InvalidAdapter
from extproc.stager.engine.api import KV_USAGE, RUNNING, Engine, Work
from extproc.up.processes import Child, free_ports, python, spawn, stop
from extproc.up.tiny import write_base, write_lora
from extproc.up.vllm import Vllm

from .conftest import ask, spoil, until_healthy

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Served:
    """One engine with the resolver, its base model and its directory."""

    kind: str
    url: str
    base: str
    directory: Path
    session: aiohttp.ClientSession
    engine: Engine
    child: Child

    def add(self, name: str, *, seed: int = 0, **how: Any) -> Path:
        write_lora(self.directory / name, base_model=how.pop("base_model", self.base), seed=seed, **how)
        return self.directory / name

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.text()


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["sim", "vllm"])
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    root = tmp_path_factory.mktemp("contract")
    base, directory = root / "tiny-model", root / "loras"
    write_base(base)
    directory.mkdir()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    if request.param == "vllm":
        server = Vllm(request.getfixturevalue("vllm_python"), max_loras=1, max_cpu_loras=1)
        command = server.command(address, str(base))
        resolver = {"VLLM_PLUGINS": "lora_filesystem_resolver", "VLLM_LORA_RESOLVER_CACHE_DIR": str(directory), "VLLM_SERVER_DEV_MODE": "1"}
        environment = {**server.environment(), **resolver}
    else:
        options = ["--dir", str(directory), "--base-model", "tiny", "--root", str(base), "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", "8"]
        command, environment = python("sim", "--listen", address, "--dev-mode", *options), None
    child = await spawn("engine", command, root, environment=environment)
    engine = Engine(EngineSettings(url=f"http://{address}"))
    try:
        connector = aiohttp.TCPConnector(force_close=True)  # an engine closes idle connections whenever it likes
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), connector=connector) as session:
            await until_healthy(session, address)
            yield Served(request.param, f"http://{address}", str(base), directory, session, engine, child)
    finally:
        await engine.close()
        await stop([child], 5.0)


async def test_it_is_well_and_lists_its_base_model(served: Served) -> None:
    assert await served.engine.why_not_ready() is None
    known = await served.engine.known()
    assert [(base.id, base.root) for base in known.bases] == [("tiny", served.base)]
    assert known.adapters == {}


async def test_an_adapter_is_loaded_by_its_directory_and_listed(served: Served) -> None:
    """Under any name; twice is fine; the answer names it."""
    directory = served.add("elsewhere/a", seed=1)
    for _ in range(2):
        await served.engine.load("acme/a@sha256:0123456789ab", directory)
    assert (await served.engine.known()).adapters["acme/a@sha256:0123456789ab"] == str(directory)
    said = await ask(served.session, served.url, "acme/a@sha256:0123456789ab", "hi")
    assert (said.status, said.models) == (200, ("acme/a@sha256:0123456789ab",))
    requests = await served.engine.requests()
    assert (requests.running, requests.waiting) == (frozenset(), 0.0)
    for _ in range(2):
        await served.engine.unload("acme/a@sha256:0123456789ab")
    assert (await ask(served.session, served.url, "acme/a@sha256:0123456789ab", "hi")).status == 404


async def test_its_load_is_told_by_the_few_series_that_are_asked_for(served: Served) -> None:
    """Below the path with a slash at its end. All series take a vLLM much longer, and its event loop stands still meanwhile."""
    assert await served.engine.work(adapters=True) == Work(0.0, 0.0, 0.0)
    told = await served.engine._metrics(RUNNING, KV_USAGE)
    assert {line.partition("{")[0] for line in told.splitlines() if not line.startswith("#")} == {RUNNING, KV_USAGE}
    async with served.session.get(f"{served.url}/metrics") as response:
        assert len(await response.text()) > len(told)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "rank": ({"rank": 64}, 500, "LoRA rank 64 is greater than max_lora_rank 8"),
    "corrupt": ({}, 500, "Error while deserializing header"),
    "truncated": ({}, 500, "Error while deserializing header"),
    "badmodule": ({"modules": ("zz_proj",)}, 500, "Call to add_lora method failed"),
    "noweights": ({}, 500, "doesn't contain tensors"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
async def test_what_cannot_be_loaded_is_refused_with_a_reason(served: Served, kind: str) -> None:
    how, status, words = REFUSED[kind]
    directory = served.add(f"broken/{kind}", seed=2, **how)
    spoil(directory, kind)
    answered, text = await served.post("/v1/load_lora_adapter", {"lora_name": kind, "lora_path": str(directory)})
    assert answered == status
    assert words in json.loads(text)["error"]["message"]
    with pytest.raises(InvalidAdapter):
        await served.engine.load(kind, directory)
    assert kind not in (await served.engine.known()).adapters


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere/at/all"}, 404, "NotFoundError"),
        ({"lora_name": "tiny", "lora_path": "/nowhere"}, 400, "InvalidUserInput"),
        ({"lora_name": "", "lora_path": "/nowhere"}, 400, "InvalidUserInput"),
        ({"lora_name": "x"}, 400, "Bad Request"),
    ],
)
async def test_a_load_that_makes_no_sense_is_told_so(served: Served, body: dict[str, str], status: int, kind: str) -> None:
    answered, text = await served.post("/v1/load_lora_adapter", body)
    assert (answered, json.loads(text)["error"]["type"]) == (status, kind)
    if status == 404:
        with pytest.raises(EngineUnreachable, match="same path"):
            await served.engine.load("x", Path(body["lora_path"]))


async def test_wrong_base_and_narrow_tensors_are_taken_without_a_word(served: Served) -> None:
    """Which is why they are checked before."""
    for kind, how in (("wrongbase", {"base_model": "some/other"}), ("badshape", {"width": 32})):
        await served.engine.load(kind, served.add(f"odd/{kind}", seed=3, **how))
        await served.engine.unload(kind)


@pytest.mark.parametrize(
    ("kind", "status"), [("unknown", 404), ("wrongbase", 404), ("corrupt", 400), ("rank", 400), ("noweights", 400), ("badjson", 400), ("nopeft", 500)]
)
async def test_the_resolver_answers_a_request(served: Served, kind: str, status: int) -> None:
    """Without a word of why: `mode: resolver` is for who cannot have the other."""
    if kind != "unknown":
        ways: dict[str, dict[str, Any]] = {"wrongbase": {"base_model": "some/other"}, "rank": {"rank": 64}}
        spoil(served.add(f"asked/{kind}", seed=4, **ways.get(kind, {})), kind)
    assert (await ask(served.session, served.url, f"asked/{kind}", "hi")).status == status


async def test_a_version_is_found_through_a_link(served: Served) -> None:
    directory = served.add("linked/real", seed=5)
    name = "linked/a@sha256:0123456789ab"
    (served.directory / name).symlink_to(directory)
    assert (await ask(served.session, served.url, name, "hi")).models == (name,)
    assert (await served.engine.known()).adapters[name] == str(served.directory / name)
    await served.engine.unload(name)
    (served.directory / name).unlink()
    assert (await ask(served.session, served.url, name, "hi")).status == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("options", "counted"), [(None, []), ({"include_usage": True}, [5]), ({"include_usage": False, "continuous_usage_stats": True}, [])])
async def test_a_stream_counts_its_tokens_where_it_was_asked_to(served: Served, path: str, options: dict[str, bool] | None, counted: list[int]) -> None:
    """In one more chunk without choices: what load generators and chat front ends read."""
    body = {"model": "tiny", "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    body |= {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    async with served.session.post(served.url + path, json=body) as response:
        lines = [line.decode().removeprefix("data: ").strip() async for line in response.content if line.startswith(b"data: ")]
    assert (response.status, lines[-1]) == (200, "[DONE]")
    chunks = [json.loads(line) for line in lines[:-1]]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if not chunk["choices"]] == counted
    assert not any(chunk.get("usage") for chunk in chunks if chunk["choices"])


async def test_stream_options_without_a_stream_are_refused(served: Served) -> None:
    status, text = await served.post("/v1/completions", {"model": "tiny", "prompt": "hi", "stream_options": {"include_usage": True}})
    error = json.loads(text)["error"]
    assert (status, error["type"]) == (400, "BadRequestError")
    assert "Stream options can only be defined when `stream=True`." in error["message"]


async def test_sleeping_is_told_where_it_can(served: Served) -> None:
    """In development mode."""
    async with served.session.get(f"{served.url}/is_sleeping") as response:
        assert (response.status, await response.json()) == (200, {"is_sleeping": False})


async def test_files_that_go_without_an_unload_kill_it(served: Served) -> None:
    """The reason for all the care: registered, fallen out of memory, deleted, asked for. It hangs up on who holds a connection. The last of these tests."""
    for name, seed in (("doomed/a", 6), ("doomed/b", 7)):
        await served.engine.load(name, served.add(name, seed=seed))
    hung_up = asyncio.create_task(served.engine.until_it_hangs_up())
    assert (await ask(served.session, served.url, "doomed/b", "hi")).status == 200  # the one slot in memory is taken
    shutil.rmtree(served.directory / "doomed/a")
    said = await ask(served.session, served.url, "doomed/a", "hi")
    assert said.status == 500
    assert "EngineCore encountered an issue" in said.error
    async with asyncio.timeout(30):
        await served.child.process.wait()
        await hung_up
    assert await served.engine.why_not_ready() == "the engine refused the connection"
