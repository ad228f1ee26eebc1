"""What a source of endpoints is, and what it says.

A source follows one place (a file, a name, a prefix of keys) for one pool. It yields `Shown`, the whole set, or `Failed`, for as long as it is listened
to, at its own pace, and repeats neither needlessly. A failure is something that it says, not something that ends it: the place will come back.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from ..core.fleet import Found


@dataclass(frozen=True, slots=True)
class Shown:
    """All endpoints of the pool that the source shows now, of each address one."""

    endpoints: tuple[Found, ...]
    left_out: tuple[str, ...] = ()  # the first complaints about entries that cannot be endpoints
    left_out_count: int = 0
    note: str = ""  # what an operator should know of an empty set, as "the name does not exist"


@dataclass(frozen=True, slots=True)
class Failed:
    """The source could not be asked, or what it says cannot be read: nothing is known of the set."""

    why: str


Seen = Shown | Failed


class Source(Protocol):
    """One place where endpoints of one pool are found."""

    @property
    def name(self) -> str:
        """What logs, metrics and the sets on disk call it; within its pool no other has that name."""

    @property
    def is_final(self) -> bool:
        """Whether it says nothing by mistake, as the settings themselves: an empty set of it is believed at once, and nothing of it is kept."""

    def sets(self) -> AsyncGenerator[Seen, None]:
        """What it sees, from now on. Ends only when it is closed."""
