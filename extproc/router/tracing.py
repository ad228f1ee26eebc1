"""Spans for what the router does to a request, as children of the trace that came with it (W3C trace context). Needs the extra `otel`.

Nothing here may cost a request: spans are queued and sent by a thread of OpenTelemetry's, dropped when a collector does not take them, and what a
client wrote reaches a span only as far as it can be sent.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..core.artifact import MAX_NAME_BYTES
from ..errors import StartError

log = logging.getLogger(__name__)

FLUSH_S = 2.0  # the last spans, when the process stops: what Kubernetes' 30 s leave after the defaults of `lameduck_s` and `drain_s`


class Tracing:
    """Records spans after the fact: nothing is kept open while a request waits."""

    def __init__(self, provider: Any = None, *, flush_s: float = FLUSH_S) -> None:
        """`provider`: an OpenTelemetry TracerProvider; None makes one that exports by OTLP, as the OTEL_* environment variables say."""
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise StartError("router.tracing needs OpenTelemetry: pip install 'lora-extproc[otel]'") from None
        self._trace = trace
        self._extract = TraceContextTextMapPropagator().extract  # the global one reads `baggage` too, and raises on one that is not UTF-8
        self._exporter: _Exporter | None = None
        if provider is None:
            self._exporter = _Exporter()
            provider = _provider(self._exporter)
        self._provider = provider
        self._flush_s = flush_s
        self._tracer = provider.get_tracer("lora-extproc", __version__)

    def record(self, name: str, headers: Mapping[str, str], took_s: float, notes: Mapping[str, str | float], failed: str = "") -> None:
        """A span called `name` that ended now and took `took_s` seconds. `failed`: the reason word, if it did."""
        end = time.time_ns()
        attributes = {key: _sendable(value) if isinstance(value, str) else value for key, value in notes.items()}
        span = self._tracer.start_span(name, context=self._extract(headers), attributes=attributes, start_time=end - int(took_s * 1e9))
        if failed:
            span.set_status(self._trace.StatusCode.ERROR, failed)
        span.end(end)

    def close(self) -> None:
        """Send what is left, for `flush_s` at most. Blocks."""
        if self._exporter is None:
            self._provider.shutdown()
            return
        # OpenTelemetry's shutdown would go on trying for 30 s; an exporter that is shut down gives up the call it is in.
        deadline = threading.Timer(self._flush_s, self._exporter.shutdown)
        deadline.daemon = True
        deadline.start()
        self._provider.shutdown()
        deadline.cancel()
        self._exporter.close()


class _Exporter:
    """The OTLP exporter, as a span processor uses one. Says when spans are exported again; that they are not, OpenTelemetry says."""

    def __init__(self) -> None:
        """Raises StartError without the extra, and for OTEL_* variables that cannot be used."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import SpanExportResult
        except ImportError:
            raise StartError("router.tracing needs OpenTelemetry's SDK: pip install 'lora-extproc[otel]'") from None
        try:
            self._exporter = OTLPSpanExporter()
        except Exception as error:
            raise StartError(f"router.tracing: the OTEL_EXPORTER_OTLP_* variables cannot be used: {error}") from error
        self._result = SpanExportResult
        self._fails = False
        self._closed = False
        self._complaints = _Complaints()

    def export(self, spans: Any) -> Any:
        if self._closed:
            return self._result.FAILURE
        result = self._exporter.export(spans)
        fails = result is not self._result.SUCCESS
        if self._fails and not fails:
            self._complaints.forget()
            log.info("spans are exported again")
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """Give up what is being sent. The first call counts."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()

    def close(self) -> None:
        """After the last call: leave OpenTelemetry's log as it was."""
        self._complaints.close()


class _Complaints(logging.Handler):
    """What OpenTelemetry logs, each kind of message once until `forget`: it complains of every try for as long as a collector is away."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()
        self._logger = logging.getLogger("opentelemetry")
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        kind = str(record.msg)  # before its arguments are put in
        if kind not in self._said:
            self._said.add(kind)
            logging.getLogger().handle(record)

    def forget(self) -> None:
        self._said.clear()

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        super().close()


def _provider(exporter: Any) -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; `create` would put ours above them
    provider = TracerProvider(resource=Resource.create({"service.name": "lora-extproc-router", **named}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _sendable(text: str) -> str:
    """At most as long as a name can be, and UTF-8: one span that cannot be sent costs all those of its batch."""
    return text[:MAX_NAME_BYTES].encode("utf-8", "replace").decode()
