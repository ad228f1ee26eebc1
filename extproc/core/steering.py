"""The mutation that sends a request to chosen endpoints, in the words of the Endpoint Picker protocol (v1.0.0)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .endpoint import Endpoint
from .events import Mutation

DESTINATION_HEADER = "x-gateway-destination-endpoint"  # "MUST set both": the header, and the metadata key of the same name
LB_NAMESPACE = "envoy.lb"
OWN_ANSWER = "models"  # what Envoy's details say of a request that the router answered itself, and well
OWN_NAMESPACE = "lora_extproc"  # what Envoy's access log prints of our decision


@dataclass(frozen=True, slots=True)
class Steering:
    """How the choice is told. With `cluster_header`, the pool's name goes into that header and the route is chosen anew."""

    cluster_header: str | None = None
    max_endpoints: int = 3

    def mutation(self, pool: str, endpoints: Sequence[Endpoint], notes: Mapping[str, str | float], model: str = "") -> Mutation:
        """To `endpoints`, best first: Envoy's retries walk the list. `notes` go to the access log. `model`: what the engines know the adapter by.

        The destination header is always set, so one that the client sent never steers.
        """
        destination = ",".join([endpoint.address for endpoint in endpoints[: self.max_endpoints]])
        headers = {DESTINATION_HEADER: destination}
        if self.cluster_header is not None:
            headers[self.cluster_header] = pool
        return Mutation(
            set_headers=headers,
            metadata={LB_NAMESPACE: {DESTINATION_HEADER: destination}, OWN_NAMESPACE: notes},
            clear_route_cache=self.cluster_header is not None,
            model=model,
        )
