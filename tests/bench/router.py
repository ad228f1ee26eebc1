"""`python -m tests.bench.router`: bodies of several sizes in each processing mode, Envoy alone beside Envoy with the router; and the verdict alone.

What limits each figure: at 0.2 KB the router's Python per message (three messages, one decision); at 220 KB and 1 MB the copies of the body, which
full duplex sends to the router and back (each byte crosses two sockets and Envoy's buffers twice), and the verdict.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from extproc.core.verdict import judge

from .harness import Arrangement, Load, Measured, arrangements, chat_body, machine, measure, median, need_h2load

SIZES = {"0.2 KB": 200, "20 KB": 20_000, "220 KB": 220_000, "1 MB": 1_000_000}
MODES = ("FULL_DUPLEX_STREAMED", "BUFFERED", "NONE")
FIXED_RPS = 500


async def main(seconds: float, rounds: int, modes: list[str]) -> None:
    """The verdict's table, then one table per mode."""
    need_h2load()
    console = Console(width=140)
    console.print(machine())
    show_verdict(console)
    for mode in modes:
        table = Table(
            "body", "model", "load", "Envoy alone", "with router", "ratio", "added p50 ms", "p99 ms", "router us/req", "Envoy us/req", "errors", title=mode
        )
        async with arrangements({"envoy": {"processing_mode": mode}}) as pair:
            for size, count in SIZES.items():
                for first in (True, False) if mode != "NONE" else (False,):
                    for rps in (FIXED_RPS, 0) if count < 100_000 else (0,):
                        load = Load(chat_body(count, model_first=first), seconds, rps)
                        alone, beside = await compare(pair, load, rounds)
                        table.add_row(
                            size,
                            "first" if first else "last",
                            f"{rps}/s" if rps else "saturated",
                            f"{alone.rate:.0f}/s",
                            f"{beside.rate:.0f}/s",
                            f"{beside.rate / alone.rate:.2f}",
                            f"{beside.p50_ms - alone.p50_ms:.2f}",
                            f"{beside.p99_ms:.2f}",
                            f"{beside.router_us:.0f}",
                            f"{beside.envoy_us:.0f}",
                            str(beside.errors),
                        )
        console.print(table)
    console.print(
        f"medians of {rounds} runs of {seconds:g} s each; at {FIXED_RPS}/s Poisson arrivals on one HTTP/2 connection, saturated 32 HTTP/1.1 connections"
    )


async def compare(pair: tuple[Arrangement, Arrangement], load: Load, rounds: int) -> tuple[Measured, Measured]:
    """Medians of both arrangements, measured in turns."""
    runs: tuple[list[Measured], list[Measured]] = ([], [])
    for _ in range(rounds):
        for arrangement, measured in zip(pair, runs, strict=True):
            measured.append(await measure(arrangement, load))
    return median(runs[0]), median(runs[1])


def show_verdict(console: Console) -> None:
    """`judge` beside msgspec's and the standard library's decoding of the same bodies."""
    table = Table("220 KB body", "judge us", "msgspec.json.decode us", "ratio", "json.loads us", title="the verdict on a complete body")
    long = chat_body(220_000)
    turns = json.dumps({"messages": [{"role": "user", "content": "lorem ipsum " * 8} for _ in range(1700)], "model": "bench/adapter"}).encode()
    escaped = json.dumps({"messages": [{"role": "user", "content": 'a "quoted"\nline\t' * 10_000}], "model": "bench/adapter"}).encode()
    wide = json.dumps({"messages": [{"role": "user", "content": "日本語テキスト" * 10_000}], "model": "x"}, ensure_ascii=False).encode()
    for name, body in {"one long prompt": long, "1,700 messages": turns, "escapes": escaped, "not ASCII": wide}.items():
        ours, theirs, standard = (best(f, body) for f in (judge, msgspec.json.decode, json.loads))
        table.add_row(f"{name} ({len(body) // 1000} KB)", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", f"{standard:.0f}")
    console.print(table)


def best(function: Callable[[bytes], Any], body: bytes) -> float:
    """Microseconds per call: the median of ten groups."""
    groups = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(30):
            function(body)
        groups.append((time.perf_counter() - began) / 30 * 1e6)
    return statistics.median(groups)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=MODES, action="append")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.rounds, arguments.mode or list(MODES)))
