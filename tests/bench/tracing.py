"""`python -m tests.bench.tracing`: what the router's CPU per request is when Envoy traces, beside the same Envoy that does not.

A tracing Envoy puts a `traceparent` of its own into the header block of every ext_proc stream, so no block is like another. Spans go to a collector that
does not exist: what sending them costs Envoy is in its own figure, not in the router's.
"""

import argparse
import asyncio
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import Load, Measured, arrangements, chat_body, machine, measure, median, need_h2load

OPENTELEMETRY = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def with_tracing(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """The same proxy with a span for every request."""
    collector = {"envoy_grpc": {"cluster_name": "collector"}, "timeout": "0.2s"}
    provider = {"@type": OPENTELEMETRY, "service_name": "bench", "grpc_service": collector}
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["tracing"] = {
        "random_sampling": {"value": 100},
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": provider},
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 1}}
    options = {"@type": f"type.googleapis.com/{HTTP_OPTIONS}", "explicit_http_config": {"http2_protocol_options": {}}}
    bootstrap["static_resources"]["clusters"].append(
        {
            "name": "collector",
            "type": "STATIC",
            "connect_timeout": "0.2s",
            "typed_extension_protocol_options": {HTTP_OPTIONS: options},
            "load_assignment": {"cluster_name": "collector", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
        }
    )
    return bootstrap


async def main(seconds: float, rounds: int) -> None:
    """Take turns, print medians and the ratio."""
    need_h2load()
    console = Console(width=120)
    load = Load(chat_body(200), seconds)
    table = Table("Envoy", "req/s", "p50 ms", "p99 ms", "errors", "Envoy us/req", "router us/req", title=machine(), title_justify="left")
    async with arrangements() as (_, plain), arrangements(change=with_tracing) as (_, traced):
        runs: dict[str, list[Measured]] = {"does not trace": [], "traces": []}
        for _ in range(rounds):
            for name, arrangement in (("does not trace", plain), ("traces", traced)):
                runs[name].append(await measure(arrangement, load))
    medians = {name: median(measured) for name, measured in runs.items()}
    for name, m in medians.items():
        table.add_row(name, f"{m.rate:.0f}", f"{m.p50_ms:.2f}", f"{m.p99_ms:.2f}", str(m.errors), f"{m.envoy_us:.0f}", f"{m.router_us:.0f}")
    a, b = medians["does not trace"], medians["traces"]
    table.add_row(
        "ratio",
        f"{b.rate / a.rate:.2f}",
        f"{b.p50_ms / a.p50_ms:.2f}",
        f"{b.p99_ms / a.p99_ms:.2f}",
        "",
        f"{b.envoy_us / a.envoy_us:.2f}",
        f"{b.router_us / a.router_us:.2f}",
    )
    console.print(table)
    console.print(
        f"medians of {rounds} runs of {seconds:g} s each, saturated, in turns; tracing costs the router {b.router_us - a.router_us:.0f} us per request"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.rounds))
