"""What came of a case: figures from its requests, and the bounds that they are compared with. Pure: values in, values out.

A bound on a time lets NOISE_S pass, and takes off what the bystander saw of the machine's own stops.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from .load import SERVED, Bystander, Kind, Request

NOISE_S = 0.5  # two cores do eleven processes' work here
SLOW_S = 1.0  # nothing that is warm takes so long of itself
MAX_LOG_LINES = 10
Since = Literal["start", "fault", "mend"]


class Verdict(StrEnum):
    PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
    KNOWN = "known"  # fails, and is written down for later work


@dataclass
class Record:
    """All that was seen. Times are the loop's."""

    bystander: Bystander
    requests: list[Request] = field(default_factory=list)
    fault_at: float | None = None
    mended_at: float | None = None
    figures: dict[str, float] = field(default_factory=dict)  # what the script counted or measured itself
    died: list[str] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)

    def of(self, kinds: Collection[Kind] = SERVED, since: Since = "start") -> list[Request]:
        """Requests that began from then on."""
        after = {"start": 0.0, "fault": self.fault_at, "mend": self.mended_at}[since]
        if after is None:
            raise ValueError(f"the script marks no {since}")
        return [request for request in self.requests if request.kind in kinds and request.began >= after]

    def took_s(self, request: Request) -> float:
        """How long its client waited, without the machine's own stops."""
        return request.ended - request.began - self.bystander.stopped_s(request.began, request.ended)

    def longest_s(self, requests: Iterable[Request]) -> float:
        return max(map(self.took_s, requests), default=0.0)

    def last_hit_s(self, kinds: Collection[Kind], since: Since, over_s: float = SLOW_S) -> float:
        """When, after the fault or its end, the last request began that failed or took over `over_s`; 0: none did."""
        after = (self.fault_at if since == "fault" else self.mended_at) or 0.0
        return max((r.began - after for r in self.of(kinds, since) if r.failed or self.took_s(r) > over_s), default=0.0)

    def warm_ms(self, share: float) -> float:
        """A percentile of the warm requests that were answered well; 0: none was."""
        took = sorted(self.took_s(request) for request in self.of((Kind.WARM,)) if not request.failed)
        return 1000 * took[min(len(took) - 1, int(share * len(took)))] if took else 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """A promise, how it is measured, and whether that is good enough."""

    text: str
    measure: Callable[[Record], float]
    limit: float
    unit: str = ""
    at_least: bool = False
    evidence: Callable[[Record], bool] = lambda _record: True  # whether there is anything to judge by
    noise: float = 0.0

    def judge(self, record: Record) -> "Judged":
        if not self.evidence(record):
            return Judged(self.text, "nothing was there to judge by", holds=False)
        value = self.measure(record)
        holds = value >= self.limit - self.noise if self.at_least else value <= self.limit + self.noise
        return Judged(self.text, f"{value:.3g}{self.unit}" if value % 1 else f"{value:.0f}{self.unit}", holds=holds)


@dataclass(frozen=True, slots=True)
class Judged:
    text: str
    measured: str
    holds: bool


def none_failed(*kinds: Kind, since: Since = "start") -> Bound:
    """Not even without a second try."""
    kinds = kinds or SERVED
    return Bound(f"0 {_named(kinds)}fail{_after(since)}", lambda r: sum(q.failed for q in r.of(kinds, since)), 0, evidence=_some(kinds, since))


def none_failed_twice(*kinds: Kind, since: Since = "start") -> Bound:
    """After one more try 0.5 s later."""
    kinds = kinds or SERVED
    text = f"0 {_named(kinds)}fail after one retry{_after(since)}"
    return Bound(text, lambda r: sum(q.failed_twice for q in r.of(kinds, since)), 0, evidence=_some(kinds, since))


def held_at_most(seconds: float, *kinds: Kind, since: Since = "start") -> Bound:
    """No request of these kinds waits longer, whatever comes of it."""
    kinds = kinds or SERVED
    text = f"no {_named(kinds)}request is held over {seconds:g} s{_after(since)}"
    return Bound(text, lambda r: r.longest_s(r.of(kinds, since)), seconds, " s", evidence=_some(kinds, since), noise=NOISE_S)


def over_within(seconds: float, *kinds: Kind, since: Since = "fault", over_s: float = SLOW_S) -> Bound:
    """Who comes later than that notices nothing: answered well, and within `over_s`."""
    kinds = kinds or SERVED
    what = f"{_named(kinds)}requests that come {seconds:g} s{_after(since)} or later notice nothing"
    return Bound(what, lambda r: r.last_hit_s(kinds, since, over_s), seconds, " s", evidence=_some(kinds, since), noise=NOISE_S)


