"""Spans of the router as it runs behind a real Envoy, in an OTLP collector."""

import signal
import socket
from pathlib import Path

import pytest

from extproc.up.processes import free_ports
from extproc.up.stack import Stack
from tests.fakes.collector import Collector
from tests.fakes.wait import until

from .client import Client, weights_of
from .conftest import StackFactory

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
TRACING = {"router": {"tracing": True}}
NAMES = {"lora_extproc.scan", "lora_extproc.decide", "lora_extproc.stage"}


async def _stop_router(stack: Stack) -> tuple[int, str]:
    """SIGTERM; the exit code and the log."""
    child = stack.process("router-1")
    child.process.send_signal(signal.SIGTERM)
    return await child.process.wait(), child.log.read_text()


async def test_spans_arrive_while_the_router_runs(start: StackFactory, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scan, decide, stage: in the client's trace, below the client's span, under the router's name."""
    async with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        async with start(TRACING, nodes=1) as stack:
            client = Client(stack.address)
            answer = await client.chat("team/a", TRACEPARENT)
            await client.close()
            assert answer.weights == weights_of(origin, "team/a")
            await until(lambda: len(collector.spans(TRACE)) == len(NAMES))
        spans = collector.spans(TRACE)
        assert set(spans) == NAMES
        assert {span.parent_span_id.hex() for span in spans.values()} == {PARENT}
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans.values())
        assert {pair.key: pair.value.string_value for pair in spans["lora_extproc.stage"].attributes} == {"adapter": "team/a"}
        assert {resource["service.name"] for resource in collector.resources()} == {"lora-extproc-router"}


async def test_the_last_spans_are_sent_before_the_router_ends(start: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was due to be sent yet; a failed request's reason is the span's status."""
    async with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        async with start(TRACING, nodes=1) as stack:
            client = Client(stack.address)
            assert (await client.chat("team/none", TRACEPARENT)).code == "model_not_found"
            await client.close()
            assert collector.calls == 0
            code, _ = await _stop_router(stack)
        assert code == 0
        assert set(collector.spans(TRACE)) == NAMES
        assert collector.spans(TRACE)["lora_extproc.stage"].status.message == "model_not_found"


@pytest.mark.parametrize("listens", [False, True], ids=["refuses connections", "never answers"])
async def test_a_collector_that_is_away_costs_no_request(start: StackFactory, monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    """Every request is answered while spans are tried and dropped; the log does not grow with them; the router ends as ever."""
    port = free_ports(1)[0]
    with socket.socket() as silent:
        if listens:
            silent.bind(("127.0.0.1", port))
            silent.listen()  # and accepts nothing
        for name, value in {"ENDPOINT": f"http://127.0.0.1:{port}", "TIMEOUT": "0.5"}.items():
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
        for name, value in {"SCHEDULE_DELAY": "10", "MAX_QUEUE_SIZE": "10", "MAX_EXPORT_BATCH_SIZE": "5"}.items():
            monkeypatch.setenv(f"OTEL_BSP_{name}", value)
        async with start(TRACING, nodes=1) as stack:
            client = Client(stack.address)
            statuses = {(await client.chat("team/b", TRACEPARENT)).status for _ in range(300)}
            await client.close()
            code, text = await _stop_router(stack)
    assert statuses == {200}
    assert code == 0
    complaints = [line for line in text.splitlines() if " opentelemetry." in line]
    assert 0 < len(complaints) <= 4
    assert len([line for line in complaints if "Failed to export" in line]) == 1
    assert "Traceback" not in text
