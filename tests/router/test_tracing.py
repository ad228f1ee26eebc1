"""Spans as OpenTelemetry's own in-memory exporter sees them, what becomes of them on the way to a collector, and log lines as one reads them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from extproc.errors import ModelNotFound, StartError
from extproc.pb import ext_proc_pb2 as pb
from extproc.process.logs import JsonFormatter
from extproc.router.processor import LEAST_MEASURED_BYTES
from extproc.router.tracing import Tracing
from tests.fakes.collector import Collector
from tests.fakes.wait import until

from .fakes import Router, body, headers, serve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that the environment names. Spans are sent at once."""
    async with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        yield collector


async def test_a_request_leaves_spans_in_its_own_trace() -> None:
    """scan, decide, stage: children of the span that the gateway named, with the failure's reason where there is one."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    router = Router(tracing=Tracing(provider))
    router.stager_of(router.owner("demo/x")).error = ModelNotFound("no origin has demo/x")
    await serve(router, [headers(TRACEPARENT), body(b'{"model":"demo/x","x":"%s"}' % bytes(LEAST_MEASURED_BYTES).replace(b"\0", b" "))])
    spans = {span.name.removeprefix("lora_extproc."): span for span in exporter.get_finished_spans()}
    assert set(spans) == {"scan", "decide", "stage"}
    for span in spans.values():
        assert span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert spans["stage"].status.description == "model_not_found"


async def test_spans_are_sent_under_the_name_that_the_environment_gives(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_SERVICE_NAME is above ours, as for every other service; OTEL_RESOURCE_ATTRIBUTES are added."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "router-eu")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    tracing = Tracing()
    tracing.record("x", {}, 0.1, {})
    await asyncio.to_thread(tracing.close)
    (resource,) = collector.resources()
    assert (resource["service.name"], resource["deployment.environment"]) == ("router-eu", "test")


async def test_what_a_client_writes_cannot_keep_spans_from_being_sent(collector: Collector) -> None:
    """Headers that are not UTF-8, a model as long as any that is read: the request is answered as without tracing, and its spans arrive, shortened."""
    tracing = Tracing()
    router = Router(tracing=tracing)
    odd = headers({"x-gateway-model-name": "?", "baggage": "?", "tracestate": "?", **TRACEPARENT}, end=True, mode=pb.NONE)
    for header in odd.request_headers.headers.headers:
        if header.raw_value == b"?":
            header.raw_value = b"a=\xff"
    assert (await serve(router, [odd])).immediate().status.code == 400
    long = body(b'{"model":"%s"}' % (b"m" * 2000))
    assert (await serve(router, [headers(TRACEPARENT), long])).immediate().status.code == 400
    await asyncio.to_thread(tracing.close)
    spans = [span for resource in collector.received for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    models = [span.attributes[0].value.string_value for span in spans if span.name == "lora_extproc.decide"]
    assert models == ["a=?", "m" * 256]


async def test_a_collector_that_is_away_is_complained_of_once(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    """However many exports fail; and that it is back is said, after which it may be away again."""
    caplog.set_level(logging.INFO)
    tracing = Tracing()

    async def export_until(calls: int) -> None:
        while collector.calls < calls:
            tracing.record("x", {}, 0.0, {})
            await asyncio.sleep(0)

    for round_ in (1, 2):
        collector.refuses = True
        await export_until(collector.calls + 24)  # OpenTelemetry tries six times before it gives up a batch
        collector.refuses = False
        await until(lambda: _said(caplog, "exported again") == round_)  # noqa: B023  # awaited here
        assert [_said(caplog, kind) for kind in ("Transient error", "Failed to export")] == [round_, round_]
    await asyncio.to_thread(tracing.close)
    assert _said(caplog, "shutdown") == 0
    logging.getLogger("opentelemetry.test").warning("as before")
    assert _said(caplog, "as before") == 1


async def test_closing_gives_up_a_collector_that_does_not_answer(collector: Collector) -> None:
    """The call in progress is cancelled, and what is queued behind it is dropped."""
    collector.gate.clear()
    tracing = Tracing(flush_s=0.05)
    tracing.record("first", {}, 0.0, {})
    await until(lambda: collector.calls)
    tracing.record("second", {}, 0.0, {})
    await asyncio.to_thread(tracing.close)
    await until(lambda: collector.abandoned)
    assert (collector.calls, collector.received) == (1, [])


def test_a_variable_that_cannot_be_used_keeps_the_router_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wrong setting does."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(StartError, match="'soon'"):
        Tracing()


def _said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


async def test_one_line_per_exchange_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    """The words of the metrics; as JSON, fields of their own."""
    caplog.set_level(logging.DEBUG, "extproc.router.account")
    await serve(Router(), [headers({"x-request-id": "r-1"}), body(b'{"model":"demo/sql"}')])
    (record,) = [record for record in caplog.records if record.name == "extproc.router.account"]
    assert "request_id=r-1 adapter=demo/sql" in record.getMessage()
    fields = json.loads(JsonFormatter().format(record))
    assert (fields["request_id"], fields["adapter"], fields["outcome"]) == ("r-1", "demo/sql", "staged")
