"""What was refused and why, so that asking again costs neither the origin a question nor the node a download.

| refused because | remembered for | asked again within that time |
| --- | --- | --- |
| no origin has it, or its origin forbids it | `negative_ttl_s` | answered without a question |
| it is no valid adapter | `refusal_ttl_s`, of that revision under those rules | after `negative_ttl_s` the origin is asked for its revision; the same one is not fetched again |
| it arrived otherwise than its origin states | `negative_ttl_s`, twice as long each time, at most `refusal_ttl_s` | likewise: a transfer may have been damaged, and an origin may be wrong for long |
| a peer's copy of it was one of the last two | as long as that | that copy is not fetched again; another peer or the origin is taken, for whose adapter it says nothing |

No I/O; `now` is any clock that does not go back, in seconds.
"""

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field

from ...core.artifact import AdapterName
from ...errors import AdapterDamaged, InvalidAdapter, LoraExtprocError, ModelNotFound, OriginRefused

MAX_NAMES = 10_000  # some megabytes; a client may ask for any number of names
MAX_VERDICTS = 4  # of one name: it may be asked for with different digests
MAX_COPIES = 10_000  # of peers; some megabytes


@dataclass(frozen=True, slots=True)
class Version:
    """What was judged: one revision of one origin, under the rules that counted then. The same again is refused again."""

    origin: str
    revision: str  # "": the origin states none, and nothing tells this content from the next
    stated: tuple[str, ...] = ()  # the SHA-256 that its weights had to have
    rules: Hashable = None  # what the settings and the engine ask of adapters


@dataclass(slots=True)
class _Verdict:
    version: Version
    error: InvalidAdapter
    until: float
    lasted_s: float


@dataclass(slots=True)
class _Name:
    answer: LoraExtprocError | None = None  # to whoever asks before `until`
    until: float = float("-inf")
    verdicts: list[_Verdict] = field(default_factory=list)  # the latest last


class Refusals:
    """By adapter name, the oldest of MAX_NAMES forgotten first. `short_s` and `long_s` are the settings `negative_ttl_s` and `refusal_ttl_s`; 0: not remembered."""

    def __init__(self, short_s: float, long_s: float, max_names: int = MAX_NAMES) -> None:
        self._short_s = short_s
        self._long_s = long_s
        self._max_names = max_names
        self._names: dict[AdapterName, _Name] = {}
        self._copies: dict[Version, _Verdict] = {}  # of peers; at most MAX_COPIES, the oldest forgotten first

    def __len__(self) -> int:
        return len(self._names)

    def learn(self, name: AdapterName, error: LoraExtprocError, now: float) -> None:
        """A flight of `name` ended in this: what no origin has or gives is answered with it within `negative_ttl_s`."""
        if isinstance(error, ModelNotFound | OriginRefused):
            self._answer_with(name, error, now)

    def answer(self, name: AdapterName, now: float) -> LoraExtprocError | None:
        """What to answer who asks for `name` now, without asking an origin; None: look for it."""
        known = self._names.get(name)
        return copy.copy(known.answer) if known is not None and known.answer is not None and now < known.until else None

    def condemn(self, name: AdapterName, version: Version, error: InvalidAdapter, now: float) -> None:
        """That version of `name` was fetched, or looked into, and refused. What was refused for its digest is no answer to who states another."""
        if error.what != "digest":
            self._answer_with(name, error, now)
        known = self._name(name)
        before = next((verdict for verdict in known.verdicts if verdict.version == version), None)
        known.verdicts = [verdict for verdict in known.verdicts if verdict is not before][1 - MAX_VERDICTS :]
        known.verdicts.append(self._judged(version, before, error, now))

    def verdict(self, name: AdapterName, version: Version, now: float) -> InvalidAdapter | None:
        """Why that version of `name` was refused, which is then the answer for another `negative_ttl_s`; None if it was not, or so long ago that it is
        looked at again.
        """
        known = self._names.get(name)
        found = next((verdict for verdict in known.verdicts if verdict.version == version and now < verdict.until), None) if known is not None else None
        if found is None:
            return None
        if found.error.what != "digest":
            self._answer_with(name, found.error, now)
        return copy.copy(found.error)

    def condemn_copy(self, copy_: Version, error: InvalidAdapter, now: float) -> None:
        """What a peer sent was refused. `copy_` has the peer as its origin and the digest of its content as the revision."""
        before = self._copies.pop(copy_, None)
        if before is None and len(self._copies) >= MAX_COPIES:
            del self._copies[next(iter(self._copies))]
        self._copies[copy_] = self._judged(copy_, before, error, now)

    def is_condemned(self, copy_: Version, now: float) -> bool:
        """Whether that copy of a peer is not to be fetched."""
        found = self._copies.get(copy_)
        return found is not None and now < found.until

    def forbids(self, name: AdapterName, now: float) -> InvalidAdapter | None:
        """Why `name`, as far as is known, cannot be served: the latest verdict. For lists; says nothing of an older version that is on this node."""
        known = self._names.get(name)
        found = known.verdicts[-1] if known is not None and known.verdicts else None
        return found.error if found is not None and now < found.until else None

    def forbidden(self, now: float) -> list[AdapterName]:
        """All names that cannot be served, as far as is known. Linear in `max_names`: two milliseconds for the default."""
        return [name for name in self._names if self.forbids(name, now) is not None]

    def forget(self, name: AdapterName) -> None:
        """Look at it anew whenever somebody asks."""
        self._names.pop(name, None)

    def found(self, name: AdapterName) -> None:
        """It is here now: what was answered before says nothing any more. Verdicts of other versions stay."""
        if (known := self._names.get(name)) is not None:
            known.answer = None
            if not known.verdicts:
                del self._names[name]

    def _judged(self, version: Version, before: _Verdict | None, error: InvalidAdapter, now: float) -> _Verdict:
        lasts_s = self._long_s if version.revision else min(self._short_s, self._long_s)
        if isinstance(error, AdapterDamaged):
            lasts_s = min(self._long_s, 2 * before.lasted_s if before is not None else self._short_s)
        return _Verdict(version, copy.copy(error).bare(), now + lasts_s, lasts_s)

    def _answer_with(self, name: AdapterName, error: LoraExtprocError, now: float) -> None:
        if self._short_s:
            known = self._name(name)
            known.answer, known.until = copy.copy(error).bare(), now + self._short_s

    def _name(self, name: AdapterName) -> _Name:
        if name not in self._names and len(self._names) >= self._max_names:
            del self._names[next(iter(self._names))]
        return self._names.setdefault(name, _Name())
