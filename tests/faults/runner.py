"""Run one case: here, or in a process of its own that has its own network and mounts, which the kernel takes away with it."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from extproc.errors import StartError
from extproc.up.processes import spawn, stop

from .cases import Case
from .load import Bystander, Client, Load
from .network import command
from .origin import running_origin
from .record import Outcome, Record, Verdict, outcome
from .scene import Scene
from .topology import FAKETIME, Fleet, network_for

APART = ("unshare", "--net", "--mount", "--propagation", "private", "--")
CASE_S = 600.0  # the longest takes a third of it
GRACE_S = 30.0  # for a case that is told to stop: its eleven processes are, too


def why_skipped(case: Case) -> str:
    """What this machine lacks for a case; "" if nothing."""
    if case.layout.needs_root and not can_be_apart():
        return "needs root, for network namespaces and mounts of its own"
    if case.layout.fakes_clocks and not FAKETIME.exists():
        return f"needs {FAKETIME}: apt-get install faketime"
    missing = [tool for tool in ("ip", "nft", "nsenter") if case.layout.in_namespaces and shutil.which(tool) is None]
    return f"needs {', '.join(missing)}: apt-get install iproute2 nftables util-linux" if missing else ""


def can_be_apart() -> bool:
    """Whether namespaces can be had."""
    return os.geteuid() == 0 and subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0


async def run_apart(case: Case, scale: float, keep: Path | None) -> Outcome:
    """In a process of its own. Whatever happens to it, nothing is left: processes die with their parents, namespaces and mounts with them."""
    if why := why_skipped(case):
        return Outcome(case.name, Verdict.SKIPPED, why)
    with tempfile.TemporaryDirectory(prefix=f"lora-extproc-{case.name}-", ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary)
        own = [sys.executable, "-m", "tests.faults", "--inside", str(directory), "--case", case.name, "--seconds-scale", str(scale)]
        child = await spawn("case", [*(APART if can_be_apart() else ()), *own], directory, pipe_output=True)
        assert child.process.stdout is not None
        said = b""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CASE_S):
                    said = await child.process.stdout.read()
                    await child.process.wait()
        finally:
            await stop([child], GRACE_S)
            if keep is not None:
                shutil.copytree(directory, keep / case.name, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node-?", "big"))
        if child.process.returncode != 0 or not said.strip():
            return Outcome(case.name, Verdict.FAIL, f"it did not come to its end within {CASE_S:g} s: {child.last_words()}")
        return Outcome.of(json.loads(said))


def run_inside(case: Case, directory: Path, scale: float) -> None:
    """Run a case in this process, and print its outcome as JSON."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(asyncio.run(_until_told(case, directory, scale)).plain()))


async def _until_told(case: Case, directory: Path, scale: float) -> Outcome:
    """SIGTERM and SIGINT end the case as an error would: everything is taken back in order."""
    running = asyncio.create_task(_run(case, directory, scale))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    return await running


async def _run(case: Case, directory: Path, scale: float) -> Outcome:
    began = time.monotonic()
    bystander = Bystander()
    record = Record(bystander)
    async with contextlib.AsyncExitStack() as scope:
        if can_be_apart():
            await command("ip", "link", "set", "lo", "up")  # this process is below `unshare --net`
        network = await scope.enter_async_context(network_for(case.layout, directory))
        origin = await scope.enter_async_context(running_origin(network.hub.address if network is not None else "127.0.0.1"))
        fleet = await scope.enter_async_context(Fleet(case.layout, directory, origin.url, network))
        client = Client(fleet.address, origin)
        scope.push_async_callback(client.close)
        load = Load(client, origin, case.rates)
        record.requests = load.requests
        scene = Scene(fleet, load, origin, network, record, directory, scale)
        await load.warm_up(fleet.answered)
        await scene.find_victim()
        sizes = fleet.sizes()
        scope.enter_context(bystander.looking())
        try:
            async with load.running():
                await case.script(scene)
        except StartError as error:  # something did not come back
            record.died.append(error.message)
        record.died += fleet.died()
        record.said = fleet.notable(sizes)
    return outcome(case.name, record, case.bounds, time.monotonic() - began, known=bool(case.known))
