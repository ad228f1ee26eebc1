"""The parts of Kubernetes objects that every kind has, and where each kind lives below the API server's root. Pure.

A kind that is read is a Struct with `metadata` and the fields that are needed; msgspec skips the rest of an object without making Python values of it.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Object(msgspec.Struct, rename="camel"):
    """Any object, of which only the metadata counts."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)

    @property
    def key(self) -> str:
        """What tells objects of one kind apart: `namespace/name`, or `name` where the kind has no namespaces."""
        return f"{self.metadata.namespace}/{self.metadata.name}" if self.metadata.namespace else self.metadata.name


T = TypeVar("T", bound=Object)


@dataclass(frozen=True, slots=True)
class Kind:
    """`group` is "" for the core API."""

    group: str
    version: str
    plural: str  # as URLs and roles spell it

    @property
    def label(self) -> str:
        """As roles and error messages name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = (f"/namespaces/{namespace}" if namespace else "", f"/{self.plural}", f"/{name}" if name else "", f"/{subresource}" if subresource else "")
        return root + "".join(parts)


PODS = Kind("", "v1", "pods")
ENDPOINT_SLICES = Kind("discovery.k8s.io", "v1", "endpointslices")
INFERENCE_POOLS = Kind("inference.networking.k8s.io", "v1", "inferencepools")
LEASES = Kind("coordination.k8s.io", "v1", "leases")
