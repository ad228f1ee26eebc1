"""Spans for what the router does to a request, as children of the trace that came with it (W3C trace context). Needs the extra `otel`."""

import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import StartError


class Tracing:
    """Records spans after the fact: nothing is kept open while a request waits."""

    def __init__(self, provider: Any = None) -> None:
        """`provider`: an OpenTelemetry TracerProvider; None makes one that exports by OTLP, as the OTEL_* environment variables say."""
        try:
            from opentelemetry import propagate, trace
        except ImportError:
            raise StartError("router.tracing needs OpenTelemetry: pip install 'lora-extproc[otel]'") from None
        self._trace = trace
        self._extract = propagate.extract
        self._provider = provider or _otlp_provider()
        self._tracer = self._provider.get_tracer("lora-extproc", __version__)

    def record(self, name: str, headers: Mapping[str, str], took_s: float, notes: Mapping[str, str | float], failed: str = "") -> None:
        """A span called `name` that ended now and took `took_s` seconds. `failed`: the reason word, if it did."""
        end = time.time_ns()
        span = self._tracer.start_span(name, context=self._extract(dict(headers)), attributes=dict(notes), start_time=end - int(took_s * 1e9))
        if failed:
            span.set_status(self._trace.StatusCode.ERROR, failed)
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _otlp_provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartError("router.tracing needs OpenTelemetry's SDK: pip install 'lora-extproc[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "lora-extproc-router"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
