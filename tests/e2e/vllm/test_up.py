"""`lora-extproc up --engine vllm`, as a user types it."""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import aiohttp

from extproc.up.processes import free_ports
from extproc.up.vllm import START_S

from .conftest import ask


async def test_up_starts_a_real_engine_with_the_tiny_model(vllm_python: Path, tmp_path: Path) -> None:
    """An adapter and the base model answer; Ctrl-C stops everything."""
    port = free_ports(1)[0]
    options = ["--nodes", "1", "--offline", "--port", str(port), "--dir", str(tmp_path / "d"), "--engine", "vllm", "--vllm-python", str(vllm_python)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "extproc", "up", *options, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            while b"Ctrl-C stops everything" not in (line := await process.stdout.readline()):
                assert line, "it ended"
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}"
            adapter, base = await ask(session, url, "demo/sql", "hi"), await ask(session, url, "tiny", "hi")
        assert (adapter.status, base.status, base.models) == (200, 200, ("tiny",))
        assert adapter.models[0].startswith("demo/sql@sha256:")
        assert adapter.text != base.text
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
