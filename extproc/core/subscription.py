"""What one client of xDS asks for of one type of resource, what it was sent, and what it said to that: the state of the world variant of the protocol.

| state | a request with another nonce than the last response's | one with that nonce | one with that nonce and an error |
| --- | --- | --- | --- |
| SILENT: has asked for nothing | (the first request, whatever its nonce: nonces do not outlive a stream) asks: SETTLED | | |
| SETTLED: has answered all it was sent | stale: ignored | asks, perhaps for other names | asks |
| WAITING: for its answer to a response | stale: ignored | ACK: SETTLED | NACK: SETTLED |

Only a SETTLED client is sent something, so a client that does not read has one response before it, whatever happens meanwhile; then it is sent the newest.
The rules and the quotations are those of https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

EVERYTHING = "*"


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of some version. Two are equal if their names and contents are."""

    name: str
    entry: bytes  # as a response has it
    members: frozenset[str] = field(default=frozenset(), compare=False)  # what it consists of: of a pool, the addresses of its endpoints


@dataclass(frozen=True, slots=True)
class World:
    """All resources of one type at one moment. Equal resources have an equal version, whoever made them: any replica may go on where another ended."""

    version: str
    resources: Mapping[str, Resource]  # by name


class State(Enum):
    """Of a client, as the table above has it."""

    SILENT = auto()
    SETTLED = auto()
    WAITING = auto()


class Heard(Enum):
    """What a request was."""

    ASKS = "asks"
    ACK = "ack"
    NACK = "nack"
    STALE = "stale"


class Subscription:
    """One client's, to one type. `request` is told what it said; `due` says what to send now, and `sent` that it was.

    `is_complete`: of a type whose responses name all there is, so that what is missing is deleted (Cluster and Listener). Of the others, a response has
    what the client asks for and exists; that something has gone is not said at all.
    """

    def __init__(self, *, is_complete: bool) -> None:
        self.state = State.SILENT
        self.accepted: Mapping[str, Resource] = {}  # what the client acknowledged last
        self._is_complete = is_complete
        self.names: frozenset[str] = frozenset()  # that it asks for
        self._nonce = ""
        self._asks_for_everything = False
        self._has_named = False  # anything, ever
        self._sent: Mapping[str, Resource] = {}  # last, without what the client has stopped asking for
        self._owes = False  # an answer, though nothing may have changed
        self._owes_after_next_request = False

    def asks_for(self, name: str) -> bool:
        """Whether the client wants to know of the resource of that name."""
        return self._asks_for_everything or name in self.names

    def request(self, nonce: str, names: Sequence[str], *, is_rejected: bool = False) -> Heard:
        """The client said something. `names` are all it asks for from now on."""
        if self.state is State.SILENT:
            heard, self._owes = Heard.ASKS, True
        elif nonce != self._nonce:  # "The management server should not send a DiscoveryResponse for any DiscoveryRequest that has a stale nonce"
            return Heard.STALE
        elif self.state is State.SETTLED:
            heard = Heard.ASKS
        elif is_rejected:  # "NACK [...] is indicated by the presence of the error_detail field": its version may be the one that was sent
            heard = Heard.NACK
        else:
            heard, self.accepted = Heard.ACK, self._sent
        self.state = State.SETTLED
        self._owes |= self._owes_after_next_request
        self._owes_after_next_request = False
        self._ask_for(names)
        return heard

    def _ask_for(self, names: Sequence[str]) -> None:
        """ "For historical reasons", of a complete type no names mean everything, but only to a client that has never named any."""
        self._has_named |= bool(names)
        self._asks_for_everything = self._is_complete and (EVERYTHING in names or not self._has_named)
        self.names = frozenset(names)
        # "the server must resend any newly requested resources, even if it previously sent those": what is not asked for was not sent
        self._sent = {name: resource for name, resource in self._sent.items() if self.asks_for(name)}

    def answer_next_request(self) -> None:
        """Answer it even if it looks like an acknowledgement.

        A client that was sent a changed cluster asks for its endpoints again, by a request no different from its last, and uses the cluster when they come:
        "Warming of Cluster is completed only when a new ClusterLoadAssignment response is supplied [...] even though there is no change in endpoints".
        """
        self._owes_after_next_request = True

    def due(self, world: World) -> tuple[Resource, ...] | None:
        """What to send now: all that is asked for and exists, or None if the client knows it, has rejected it, or has not answered the last response."""
        if self.state is not State.SETTLED:
            return None
        wanted = {name: resource for name, resource in world.resources.items() if self.asks_for(name)}
        if self._is_complete:
            is_due = self._owes or wanted != self._sent
        else:
            is_due = bool(wanted) and (self._owes or any(self._sent.get(name) != resource for name, resource in wanted.items()))
        return tuple(wanted.values()) if is_due else None

    def sent(self, nonce: str, resources: Sequence[Resource]) -> None:
        """`resources` are on their way. A nonce that cannot be guessed makes sure that only a client that has read them is sent more."""
        self.state = State.WAITING
        self._nonce = nonce
        self._sent = {resource.name: resource for resource in resources}
        self._owes = False
