"""The mutation that sends a request to chosen endpoints, in the words of the Endpoint Picker protocol (v1.0.0)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .conformance import ECHO_HEADER, SERVED_HEADER
from .endpoint import Endpoint
from .events import Mutation

DESTINATION_HEADER = "x-gateway-destination-endpoint"  # "MUST set both": the header, and the metadata key of the same name
LB_NAMESPACE = "envoy.lb"
OWN_ANSWER = "models"  # what Envoy's details say of a request that the router answered itself, and well
OWN_NAMESPACE = "lora_extproc"  # what Envoy's access log prints of our decision

# The sidecar before a decoding engine sends the prompt to the prefiller that these name. llm-d's reads the second first, since older gateways take away
# only that one from what clients send; Dynamo's reads the second alone, and refuses it with more than one address.
PREFILLER_HEADERS = ("x-llm-d-prefiller-host-port", "x-prefiller-host-port")
# Others that llm-d's sidecar obeys. From a client, each would make the sidecar open a connection to an address of the client's choice.
SIDECAR_HEADERS = (
    "x-llm-d-encoder-hosts-ports",
    "x-encoder-hosts-ports",
    "x-llm-d-kv-cache-source-host-port",
    "x-kv-cache-source-host-port",
    "x-data-parallel-host-port",
)


@dataclass(frozen=True, slots=True)
class Steering:
    """How the choice is told. With `cluster_header`, the pool's name goes into that header and the route is chosen anew. With `for_conformance`, the echo
    server is asked to tell it, and the route is chosen anew as the suite's own picker has it."""

    cluster_header: str | None = None
    max_endpoints: int = 3
    for_conformance: bool = False

    def mutation(
        self,
        pool: str,
        endpoints: Sequence[Endpoint],
        notes: Mapping[str, str | float],
        model: str = "",
        *,
        prefiller: str | None = None,
        is_base: bool = False,
    ) -> Mutation:
        """To `endpoints`, best first: Envoy's retries walk the list. `notes` go to the access log. `model`: what the engines know the adapter by.

        Where `endpoints` only decode, `prefiller` is the address (`ip:port`) of the engine that computes the prompt, which must know the adapter by the same
        name, since the sidecar sends it the same body; "": the decoding engine computes the prompt itself. None: the endpoints do both.

        `is_base`: the request is for a base model, so that any endpoint of the pool could answer it.

        The destination header is always set, and a decoding engine's sidecar is told everything, so what the client sent never steers.
        """
        addresses = tuple([endpoint.address for endpoint in endpoints[: self.max_endpoints]])
        destination = ",".join(addresses)
        headers = {DESTINATION_HEADER: destination}
        if self.cluster_header is not None:
            headers[self.cluster_header] = pool
        if self.for_conformance:
            headers[ECHO_HEADER] = f"{SERVED_HEADER}:{addresses[0]}"
        removed: tuple[str, ...] = ()
        if prefiller:
            headers |= dict.fromkeys(PREFILLER_HEADERS, prefiller)
            removed = SIDECAR_HEADERS
        elif prefiller is not None:
            removed = (*PREFILLER_HEADERS, *SIDECAR_HEADERS)
        return Mutation(
            set_headers=headers,
            remove_headers=removed,
            metadata={LB_NAMESPACE: {DESTINATION_HEADER: destination}, OWN_NAMESPACE: notes},
            clear_route_cache=self.cluster_header is not None or self.for_conformance,
            model=model,
            endpoints=addresses,
            is_base=is_base,
        )
