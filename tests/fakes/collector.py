"""An OTLP collector: OpenTelemetry's trace service over gRPC, which keeps what it is sent, refuses, or takes its time."""

import asyncio
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
RETRY_AT_ONCE = (("google.rpc.retryinfo-bin", b"\n\x00"),)  # google.rpc.RetryInfo with a retry_delay of nothing


class Collector:
    """`calls` counts exports. With `refuses` they fail, and the client is told to try again at once; they are answered when `gate` is open."""

    def __init__(self) -> None:
        self.received: list[ResourceSpans] = []
        self.calls = 0
        self.abandoned = 0
        self.refuses = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""
        self._server = grpc.aio.server()

    async def __aenter__(self) -> "Collector":
        export = grpc.unary_unary_rpc_method_handler(
            self._export, request_deserializer=ExportTraceServiceRequest.FromString, response_serializer=ExportTraceServiceResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": export}),))
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._server.stop(None)

    def spans(self, trace_id: str = "") -> dict[str, Span]:
        """By name; of one trace, if it is named."""
        spans = [span for resource in self.received for scope in resource.scope_spans for span in scope.spans]
        return {span.name: span for span in spans if trace_id in ("", span.trace_id.hex())}

    def resources(self) -> list[dict[str, str]]:
        """What is said of each sender."""
        return [{pair.key: pair.value.string_value for pair in resource.resource.attributes} for resource in self.received]

    async def _export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self.calls += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        if self.refuses:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "refused", RETRY_AT_ONCE)
        self.received += request.resource_spans
        return ExportTraceServiceResponse()
