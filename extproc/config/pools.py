"""The pools: which names they serve, and which model servers they have."""

from typing import Literal

from pydantic import Field, field_validator

from ..core.endpoint import Endpoint, spelled
from .discovery import SourceSettings
from .values import Address, Group, OptionalAddress


class EndpointSettings(Group):
    address: Address
    """`ip:port` of the model server, as Envoy's cluster has it."""
    stager: OptionalAddress = ""
    """`host:port` of the stager that fills this server's directory. Empty: nothing is staged, the server is used for base models only."""
    node: str = ""
    """Name of the machine, for logs and `owner`. Empty: the address."""
    zone: str = ""
    """What fails together with this server: an availability zone, a rack. A copy that is made for the case that another's node dies is made in another zone."""

    _spell = field_validator("address")(spelled)


class PoolSettings(Group):
    name: str = Field(min_length=1)
    """Name of the pool and of its Envoy cluster."""
    base_models: tuple[str, ...] = ()
    """Model names that are the base model itself: passed through, nothing is staged."""
    adapters: tuple[str, ...] = ("*",)
    """Shell patterns of the adapter names that run on this pool; the first pool that matches wins."""
    paths: tuple[str, ...] = ()
    """Shell patterns of paths whose requests come here where they name no model, as `GET /v1/responses/ID`. Those that match nowhere go to the first pool."""
    endpoints: tuple[EndpointSettings, ...] = ()
    """The model servers of this pool that are always there."""
    discovery: tuple[SourceSettings, ...] = ()
    """Where routers find more of them while they run, and stagers their peers. Several sources are added up by address; what a later one says of an endpoint
    counts before what an earlier one says."""
    role: Literal["both", "decode", "prefill"] = "both"
    """`decode`: before each engine stands a sidecar that has prompts computed elsewhere, as llm-d's and Dynamo's do: by an engine of the pool of role `prefill`
    that has one of the same `base_models`. A request goes on when both engines have its adapter, and names the other in `x-prefiller-host-port` and
    `x-llm-d-prefiller-host-port`; where no engine of that pool can have the adapter, the decoding one computes the prompt itself. A pool of role `prefill` is
    sent nothing else, and is no Envoy cluster."""

    @field_validator("discovery")
    @classmethod
    def _check_discovery(cls, values: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        labels = [source.label for source in values]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"source {repeated[0]!r} appears more than once")
        return values

    @property
    def looks_every_s(self) -> float:
        """How often its sources are looked at: the one of them counts that is looked at least often."""
        return max((source.looks_every_s for source in self.discovery), default=0.0)

    def members(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(e.address, e.node or e.address, e.stager, zone=e.zone) for e in self.endpoints)
