"""One model-server address Envoy can send to, and the pool it belongs to."""

from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """Identity is the address and the instance: Envoy sees the address, and a pod that was replaced under an old address is a new endpoint, which has
    nothing. A node that comes back with another stager is the same endpoint."""

    address: str  # ip:port, as Envoy's cluster spells it
    node: str = field(default="", compare=False)
    stager: str = field(default="", compare=False)  # host:port of the stager that fills this node's directory; "" = nothing is staged here
    instance: str = ""  # what the source of endpoints tells instances apart by, as a pod's UID; "": it does not
    zone: str = field(default="", compare=False)  # what fails together; "": not known
    host: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.address.encode())  # hashed once per key, encoded once


def spelled(address: str) -> str:
    """`ip:port` in the one spelling by which addresses are compared, which is Envoy's, too. A host's name stays as it is."""
    host, _, port = address.rpartition(":")
    try:
        ip = ip_address(host.strip("[]"))
    except ValueError:
        return address
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    return f"{ip}:{int(port)}" if ip.version == 4 else f"[{ip}]:{int(port)}"


@lru_cache(4096)  # asked of each endpoint that was named, where the proxy tells who served
def is_ip(host: str) -> bool:
    """Whether `host` is an IP address, in brackets or not: Envoy's override_host knows endpoints by nothing else."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
