"""One model-server address Envoy can send to, and the pool it belongs to."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """Identity is the address alone: that is what Envoy sees. A node that comes back with another stager is the same endpoint."""

    address: str  # ip:port, as Envoy's cluster spells it
    node: str = field(default="", compare=False)
    stager: str = field(default="", compare=False)  # host:port of the stager that fills this node's directory; "" = nothing is staged here
    host: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.address.encode())  # hashed once per key, encoded once
