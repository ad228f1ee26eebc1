"""`python -m tests.bench.index`: a node with a hundred thousand adapters: how long its start takes, what it weighs, and what one warm Ensure costs it.

The adapters are whole to every check of a start: manifest, configuration and weights lie under their digest, and a name leads there. Only the
weights are hard links to a few files, since a start looks at their size and not at their content.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from extproc.client import StagerClient
from extproc.config.read import load
from extproc.core.artifact import File, Manifest
from extproc.stager.adapter.rules import Rules
from extproc.stager.disk.layout import MANIFEST_FILE
from extproc.stager.syscalls import stamp_of
from extproc.stager.work.kept import RULES_FILE, as_kept
from extproc.up.processes import free_ports
from tests.fakes.adapters import CONFIG, WEIGHTS, small_files

from .harness import TICKS, machine

LINKS = 50_000  # of one file; ext4 allows 65,000
PER_FOLDER = 100
IN_FLIGHT = 16
HOLDERS = 4
IDLE_S = 15.0  # more than one look for what others put there

# What a start of the stager does, step by step, with a line for each: what production imports, and its loop, collector and server.
CHILD = """
import asyncio, sys, time
from pathlib import Path
from extproc.config.read import load
from extproc.process.loop import run
from extproc.stager.server import Server
from extproc.stager.stager import Stager

def mib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)) / 1024

opened = Stager.open

async def timed(self):
    before, cpu, began = mib("VmRSS"), time.process_time(), time.perf_counter()
    await opened(self)
    print(time.perf_counter() - began, time.process_time() - cpu, before, mib("VmRSS"), len(self.node.holdings), flush=True)

Stager.open = timed

async def serve(stop):
    server = Server(load(Path(sys.argv[1])))
    await server.start()
    print("serves", flush=True)
    await stop.wait()
    await server.stop()

run(serve)
"""


def fill(node: Path, count: int) -> None:
    """Publish `count` adapters, and nothing else."""
    store = node / ".store"
    store.mkdir(parents=True)
    files = small_files()
    weights = []
    for number in range(-(-count // LINKS)):
        weights.append(node / f".weights{number}")
        weights[-1].write_bytes(files[WEIGHTS])
    weights_file = File(WEIGHTS, len(files[WEIGHTS]), hashlib.sha256(files[WEIGHTS]).hexdigest())
    manifests = []
    for number in range(count):
        if number % PER_FOLDER == 0:
            (node / folder(number)).mkdir()
        config = files[CONFIG] + f"{number:b}".translate({48: " ", 49: "\t"}).encode() + b"\n"  # the same JSON, and other bytes
        config_file = File(CONFIG, len(config), hashlib.sha256(config).hexdigest())
        manifest = Manifest((config_file, weights_file), name(number), "s3", f'"{config_file.sha256[:32]}"-"{weights_file.sha256[:32]}"')
        directory = f"{store}/{manifest.digest}"
        os.mkdir(directory)  # noqa: PTH102  # plain calls: this is done a hundred thousand times
        _write(f"{directory}/{CONFIG}", config)
        os.link(weights[number // LINKS], f"{directory}/{WEIGHTS}")
        os.symlink(f"../.store/{manifest.digest}", f"{node}/{name(number)}")  # noqa: PTH211
        manifests.append(manifest)
    for manifest in manifests:  # at last, since each link to the weights gives them another stamp
        directory = f"{store}/{manifest.digest}"
        stamps = {path: stamp_of(os.stat(f"{directory}/{path}")) for path in (CONFIG, WEIGHTS)}  # noqa: PTH116
        _write(f"{directory}/{MANIFEST_FILE}", replace(manifest, stamps=stamps).to_json().encode())


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, data)
    os.close(descriptor)


def folder(number: int) -> str:
    return f"org-{number // PER_FOLDER}"


def name(number: int) -> str:
    return f"{folder(number)}/adapter-{number}"


async def start(settings: Path) -> tuple[asyncio.subprocess.Process, list[float]]:
    """A stager that serves, and what it said of its start."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, str(settings), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    assert child.stdout is not None
    figures = [float(word) for word in (await child.stdout.readline()).split()]
    if not figures or not await child.stdout.readline():
        raise SystemExit("the stager did not start")
    return child, figures


async def ensure_warm(address: str, pid: int, names: list[str]) -> tuple[float, float]:
    """CPU of the stager per call in microseconds, and calls per second."""
    clients = [StagerClient(address, holder=f"router-{number}") for number in range(HOLDERS)]
    left = iter(enumerate(names))

    async def caller() -> None:
        for number, adapter in left:
            assert not (await clients[number % HOLDERS].ensure(adapter)).staged

    await clients[0].ensure(names[0])
    cpu, began = _cpu(pid), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    took = time.perf_counter() - began
    used = _cpu(pid) - cpu
    for client in clients:
        await client.close()
    return used * 1e6 / len(names), len(names) / took


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _mib(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def forget_pages() -> bool:
    """Let the kernel read everything from the disk again; False where only root may."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


async def main(count: int, calls: int, directory: str | None) -> None:
    """Print a table of starts and one line of what a warm Ensure costs."""
    console = Console(width=140)
    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-index-", dir=directory) as top:
        node, settings = Path(top) / "node", Path(top) / "settings.yaml"
        port, http = free_ports(2)
        stager: dict[str, object] = {"listen": f"127.0.0.1:{port}", "http_listen": f"127.0.0.1:{http}", "dir": str(node), "engine": {"url": ""}}
        stager |= {"revalidate_s": 0, "max_bytes": 2**50}
        settings.write_text(yaml.safe_dump({"stager": stager}))
        began = time.perf_counter()
        fill(node, count)
        (node / RULES_FILE).write_text(
            json.dumps(as_kept(replace(Rules.of(load(settings).stager, max_rank=0, adopted=True), finite=False)))
        )  # as an earlier process of the same settings left it
        console.print(f"{count} adapters published in {time.perf_counter() - began:.0f} s")
        table = Table("pages", "open s", "of it CPU s", "MiB before", "MiB after", "bytes per adapter", "peak MiB", "MiB after the calls")
        for pages in ("cold", "warm", "warm"):
            if pages == "cold" and not forget_pages():
                continue
            child, (took, cpu, before, after, found) = await start(settings)
            assert found == count, f"{found:.0f} of {count} found"
            chance = random.Random(1)
            per_call, rate = await ensure_warm(f"127.0.0.1:{port}", child.pid, [name(chance.randrange(count)) for _ in range(calls)])
            idle = _cpu(child.pid)
            await asyncio.sleep(IDLE_S)
            idle = (_cpu(child.pid) - idle) / IDLE_S
            sizes = (
                f"{before:.0f}",
                f"{after:.0f}",
                f"{(after - before) * 2**20 / count:.0f}",
                f"{_mib(child.pid, 'VmHWM'):.0f}",
                f"{_mib(child.pid, 'VmRSS'):.0f}",
            )
            table.add_row(pages, f"{took:.1f}", f"{cpu:.1f}", *sizes)
            child.terminate()
            await child.wait()
        console.print(table)
        console.print(f"warm Ensure over gRPC, {IN_FLIGHT} in flight: {per_call:.0f} us of the stager's CPU, {rate:.0f} per second; idle: {idle:.1%} of a core")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--dir", help="where to put the node; its file system is measured too")
    arguments = parser.parse_args()
    uvloop.run(main(arguments.count, arguments.calls, arguments.dir))
