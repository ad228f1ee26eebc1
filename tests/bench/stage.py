"""`python -m tests.bench.stage`: one adapter of several sizes from each origin, cold to published, beside the tools that only copy.

What limits each figure: at 16 MB requests and fsyncs; at 1,500 MB the disk, the hash (one core's SHA-256), and the server, which shares the
machine. The others neither hash nor fsync nor verify, but where the row says so. `dd` with fsync is what the disk takes.
"""

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from extproc.client import StagerClient
from extproc.config.origins import OriginSettings
from extproc.config.stager import EngineSettings, PeerSettings, StagerSettings
from extproc.core.artifact import adapter_name
from extproc.metrics import StagerMetrics
from extproc.process.loop import run
from extproc.stager.engine.api import Engine
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import build_origin
from extproc.stager.supply.peers import Peers
from extproc.stager.supply.source import Source
from extproc.up.demo import write_adapter
from extproc.up.processes import free_ports, python
from tests.fakes.hub import Hub
from tests.fakes.rclone import ACCESS_KEY, SECRET_KEY, rclone

from .harness import machine

# rank x layers of a hidden size of 4096 with two modules in BF16: 32,768 bytes per rank and layer
SIZES = {"16 MB": (16, 32), "100 MB": (96, 32), "1,500 MB": (720, 64)}
PARALLEL = 8
LAG_EVERY_S = 0.002
LATE_S = 0.003  # the bystander counts as late above it
MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14

Late = list[tuple[float, float, float]]  # by the monotonic clock: when a loop last came round, when it did again, and by how much that was late
Copy = Callable[[Path], Awaitable[None]]


async def main(rounds: int, sizes: list[str], parallel: int) -> None:
    """One table per size, then eight at once."""
    console = Console(width=140)
    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as top:
        for size in sizes:
            rank, layers = SIZES[size]
            files = Path(top) / "origin" / "models" / "acme"
            write_adapter(files / "one", seed=1, rank=rank, layers=layers)
            table = Table("from", "by", "seconds", "MB/s", "beside the best other", "beside dd", "longest turn ms", title=f"{size}, cold to published")
            async with servers(Path(top) / "origin", rank * layers * 32_768) as given:
                await measure(table, Path(top), files / "one", given, rounds, parallel)
            console.print(table)
            shutil.rmtree(Path(top) / "origin")
        if "1,500 MB" in sizes:
            await eight(console, Path(top))
    console.print(f"medians of {rounds} runs; the longest turn is the longest that the event loop did not come round while the machine did, of all runs")


async def measure(table: Table, top: Path, files: Path, given: dict[str, Any], rounds: int, parallel: int) -> None:
    size = sum(path.stat().st_size for path in files.iterdir())
    dd = statistics.median([disk(top, size) for _ in range(rounds)])
    table.add_row("zeros", "dd conv=fsync", f"{dd:.2f}", f"{size / dd / 1e6:.0f}", "", "", "")
    for origin, (settings, others) in given["origins"].items():
        times: dict[str, list[float]] = {"lora-extproc": [], **{name: [] for name in others}}
        longest = 0.0
        for _ in range(rounds):  # in turns, so that what else the machine does falls on all
            took, lag = await ours(
                top, size, settings | ({"parallel": parallel} if settings.get("type") == "s3" else {}), given["peer"] if origin == "peer" else ""
            )
            longest = max(longest, lag)
            times["lora-extproc"].append(took)
            for name, copy in others.items():
                times[name].append(await timed(top, size, copy))
        best = min((statistics.median(taken) for name, taken in times.items() if name != "lora-extproc"), default=0.0)
        for name, taken in times.items():
            took = statistics.median(taken)
            is_ours = name == "lora-extproc"
            beside = f"{best / took:.2f}" if is_ours and best else ""
            table.add_row(
                origin,
                name,
                f"{took:.2f}",
                f"{size / took / 1e6:.0f}",
                beside,
                f"{dd / took:.2f}" if is_ours else "",
                f"{longest * 1000:.0f}" if is_ours else "",
            )


