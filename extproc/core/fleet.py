"""What discovery shows: the endpoints of each pool, as whole sets. What follows from a change is the membership's to find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Found:
    """One endpoint, as a source of endpoints shows it."""

    endpoint: Endpoint
    is_leaving: bool = False  # the source says that it will go, as Kubernetes does of a pod that terminates: it drains


Fleet = Mapping[str, Sequence[Found]]  # by the pool's name; of each address one
