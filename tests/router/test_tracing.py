"""Spans as OpenTelemetry's own in-memory exporter sees them, and log lines as a collector does."""

import json
import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from extproc.errors import ModelNotFound
from extproc.process import JsonFormatter
from extproc.router.tracing import Tracing

from .fakes import Router, body, headers
from .test_processor import serve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_a_request_leaves_spans_in_its_own_trace() -> None:
    """scan, decide, stage: children of the span that the gateway named, with the failure's reason where there is one."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    router = Router(tracing=Tracing(provider))
    router.stager_of(router.owner("demo/x")).error = ModelNotFound("no origin has demo/x")
    await serve(router, [headers({"traceparent": f"00-{TRACE}-{PARENT}-01"}), body(b'{"model":"demo/x"}')])
    spans = {span.name.removeprefix("lora_extproc."): span for span in exporter.get_finished_spans()}
    assert set(spans) == {"scan", "decide", "stage"}
    for span in spans.values():
        assert span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert spans["stage"].status.description == "model_not_found"


async def test_one_line_per_exchange_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    """The words of the metrics; as JSON, fields of their own."""
    caplog.set_level(logging.DEBUG, "extproc.router.processor")
    await serve(Router(), [headers({"x-request-id": "r-1"}), body(b'{"model":"demo/sql"}')])
    (record,) = [record for record in caplog.records if record.name == "extproc.router.processor"]
    assert "request_id=r-1 adapter=demo/sql" in record.getMessage()
    fields = json.loads(JsonFormatter().format(record))
    assert (fields["request_id"], fields["adapter"], fields["outcome"]) == ("r-1", "demo/sql", "staged")