async def ours(top: Path, size: int, origin: dict[str, Any], peer: str) -> tuple[float, float]:
    """Seconds from the question to the answer, and the longest turn of the event loop meanwhile."""
    with fresh(top, size) as directory:
        stager = build(directory, [origin] if origin else [], peer)
        await stager.open()
        async with turns() as longest:
            try:
                began = time.perf_counter()
                await stager.ensure("acme/one")
                took = time.perf_counter() - began
            finally:
                await stager.close()
        return took, max(longest, default=0.0)


@contextlib.asynccontextmanager
async def turns() -> AsyncIterator[list[float]]:
    """At the end, how late the event loop came round, in seconds, each time that no bystander came late, too; without its waits for a processor.

    The bystanders are processes that do nothing but look at the clock, one bound to each processor. Where one is late as well, its processor stopped (a
    host that has spent its share of time, a neighbour), and not our event loop. The processors are shared with the servers, and the loop's thread has
    to queue for them.
    """
    command = [*this_module(), "--bystander"]
    pipe = asyncio.subprocess.PIPE
    bystanders = [await asyncio.create_subprocess_exec(*command, str(cpu), stdin=pipe, stdout=pipe) for cpu in sorted(os.sched_getaffinity(0))]
    for bystander in bystanders:
        assert bystander.stdout is not None
        await bystander.stdout.readline()  # it looks
    late, looking = Late(), asyncio.Event()
    ours = asyncio.create_task(look(late, looking))
    longest: list[float] = []
    try:
        yield longest
    finally:
        looking.set()
        await ours
        theirs = Late()
        for bystander in bystanders:
            theirs += json.loads((await bystander.communicate(b"\n"))[0])
        longest.extend(by for begin, end, by in late if not any(begin < their_end and their_begin < end for their_begin, their_end, _ in theirs))


async def look(late: Late, over: asyncio.Event, *, queues: bool = True) -> None:
    """Note when this loop does not come round. What `queues` for a processor is given the time that it waits for one."""
    with _schedstat() as schedstat:
        while not over.is_set():
            began, queued = time.monotonic(), _queued_s(schedstat)
            await asyncio.sleep(LAG_EVERY_S)
            ended = time.monotonic()
            by = ended - began - LAG_EVERY_S - (_queued_s(schedstat) - queued if queues else 0.0)
            if by > LATE_S:
                late.append((began, ended, by))


def _schedstat() -> RawIOBase:
    return Path("/proc/thread-self/schedstat").open("rb", buffering=0)


def _queued_s(schedstat: RawIOBase) -> float:
    """How long this thread was ready to run and did not, so far."""
    schedstat.seek(0)
    return int((schedstat.read() or b"0 0").split()[1]) / 1e9


