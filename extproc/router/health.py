"""grpc.health.v1, as gateways and probes ask it: one status per service name, all of them following the router's readiness."""

import logging

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from .http2.calls import UNAVAILABLE, Call, Message, Methods, Sender, joined

log = logging.getLogger(__name__)

EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LIVENESS = "liveness"
# "": the server; the others are what the Endpoint Picker's gateways and manifests ask for
NAMES = ("", LIVENESS, "readiness", "inference-extension", EXT_PROC_SERVICE)
_SERVICE = "grpc.health.v1.Health"
_NOT_FOUND, _INVALID_ARGUMENT = 5, 3

Status = health_pb2.HealthCheckResponse


class Health:
    """Whether the router serves. `liveness` is true as long as anybody answers."""

    def __init__(self) -> None:
        self._serving = False
        self._is_draining = False
        self._watchers: set[_Watch] = set()

    def set_serving(self, serving: bool) -> None:
        """Change every name's status but `liveness`, and tell who watches."""
        self._serving = serving
        for watcher in tuple(self._watchers):
            watcher.tell()

    def drain(self) -> None:
        """Tell who watches that nothing is served any more, and end the watches: a drain waits for every open call, and a watch ends by itself never."""
        self._is_draining = True
        self.set_serving(False)
        watchers, self._watchers = self._watchers, set()
        for watcher in watchers:
            watcher.drain()

    def methods(self) -> Methods:
        """For a transport's table."""
        return {f"/{_SERVICE}/Check": lambda sender: _Check(self, sender), f"/{_SERVICE}/Watch": lambda sender: _Watch(self, sender)}

    def status(self, name: str) -> "health_pb2.HealthCheckResponse.ServingStatus | None":
        """None for a name that nobody has heard of."""
        if name not in NAMES:
            return None
        return Status.SERVING if self._serving or name == LIVENESS else Status.NOT_SERVING


class _Check(Call):
    """Answers one question."""

    def __init__(self, health: Health, sender: Sender) -> None:
        self._health = health
        self._sender = sender

    def holds(self, size: int) -> None:
        pass  # a question has a few bytes

    def receive(self, message: Message) -> None:
        try:
            name = health_pb2.HealthCheckRequest.FromString(joined(message)).service
        except DecodeError:
            self._sender.finish(_INVALID_ARGUMENT, "not a HealthCheckRequest")
            return
        status = self._health.status(name)
        if status is None:
            self._sender.finish(_NOT_FOUND, "unknown service")
            return
        self._sender.send(Status(status=status).SerializeToString())
        self._sender.finish()

    def half_close(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _Watch(Call):
    """Answers now and at every change. An unknown name is SERVICE_UNKNOWN, and may become known ("should ... when the service is added")."""

    def __init__(self, health: Health, sender: Sender) -> None:
        self._health = health
        self._sender = sender
        self._name: str | None = None

    def holds(self, size: int) -> None:
        pass

    def receive(self, message: Message) -> None:
        try:
            self._name = health_pb2.HealthCheckRequest.FromString(joined(message)).service
        except DecodeError:
            self._sender.finish(_INVALID_ARGUMENT, "not a HealthCheckRequest")
            return
        self.tell()
        if self._health._is_draining:  # noqa: SLF001  # one thing in two classes
            self.drain()
        else:
            self._health._watchers.add(self)  # noqa: SLF001

    def half_close(self) -> None:
        pass

    def drain(self) -> None:
        self._sender.finish(UNAVAILABLE, "the router stops")

    def abandon(self) -> None:
        self._health._watchers.discard(self)  # noqa: SLF001

    def tell(self) -> None:
        status = None if self._name is None else self._health.status(self._name)
        self._sender.send(Status(status=Status.SERVICE_UNKNOWN if status is None else status).SerializeToString())
