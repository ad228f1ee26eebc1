"""How long the last good set of a source outlives what the source says now. Pure: `now` is given, in seconds of one clock.

A set that is suddenly empty may be meant, as a pool that is scaled to zero, or be a loss: a file that is being filled, a DNS server that has just started,
keys deleted by mistake. Nothing tells them apart at the time, so both are believed after `empty_s`. Where every endpoint of the last good set
was leaving, the empty one is what was announced.

| state | counts | endpoints shown | none shown | it fails | after its time |
| --- | --- | --- | --- | --- | --- |
| waiting: it has said nothing yet | what an earlier process kept | current | emptied | failing | lost, after `failed_s` |
| current | what it shows | current | emptied | failing | |
| emptied: it shows none | the last good set | current | emptied | emptied: its last word was "none" | current with none, after `empty_s` |
| failing | the last good set | current | emptied | failing | lost, after `failed_s` |
| lost | none | current | current with none | lost | |

Where the last good set is empty, there is nothing to keep: "none shown" leads to current.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from ..core.fleet import Found


class State(Enum):
    """Of one source. The value is what logs call it."""

    __hash__ = object.__hash__  # members are compared by identity

    WAITING = "has not answered yet"
    CURRENT = "is current"
    EMPTIED = "shows no endpoints"
    FAILING = "fails"
    LOST = "has failed for too long"


@dataclass(frozen=True, slots=True)
class Keep:
    """For how many seconds a last good set counts."""

    failed_s: float
    empty_s: float


@dataclass(frozen=True, slots=True)
class Belief:
    """What is believed of one source."""

    keep: Keep
    state: State = State.WAITING
    endpoints: tuple[Found, ...] = ()  # those that count
    since: float = 0.0  # when what keeps the last good set from being current began

    def shown(self, endpoints: tuple[Found, ...], now: float) -> Self:
        """The source shows this set."""
        if endpoints or not self.endpoints or all(found.is_leaving for found in self.endpoints):
            return replace(self, state=State.CURRENT, endpoints=endpoints)
        if self.state is State.EMPTIED:
            return self
        return replace(self, state=State.EMPTIED, since=now).at(now)

    def failed(self, now: float) -> Self:
        """The source cannot say."""
        match self.state:
            case State.CURRENT:
                return replace(self, state=State.FAILING, since=now).at(now)
            case State.WAITING:
                return replace(self, state=State.FAILING).at(now)
            case _:
                return self

    def at(self, now: float) -> Self:
        """What time has made of it."""
        until = self.until
        if until is None or now < until:
            return self
        return replace(self, state=State.CURRENT if self.state is State.EMPTIED else State.LOST, endpoints=())

    @property
    def until(self) -> float | None:
        """When the last good set stops to count. None: nothing ends it."""
        match self.state:
            case State.EMPTIED:
                return self.since + self.keep.empty_s
            case State.FAILING:
                return self.since + self.keep.failed_s
            case State.WAITING if self.endpoints:
                return self.since + self.keep.failed_s
            case _:
                return None
