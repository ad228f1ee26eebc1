"""What this node has: names, the artifacts they lead to, the disk's budget. Changed by the stager's parts, read by everybody; no I/O."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass

from ...core.artifact import AdapterName, ArtifactId, digest_of
from ...core.lru import Index


@dataclass(slots=True)
class Named:
    """One adapter name on this node."""

    id: ArtifactId  # of the artifact: its digest; for one that others put here `digest@name`
    origin: str
    revision: str
    checked: float | None = None  # when it was last compared with its origin (monotonic); None: not since the start
    refresh_error: str = ""
    final: bool = False  # its revision can never change
    refused: str = ""  # why today's settings do not allow to serve it; it is here until the engine lets it go

    @property
    def digest(self) -> str:
        return digest_of(self.id)


class Holdings:
    """Names and artifacts, always consistent with each other."""

    def __init__(self, max_bytes: int) -> None:
        self.index = Index[ArtifactId](max_bytes)
        self.pins: dict[AdapterName, str] = {}  # pinned names -> the SHA-256 their weights must have, or ""
        self._named: dict[AdapterName, Named] = {}
        self._sorted: list[AdapterName] | None = None  # all names; None: not kept yet, since a start puts a hundred thousand of them
        self._names_of: dict[ArtifactId, AdapterName | tuple[AdapterName, ...]] = {}  # one name, as nearly always, is kept without a tuple

    def __len__(self) -> int:
        return len(self._named)

    def __iter__(self) -> Iterator[AdapterName]:
        return iter(self._named)

    def get(self, name: AdapterName) -> Named | None:
        return self._named.get(name)

    def names_of(self, id_: ArtifactId) -> tuple[AdapterName, ...]:
        """All names that lead to the artifact."""
        names = self._names_of.get(id_, ())
        return (names,) if isinstance(names, str) else names

    def put(self, name: AdapterName, named: Named) -> ArtifactId | None:
        """Let `name` lead there; the id of what it led to before, if no name leads to that any more."""
        if self._sorted is not None and name not in self._named:
            insort(self._sorted, name)
        old = self._drop(name)
        self._named[name] = named
        others = self.names_of(named.id)
        self._names_of[named.id] = (*others, name) if others else name
        self.index.named(named.id, has_names=True)
        self._show_pin(named.id)
        return old if old != named.id else None

    def drop(self, name: AdapterName) -> ArtifactId | None:
        """Forget `name`; the id of what it led to, if it was the last name of that."""
        if self._sorted is not None and name in self._named:
            del self._sorted[bisect_left(self._sorted, name)]
        return self._drop(name)

    def sort(self) -> None:
        """Keep the names sorted from now on: each that comes or goes costs some microseconds then."""
        self._sorted = sorted(self._named)

    def after(self, name: str, limit: int) -> list[AdapterName]:
        """At most `limit` names in their order (by code points), from the first after `name` on."""
        if self._sorted is None:
            self.sort()
        assert self._sorted is not None
        first = bisect_right(self._sorted, name) if name else 0
        return self._sorted[first : first + limit]

    def _drop(self, name: AdapterName) -> ArtifactId | None:
        named = self._named.pop(name, None)
        if named is None:
            return None
        left = tuple(other for other in self.names_of(named.id) if other != name)
        if left:
            self._names_of[named.id] = left if len(left) > 1 else left[0]
        else:
            self._names_of.pop(named.id, None)
            self.index.named(named.id, has_names=False)
        self._show_pin(named.id)
        return None if left else named.id

    def pin(self, name: AdapterName, sha256: str = "") -> None:
        self.pins[name] = sha256
        if (named := self.get(name)) is not None:
            self._show_pin(named.id)

    def unpin(self, name: AdapterName) -> None:
        self.pins.pop(name, None)
        if (named := self.get(name)) is not None:
            self._show_pin(named.id)

    def _show_pin(self, id_: ArtifactId) -> None:
        self.index.pin(id_, pinned=any(name in self.pins for name in self.names_of(id_)))
