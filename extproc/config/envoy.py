"""What Envoy's configuration is rendered from."""

from typing import Literal

from .values import Address, Addresses, Group, OptionalAddress, Seconds


class EnvoySettings(Group):
    listen: Address = "127.0.0.1:10000"
    """Where clients come in."""
    admin: OptionalAddress = "127.0.0.1:9901"
    """Envoy's own administration. Empty: off."""
    router: Addresses = "127.0.0.1:9002"
    """The router, as Envoy reaches it; several replicas separated by commas, or a name that has all their addresses."""
    endpoints: Literal["xds", "static"] = "xds"
    """How Envoy learns of pools and their endpoints. `xds`: from the router, which serves CDS and EDS on `router.listen`; Envoy follows the fleet without a
    restart, and goes on with what it has while no router answers. `static`: they are written into its configuration, and the router serves no xDS. The
    default suits a fleet that moves, and one that does not loses nothing: without a router Envoy sends nothing anywhere in either case."""
    router_ca_file: str = ""
    """With `router.tls`: the certificates that Envoy verifies the router's by. Empty: it encrypts without verifying."""
    router_health_interval_s: Seconds = 1.0
    """How often Envoy asks each router replica's gRPC health. Below `router.lameduck_s`, so that a replica can leave without losing a request."""
    processing_mode: Literal["FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"] = "FULL_DUPLEX_STREAMED"
    """How Envoy shows bodies. FULL_DUPLEX_STREAMED holds without a timer and without a limit of Envoy's own; BUFFERED and NONE have both."""
    hold_s: Seconds = 300.0
    """The longest a request may be held; Envoy's timers are set above it. At least `router.max_stage_deadline_s`."""
    silence_s: Seconds = 900.0
    """The longest that an engine may say nothing while it generates: the whole of an answer that is not streamed. Then Envoy answers 504."""
    health_interval_s: Seconds = 2.0
    """How often Envoy asks each model server's `/health`."""
    connect_timeout_s: Seconds = 1.0
    """After this, the next endpoint of the list is tried."""