def only_for(reason: str, *kinds: Kind) -> Bound:
    """Some fail, and each of them for this reason."""

    def others(record: Record) -> int:
        return sum(request.failed and request.reason != reason for request in record.of(kinds))

    def some(record: Record) -> bool:
        return any(request.failed and request.reason == reason for request in record.of(kinds))

    return Bound(f"{_named(kinds)}requests fail with {reason} alone", others, 0, evidence=some)


def figure(name: str, limit: float, text: str, unit: str = "", *, at_least: bool = False, noise: float = 0.0) -> Bound:
    """What the script counted or measured itself under that name; yes is 1, and no is 0."""
    return Bound(text, lambda r: r.figures[name], limit, unit, at_least=at_least, noise=noise, evidence=lambda r: name in r.figures)


def exactly(name: str, value: float, text: str) -> Bound:
    """A figure that is right or wrong: how far it is off."""
    return Bound(text, lambda r: abs(r.figures[name] - value), 0, " off", evidence=lambda r: name in r.figures)


NONE_WRONG = Bound("0 answers with other weights", lambda r: sum(q.wrong or (q.again is not None and q.again.wrong) for q in r.requests), 0)
NONE_DIED = Bound("no process ends by itself or stays away", lambda r: len(r.died), 0)
NO_TRACEBACK = Bound("no traceback in a log", lambda r: sum(n for line, n in r.said.items() if ": Traceback" in line), 0)
ALWAYS = (NONE_WRONG, NONE_DIED, NO_TRACEBACK)


def _some(kinds: Collection[Kind], since: Since) -> Callable[[Record], bool]:
    """One of each kind at least."""
    return lambda record: {request.kind for request in record.of(kinds, since)} == set(kinds)


def _named(kinds: Collection[Kind]) -> str:
    return "" if set(kinds) == set(SERVED) else f"{' or '.join(kinds)} "


def _after(since: Since) -> str:
    return {"start": "", "fault": " after the fault", "mend": " after its end"}[since]


@dataclass(frozen=True)
class Outcome:
    """One case's line of the report; plain values, so that it can cross from one process to another."""

    case: str
    verdict: Verdict
    why: str = ""  # it was skipped
    seconds: float = 0.0
    requests: int = 0
    failed: int = 0
    failed_twice: int = 0
    longest_s: float = 0.0
    recovery_s: float = 0.0
    warm_p50_ms: float = 0.0
    warm_p99_ms: float = 0.0
    stops: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    bounds: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Outcome":
        """What `plain` was made of."""
        return cls(**{**plain, "verdict": Verdict(plain["verdict"])})


def outcome(case: str, record: Record, bounds: Iterable[Bound], seconds: float, *, known: bool) -> Outcome:
    """Compare a record with its bounds."""
    judged = [bound.judge(record) for bound in (*bounds, *ALWAYS)]
    verdict = Verdict.PASS if all(one.holds for one in judged) else Verdict.KNOWN if known else Verdict.FAIL
    served = record.of()
    return Outcome(
        case,
        verdict,
        seconds=round(seconds, 1),
        requests=len(served),
        failed=sum(request.failed for request in served),
        failed_twice=sum(request.failed_twice for request in served),
        longest_s=round(record.longest_s(served), 3),
        recovery_s=round(_recovery_s(record), 2),
        warm_p50_ms=round(record.warm_ms(0.5), 1),
        warm_p99_ms=round(record.warm_ms(0.99), 1),
        stops=len(record.bystander.stops),
        answers=dict(Counter(f"{q.kind} {q.status} {q.reason}".strip() for q in record.requests).most_common(12)),
        figures={name: round(value, 3) for name, value in record.figures.items()},
        bounds=[asdict(one) for one in judged],
        said=[f"{times} x {line}" for line, times in record.said.most_common(MAX_LOG_LINES)] + record.died[:MAX_LOG_LINES],
    )


def _recovery_s(record: Record) -> float:
    """The start of the last request that failed, or of the last warm one that was slow, after the fault."""
    if record.fault_at is None:
        return 0.0
    failed = max((q.began - record.fault_at for q in record.of(since="fault") if q.failed), default=0.0)
    return max(failed, record.last_hit_s((Kind.WARM,), "fault"))