async def stand_by(processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        queues = False  # it runs before all others: if it has to wait for its processor, that one has stopped
    except PermissionError:
        queues = True
    late, over = Late(), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    print(flush=True)
    await look(late, over, queues=queues)
    print(json.dumps(late))


def build(directory: Path, origins: list[dict[str, Any]], peer: str = "") -> Stager:
    settings = StagerSettings(
        dir=str(directory),
        engine=EngineSettings(url=""),
        origins=tuple(OriginSettings(**origin) for origin in origins),
        peers=PeerSettings(mode="preferred" if peer else "off"),
    )
    peers = Peers(settings.peers, StagerClient, "bench")
    peers.follow([peer] if peer else [])
    sources = [Source(build_origin(origin), origin) for origin in settings.origins]
    return Stager(settings, sources, Engine(settings.engine), StagerMetrics(), peers=peers)


async def timed(top: Path, size: int, copy: Copy) -> float:
    with fresh(top, size) as directory:
        began = time.perf_counter()
        await copy(directory)
        return time.perf_counter() - began


@contextlib.contextmanager
def fresh(top: Path, size: int) -> Any:
    """An empty directory, memory for what comes into it, and nothing left to write back before or after."""
    directory = Path(tempfile.mkdtemp(dir=top))
    os.sync()
    if size:
        back_memory(4 * size)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
        os.sync()


def back_memory(size: int) -> None:
    """Touch so much memory and free it. The host of a virtual machine takes back what is free for seconds, and whoever touches it first then waits 8 us
    per page: up to three seconds for an adapter of 1,500 MB, by chance for one run and not for the next.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)


def disk(top: Path, size: int) -> float:
    """Seconds that the disk takes for as many zeros."""
    with fresh(top, size) as directory:
        began = time.perf_counter()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={directory}/zeros", "bs=1M", f"count={size // 2**20}", "conv=fsync"],
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began


async def program(*command: str, **environment: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environment}, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise SystemExit(f"{command[0]} failed")


@contextlib.asynccontextmanager
async def servers(root: Path, size: int) -> AsyncIterator[dict[str, Any]]:
    """Every origin with the adapter `acme/one`, each in a process of its own; and what else can copy from it."""
    s3_port, http_port, peer_port = free_ports(3)
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    os.environ |= keys
    with tempfile.TemporaryDirectory(dir=root.parent) as node:
        config = Path(node) / "peer.yaml"
        config.write_text(
            f'stager: {{listen: "127.0.0.1:{peer_port}", http_listen: "", dir: {node}/store, engine: {{url: ""}}, origins: [{{type: file, path: {root}/models}}]}}\n'
        )
        commands = [
            [rclone(), "serve", "s3", "--addr", f"127.0.0.1:{s3_port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", "", str(root)],
            [rclone(), "serve", "http", "--addr", f"127.0.0.1:{http_port}", "--config", "", str(root / "models")],
            python("stager", "--config", str(config)),
        ]
        processes = [start(command, subprocess.DEVNULL) for command in commands]
        processes.append(start([*this_module(), "--serve-hub", str(root / "models" / "acme" / "one")], subprocess.PIPE))
        try:
            for port in (s3_port, http_port):
                await listening(port)
            assert processes[-1].stdout is not None
            hub = processes[-1].stdout.readline().strip()
            peer = f"127.0.0.1:{peer_port}"
            await listening(peer_port)
            async with StagerClient(peer) as client:
                await client.ensure("acme/one")
            s3 = {"type": "s3", "bucket": "models", "endpoint": f"http://127.0.0.1:{s3_port}", "region": "us-east-1"}
            remote = f":s3,provider=Rclone,endpoint='http://127.0.0.1:{s3_port}',access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}:models/acme/one"
            origins: dict[str, tuple[dict[str, Any], dict[str, Copy]]] = {
                "s3": (s3, rclone_copies(remote)),
                "http": (
                    {"type": "http", "url": f"http://127.0.0.1:{http_port}", "allow_private": True},
                    rclone_copies(f":http,url='http://127.0.0.1:{http_port}':acme/one"),
                ),
                "hub": ({"type": "huggingface", "url": hub}, {"huggingface_hub": lambda d: hub_alone(hub, d)}),
                "file": (
                    {"type": "file", "path": str(root / "models")},
                    {"cp -r": lambda d: program("cp", "-r", str(root / "models" / "acme" / "one"), str(d))},
                ),
                "peer": ({}, {}),
            }
            if shutil.which("aws") and subprocess.run(["aws", "--version"], capture_output=True, check=False).returncode == 0:  # noqa: ASYNC221
                origins["s3"][1]["aws s3 cp"] = lambda d: program(
                    "aws", "s3", "cp", "--recursive", "--endpoint-url", f"http://127.0.0.1:{s3_port}", "s3://models/acme/one", str(d), AWS_REGION="us-east-1"
                )
            yield {"origins": origins, "peer": peer, "size": size}
        finally:
            for process in processes:
                process.kill()
                process.wait()


def rclone_copies(remote: str) -> dict[str, Copy]:
    """It alone, and with what makes a copy one that may be shown: its digest is known, and it is on the disk."""

    async def copy(directory: Path) -> None:
        await program(rclone(), "copy", "--config", "", remote, str(directory))

    async def keep(directory: Path) -> None:
        await copy(directory)
        await program("sha256sum", *map(str, directory.iterdir()))
        await program("sync", *map(str, directory.iterdir()))

    return {"rclone copy": copy, "rclone copy, sha256sum, sync": keep}


def start(command: list[str], output: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, text=True)


def this_module() -> list[str]:
    return [sys.executable, "-m", "tests.bench.stage"]


async def listening(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


async def hub_alone(url: str, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    await asyncio.to_thread(snapshot_download, "acme/one", endpoint=url, local_dir=directory, token=False)


async def serve_hub(files: Path) -> None:
    hub = Hub()
    hub.add("acme/one", {path.name: path.read_bytes() for path in files.iterdir()})
    await hub.start()
    print(hub.url, flush=True)
    await asyncio.Event().wait()


async def eight(console: Console, top: Path) -> None:
    """As many large adapters at once, in a process of their own whose memory is looked at."""
    root = top / "origin"
    rank, layers = SIZES["1,500 MB"]
    write_adapter(root / "models" / "acme" / "n0", seed=1, rank=rank, layers=layers)
    for number in range(1, PARALLEL):
        directory = root / "models" / "acme" / f"n{number}"
        directory.mkdir()
        for path in (root / "models" / "acme" / "n0").iterdir():
            (directory / path.name).hardlink_to(path)
        text = (directory / "adapter_config.json").read_text()
        (directory / "adapter_config.json").unlink()
        (directory / "adapter_config.json").write_text(text + "\n" * number)  # other content, so that each is stored
    (port,) = free_ports(1)
    command = [rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", "", str(root)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        await listening(port)
        with fresh(top, 0) as directory:
            process = await asyncio.create_subprocess_exec(*this_module(), "--eight", str(directory), "--ports", str(port), stdout=asyncio.subprocess.PIPE)
            out, _ = await process.communicate()
            console.print(out.decode().strip())
    finally:
        server.kill()
        server.wait()


async def fetch_eight(directory: Path, port: int) -> None:
    origin = {"type": "s3", "bucket": "models", "endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    stager = build(directory, [origin])
    await stager.open()
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is counted from now on, not from what this process was forked from
    async with turns() as longest:
        began = time.perf_counter()
        await asyncio.gather(*(stager.ensure(adapter_name(f"acme/n{number}")) for number in range(PARALLEL)))
        took = time.perf_counter() - began
        peak = _resident_mib("VmHWM")
        await stager.close()
    total = PARALLEL * SIZES["1,500 MB"][0] * SIZES["1,500 MB"][1] * 32_768 / 1e6
    print(f"{PARALLEL} x 1,500 MB at once from s3: {took:.1f} s, {total / took:.0f} MB/s; peak memory {peak:.0f} MiB ({before:.0f} before),", end=" ")
    print(f"longest turn {max(longest, default=0.0) * 1000:.0f} ms")


def _resident_mib(which: str) -> float:
    """VmRSS: what is in memory now; VmHWM: the most that was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", action="append", choices=list(SIZES), help="repeatable; default: all")
    parser.add_argument("--parallel", type=int, default=4, help="ranges of one S3 object at once")
    parser.add_argument("--serve-hub", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bystander", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--eight", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_hub:
        asyncio.run(serve_hub(arguments.serve_hub))
    elif arguments.bystander is not None:
        asyncio.run(stand_by(arguments.bystander))
    elif arguments.eight:
        run(lambda _stop: fetch_eight(arguments.eight, *arguments.ports))
    else:
        run(lambda _stop: main(arguments.rounds, arguments.size or list(SIZES), arguments.parallel))
    sys.exit(0)
