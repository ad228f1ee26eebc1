"""What an endpoint may be given, from what was heard of its stager and of its engine.

A stager that is gone deletes nothing, so what it leased stays where it is; only its engine decides whether requests can still be answered there. An
engine that has gone knows no adapter when it comes back: what was leased there is forgotten with it.

An endpoint that has come, or come back with an engine that knows nothing, is given what it will own before it is sent anything. One that has vanished
keeps its place for a while, so that a blip moves nothing.

| the stager | its engine | the endpoint is |
| --- | --- | --- |
| whatever it says | the source of endpoints shows the endpoint no longer | down |
| whatever it says | the proxy passed it over, twice in a row, or for an endpoint that was not named | down, until the proxy may try again |
| says that it is ready, or was not heard of yet | (the stager says so) | ready |
| the same | it has what it will own not yet, or Envoy does not know it yet | joining |
| the same | the source of endpoints says that it will go | draining |
| says that the node drains | (the stager says so) | draining |
| says that it is not ready: its engine or its disk fails | | down |
| says that it is stopping | not asked yet, or answers | draining |
| says that it is stopping | does not answer | down |
| is silent, for less time than counts as lost | not asked yet, or answers | as it was |
| is silent | does not answer either | down: the node is cut off |
| is lost: its stream ended, or it was silent for too long | not asked yet, or answers | draining |
| is lost | does not answer | down |
"""

from dataclasses import dataclass
from enum import Enum


class Standing(Enum):
    """What an endpoint may be given."""

    __hash__ = object.__hash__  # members are compared by identity

    JOINING = "what it will own, to be prepared; no request"
    READY = "everything"
    DRAINING = "what is leased there, and base models; nothing is staged"
    DOWN = "nothing"


class Stager(Enum):
    """What was heard of the stager last."""

    __hash__ = object.__hash__

    READY = "ready"
    NOT_READY = "not ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    LOST = "lost"


MISSED = 2  # one may be a connection that was closed for being idle; where nobody who was named served, the client must not be sent there again for a proof


@dataclass(frozen=True, slots=True)
class Observed:
    """What one router knows of one endpoint. `why` is the sentence that logs and the control API show."""

    stager: Stager = Stager.READY  # before its first word: the request that is sent there finds out
    why: str = ""
    is_silent: bool = False
    engine_answers: bool | None = None  # to this router; None: not asked, since its stager tells
    is_prepared: bool = True
    is_leaving: bool = False  # as its source says
    is_gone: bool = False  # from its source
    missed: int = 0  # requests in a row for which the proxy passed it over; MISSED at once where it left the list

    @property
    def is_emptied(self) -> bool:
        """Whether what is leased there is to be made warm elsewhere, where it drains. A stager that is lost may be back in a moment."""
        return self.is_leaving or self.stager is not Stager.LOST

    def standing(self) -> tuple[Standing, str]:
        """The table above."""
        if self.is_gone:
            return Standing.DOWN, "its source of endpoints shows it no longer"
        if self.missed >= MISSED:
            return Standing.DOWN, "the proxy could not reach it"
        if self.stager is Stager.NOT_READY:
            return Standing.DOWN, self.why
        if (self.is_silent or self.stager in (Stager.LOST, Stager.STOPPING)) and self.engine_answers is False:
            return Standing.DOWN, f"{self.why or 'its stager is silent'}; its engine does not answer either"
        if self.stager is Stager.READY and self.is_leaving:
            return Standing.DRAINING, "its source of endpoints says that it will go"
        if self.stager is Stager.READY:
            return (Standing.READY, "") if self.is_prepared else (Standing.JOINING, "it is given what it will own")
        return Standing.DRAINING, self.why
