"""`python -m tests.bench.warm`: a warm request through Envoy alone and through Envoy with the router, from one run."""

import argparse
import asyncio

from rich.console import Console
from rich.table import Table

from .harness import Load, Measured, arrangements, chat_body, machine, measure, median, need_h2load, rss_mib

FIXED_RPS = 500


async def main(seconds: float, rounds: int) -> None:
    """Take turns, print medians and what the router adds."""
    need_h2load()
    console = Console(width=120)
    body = chat_body(200)
    loads = {f"{FIXED_RPS} req/s": Load(body, seconds, FIXED_RPS), "saturated": Load(body, seconds)}
    table = Table("load", "path", "req/s", "p50 ms", "p99 ms", "errors", "Envoy us/req", "router us/req", title=machine(), title_justify="left")
    async with arrangements() as (alone, beside):
        assert beside.router is not None
        for name, load in loads.items():
            runs: dict[str, list[Measured]] = {alone.name: [], beside.name: []}
            for _ in range(rounds):
                for arrangement in (alone, beside):
                    runs[arrangement.name].append(await measure(arrangement, load))
            medians = {path: median(measured) for path, measured in runs.items()}
            for path, m in medians.items():
                table.add_row(name, path, f"{m.rate:.0f}", f"{m.p50_ms:.2f}", f"{m.p99_ms:.2f}", str(m.errors), f"{m.envoy_us:.0f}", f"{m.router_us:.0f}")
            a, b = medians[alone.name], medians[beside.name]
            ratio = (f"{b.rate / a.rate:.2f}", f"{b.p50_ms / a.p50_ms:.2f}", f"{b.p99_ms / a.p99_ms:.2f}", "", f"{b.envoy_us / a.envoy_us:.2f}", "")
            table.add_row("", "ratio", *ratio, end_section=True)
        console.print(table)
        console.print(f"medians of {rounds} runs of {seconds:g} s each, body {len(body)} bytes; router RSS {rss_mib(beside.router):.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.rounds))
