"""What one request costs and what it is counted as: its bytes, its place among the bodies that arrive, metrics, spans and one log line. Closed once."""

import json
import logging
from collections.abc import Callable, Mapping

from ..errors import LoraExtprocError
from ..metrics import RouterMetrics
from .admission import Admission
from .tracing import Tracing

log = logging.getLogger(__name__)

MAX_LOGGED_CHARACTERS = 300


class Account:
    """One request's. `refuse` answers the request with an error; it is let go when the account is closed."""

    __slots__ = (
        "_admission",
        "_metrics",
        "_refuse",
        "_tracing",
        "adapter",
        "arrived_last",
        "arrives_since",
        "destination",
        "headers",
        "held_bytes",
        "is_closed",
        "model",
        "outcome",
        "reason",
        "request_id",
        "transport_bytes",
        "waits_since",
    )

    def __init__(self, admission: Admission, metrics: RouterMetrics, tracing: Tracing | None, refuse: Callable[[LoraExtprocError], None]) -> None:
        self._admission = admission
        self._metrics = metrics
        self._tracing = tracing
        self._refuse: Callable[[LoraExtprocError], None] | None = refuse
        self.transport_bytes = 0  # of a message that has begun to arrive
        self.held_bytes = 0
        self.arrives_since = self.arrived_last = 0.0
        self.headers: Mapping[str, str] = {}
        self.request_id = ""
        self.model = self.adapter = self.destination = ""
        self.waits_since = 0.0
        self.outcome, self.reason = "abandoned", ""  # what the request is counted as when it ends
        self.is_closed = False
        metrics.open_streams += 1

    def begin(self, headers: Mapping[str, str]) -> None:
        """The request's headers have come."""
        self.headers, self.request_id = headers, headers.get("x-request-id", "")

    def refuse(self, error: LoraExtprocError) -> None:
        """Answer the request with `error`."""
        if self._refuse is not None:
            self._refuse(error)

    def count(self, exchange_bytes: int) -> None:
        """Bring the bytes up to date: what the exchange holds and what has arrived of the next message."""
        change = exchange_bytes + self.transport_bytes - self.held_bytes
        if change:
            self._admission.change_bytes(self, change)

    def transport_holds(self, size: int, exchange_bytes: int) -> None:
        """The transport holds `size` bytes of a message that is not whole."""
        self.transport_bytes = size
        self.count(exchange_bytes)

    def settle(self, exchange_bytes: int, *, is_arriving: bool) -> None:
        """Bring bytes and place up to date after each message: what the exchange holds, and whether the body has more to come."""
        self.count(exchange_bytes)
        if is_arriving:
            self._admission.arrives(self)
        elif self.arrives_since:
            self.arrives_since = 0.0
            self._admission.arrived(self)

    def arrives(self) -> None:
        """More of the body has come, and it has not ended."""
        self._admission.arrives(self)

    def trace(self, name: str, took_s: float, notes: Mapping[str, str | float], failed: str = "") -> None:
        """A span that ends now."""
        if self._tracing is not None:
            self._tracing.record(f"lora_extproc.{name}", self.headers, took_s, notes, failed)

    def rejection_notes(self, now: float) -> Mapping[str, str | float]:
        """What the access log shows of a rejected request, beside the reason."""
        if self.waits_since:
            return {"model": self.model, "waited_ms": round(self.waited_s(now) * 1000, 1)}
        return {"model": self.model} if self.model else {}

    def waited_s(self, now: float) -> float:
        """For how long the request has been waiting, for whatever; 0 if it never had to."""
        return now - self.waits_since if self.waits_since else 0.0

    def close(self, *, has_begun: bool) -> None:
        """Give everything back and count the request, if its headers ever came."""
        if self.is_closed:
            return
        self.is_closed = True
        self._refuse = None
        self._metrics.open_streams -= 1
        self.transport_bytes = 0
        self.settle(0, is_arriving=False)
        if has_begun:
            self._metrics.answered(self.outcome, self.reason)
            self._log()

    def _log(self) -> None:
        """One line per exchange, with the words of the metrics' labels."""
        if log.isEnabledFor(logging.DEBUG):
            notes = {"request_id": self.request_id, "adapter": self.adapter, "owner": self.destination, "outcome": self.outcome, "reason": self.reason}
            log.debug("exchange %s", " ".join(f"{name}={_word(value)}" for name, value in notes.items() if value), extra={"notes": notes})


def _word(value: str) -> str:
    """A client's text as one word of a line: it must not look like further fields."""
    value = value[:MAX_LOGGED_CHARACTERS]
    return value if value.isprintable() and not set(value) & set(' ="') else json.dumps(value)
