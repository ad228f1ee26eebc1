"""`python -m tests.bench.soak`: warm requests at a steady rate for a minute; errors, and what the router's memory does."""

import argparse
import asyncio

from .harness import Load, arrangements, chat_body, machine, measure, need_h2load, rss_mib

SETTLE_S = 10.0


async def main(seconds: float, rps: int) -> None:
    """Print the router's resident memory after ten seconds and at the end, and their ratio."""
    need_h2load()
    async with arrangements() as (_, beside):
        assert beside.router is not None
        run = asyncio.create_task(measure(beside, Load(chat_body(200), seconds, rps)))
        await asyncio.sleep(SETTLE_S)
        settled = rss_mib(beside.router)
        result = await run
        end = rss_mib(beside.router)
    print(machine())
    print(f"{result.rate:.0f} req/s for {seconds:g} s: {result.errors} errors, p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms")
    print(f"router RSS: {settled:.1f} MiB after {SETTLE_S:g} s, {end:.1f} MiB at the end, ratio {end / settled:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rps", type=int, default=200)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.rps))
