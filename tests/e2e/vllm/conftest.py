"""A real vLLM on this machine's processors: an environment that is made once, a stack of two nodes, and one more engine to compare with."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.config.origins import OriginSettings
from extproc.config.read import parse
from extproc.up.processes import Child, free_ports, spawn, stop
from extproc.up.stack import Plan, Stack
from extproc.up.tiny import write_base, write_lora
from extproc.up.vllm import START_S, Vllm

_KEPT = Path(__file__).parents[2] / ".vllm"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MANY = tuple(f"many/{number:02}" for number in range(60))
PROMPT = "Tell the model that is asked which one it is, in more words than one block of the prefix cache holds, so that blocks are shared. "
TOKENS = 10
ROOM = 20  # adapters that a node's disk holds
ADAPTER_BYTES = 24 * 1024  # 10 KB of files, a manifest and a directory, in blocks of the disk


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """A Python that has vLLM: `LORA_EXTPROC_VLLM_PYTHON`, or one of our own, made once and kept. PyTorch's CPU build must be where pip finds it."""
    if given := os.environ.get("LORA_EXTPROC_VLLM_PYTHON"):
        return Path(given)
    python = _KEPT / "bin" / "python"
    done = _KEPT / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_KEPT)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)]
        installed = subprocess.run(install, capture_output=True, text=True, check=False)
        if installed.returncode:
            reason = f"vLLM cannot be installed: {installed.stderr.strip().splitlines()[-1:]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        done.touch()
    return python


@dataclass
class Engines:
    """Two nodes with a real vLLM each behind Envoy, adapters in their origin, and a third vLLM that knows every adapter from the origin itself."""

    stack: Stack
    origin: Path
    base: str
    fresh: str  # its URL
    session: aiohttp.ClientSession
    expected: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, name: str, *, seed: int, **how: Any) -> Path:
        """Put an adapter, or a new version of one, into the origin; its directory."""
        write_lora(self.origin / name, base_model=how.pop("base_model", self.base), seed=seed, **how)
        return self.origin / name

    async def own_answer(self, name: str, seed: int, prompt: str = PROMPT) -> str:
        """What a fresh engine answers for the adapter made with `seed`."""
        key = (f"seed-{seed}", prompt)
        if key not in self.expected:
            directory = self.origin.parent / "fresh" / key[0]
            write_lora(directory, base_model=self.base, seed=seed)
            load = {"lora_name": key[0], "lora_path": str(directory)}
            async with self.session.post(f"{self.fresh}/v1/load_lora_adapter", json=load) as response:
                assert response.status in (200, 400), await response.text()
            self.expected[key] = (await ask(self.session, self.fresh, key[0], prompt)).text
        return self.expected[key]

    async def ask(self, name: str, prompt: str = PROMPT, *, stream: bool = False, tokens: int = TOKENS) -> "Said":
        """Through Envoy."""
        return await ask(self.session, f"http://{self.stack.address}", name, prompt, stream=stream, tokens=tokens)

    def engines_alive(self) -> bool:
        return all(self.stack.process(f"{node.name}-engine").process.returncode is None for node in self.stack.nodes)


@dataclass
class Said:
    """One answer."""

    status: int
    text: str  # the tokens' ids
    models: tuple[str, ...] = ()  # what the engine called itself; more than one if a stream changed its mind
    error: str = ""


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: str, *, stream: bool = False, tokens: int = TOKENS) -> Said:
    """A completion, greedy and of a fixed length."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 1, "ignore_eos": True, "stream": stream, "return_token_ids": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return Said(response.status, "", error=await response.text())
        chunks = [await response.json()] if not stream else await _events(response)
    tokens_said = [token for chunk in chunks if chunk.get("choices") for token in chunk["choices"][0].get("token_ids") or ()]
    text = " ".join(map(str, tokens_said))  # the ids: most of them are no letters; the simulated engine has none
    return Said(200, text, tuple(dict.fromkeys(str(chunk.get("model")) for chunk in chunks)), "".join(str(c["error"]) for c in chunks if "error" in c))


async def _events(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    lines = [line.decode().removeprefix("data: ").strip() async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def spoil(directory: Path, kind: str) -> None:
    """Break an adapter's files in one way."""
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    if kind == "corrupt":
        weights.write_bytes(b"this is not a safetensors file" * 40)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "noweights":
        weights.unlink()
    elif kind == "badjson":
        config.write_text("{not json")
    elif kind == "nopeft":
        config.write_text(json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "peft_type"}))


@contextlib.asynccontextmanager
async def started(vllm_python: Path, root: Path, names: Sequence[str] = (), *, nodes: int = 2, raw: dict[str, Any] | None = None) -> AsyncIterator[Engines]:
    """The stack, and the fresh engine beside it."""
    origin, base = root / "origin", root / "tiny-model"
    write_base(base)
    for seed, name in enumerate(names):
        write_lora(origin / name, base_model=str(base), seed=seed)
    origin.mkdir(exist_ok=True)
    stager = {"max_bytes": ROOM * ADAPTER_BYTES, "lease_s": 3.0, "revalidate_s": 0.0, "negative_ttl_s": 0.0, "engine": {"quiet_s": 10.0}}
    settings = parse({"stager": stager, **(raw or {})}, source="test")
    server = Vllm(vllm_python)
    port, fresh = free_ports(2)
    plan = Plan(root, port, nodes, (OriginSettings(type="file", path=str(origin)),), vllm=server, settings=settings)
    address = f"127.0.0.1:{fresh}"
    beside: Child | None = None
    try:
        beside = await spawn("fresh-engine", server.command(address, str(base)), root, environment=server.environment())
        async with Stack(plan) as stack, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            await until_healthy(session, address)
            yield Engines(stack, origin, str(base), f"http://{address}", session)
    finally:
        if beside is not None:
            await stop([beside], 5.0)


async def until_healthy(session: aiohttp.ClientSession, address: str) -> None:
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://{address}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
