"""What the transport and a gRPC call owe each other: messages one way, answers the other."""

from collections.abc import Callable
from typing import Protocol

from ...core.pieces import Pieces

# gRPC status codes (grpc/status.h) that the transport answers with itself
OK, UNIMPLEMENTED, RESOURCE_EXHAUSTED, UNAVAILABLE = 0, 12, 8, 14

Message = Pieces  # a large one may be in pieces, so that its body is not copied into it or out of it


def joined(message: Message) -> bytes:
    """A message as bytes that may be kept."""
    return b"".join(message) if isinstance(message, tuple) else bytes(message)


class Call(Protocol):
    """One gRPC call, as the transport drives it. Its methods return at once. One that raises is logged, and its stream is reset with INTERNAL_ERROR.

    After it has called `Sender.finish` a call hears nothing more, but for `abandon` if its client goes before all was sent.
    """

    def receive(self, message: Message) -> None:
        """The next message of the client. Views are to be read before this returns: the next read writes over them."""

    def holds(self, size: int) -> None:
        """The transport holds `size` bytes of a message that is not whole; 0 once it is handed over or dropped.

        Told when the amount has changed at the end of a read, and possibly from inside `Sender.finish`.
        """

    def half_close(self) -> None:
        """The client sends no more."""

    def drain(self) -> None:
        """The time for draining is over: answer now. What is not finished when this returns is ended with UNAVAILABLE, and `abandon` follows."""

    def abandon(self) -> None:
        """The client, or its connection, has gone: nothing can be sent any more."""


class Sender(Protocol):
    """What a call answers with. Nothing here raises: what cannot be sent any more is dropped."""

    def send(self, message: Message) -> None:
        """Send one message, when the client's window allows."""

    def finish(self, status: int = OK, text: str = "") -> None:
        """End the call with a gRPC status."""


Methods = dict[str, Callable[[Sender], Call]]  # by ":path"
