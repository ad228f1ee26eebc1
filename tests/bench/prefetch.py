"""`python -m tests.bench.prefetch`: how often an adapter that wakes up was expected, and how often one that was expected wakes up.

The router's own histories (`core/prefetch.py`) watch some days of made-up requests, and beside them stands the rule of who knows nothing but yesterday:
what was active in this ten minutes of yesterday is brought. The requests have the shape that was measured on ServeGen's two weeks: clients that are active
for 7 to 40 % of the time, in stretches of ten minutes and more, with gamma arrivals of CV 1.2 within them. Their kinds are mixed so that the rule of yesterday
does about as well as it did there: half of the wake-ups after an hour, a quarter of what it brings.

An adapter is gone FLOOR_S after its last request, and again when what was expected of it is over: a node whose room is wanted by others. A wake-up is a
request after more than an hour. Recall is the share of wake-ups that were expected, precision the share of what was brought that was asked for before it
was gone. The first two days only teach.
"""

import argparse
import heapq
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from extproc.core.prefetch import BUCKET_S, DAY, FLOOR_S, MINUTE_S, By, Histories

from .harness import machine

HOUR_S, DAY_S = 3600.0, 86_400.0
TAUGHT_S = 2 * DAY_S
WAKE_S = HOUR_S
CV = 1.2  # of arrivals within an activity
LOOKS_PER_MINUTE = 4


def activities(kind: str, dice: random.Random, days: int) -> Iterator[tuple[float, float]]:
    """Begin and length of each stretch in which a client is active, in seconds."""
    end = days * DAY_S
    if kind == "clockwork":  # a pipeline that runs every so often
        period = dice.choice((20, 30, 30, 60, 60, 90, 120, 180)) * MINUTE_S
        at = dice.random() * period
        while at < end:
            yield at + dice.gauss(0, 60.0), dice.uniform(60.0, 300.0)
            at += period
    elif kind == "daily":  # jobs and people with habits
        times = [dice.random() * DAY_S for _ in range(dice.randint(2, 6))]
        for day in range(days):
            for time in sorted(times):
                if dice.random() < 0.8:
                    yield day * DAY_S + time + dice.gauss(0, 300.0), dice.expovariate(1 / 1200.0) + 300.0
    else:  # people: more of them by day
        share, length = dice.uniform(0.07, 0.4), 1800.0
        noon, at = dice.gauss(0.5, 0.1) * DAY_S, 0.0
        while at < end:
            hours_off = abs((at - noon + DAY_S / 2) % DAY_S - DAY_S / 2) / HOUR_S
            activity = share * (1.9 if hours_off < 5 else 0.2)
            at += dice.expovariate(activity / (length * max(0.05, 1 - activity)))
            lasts = dice.expovariate(1 / length) + BUCKET_S / 2
            yield at, lasts
            at += lasts


def requests(kind: str, dice: random.Random, days: int) -> Iterator[float]:
    """Times of one client's requests."""
    shape = 1 / CV**2
    every = dice.uniform(20.0, 240.0)
    for begin, lasts in activities(kind, dice, days):
        at = max(0.0, begin)
        while at < begin + lasts:
            yield at
            at += dice.gammavariate(shape, every / shape)


def fleet(clients: int, days: int, seed: int) -> list[tuple[float, str]]:
    """All requests in their order."""
    dice = random.Random(seed)
    streams = []
    for number in range(clients):
        kind = dice.choices(("clockwork", "daily", "people"), (0.1, 0.35, 0.55))[0]
        streams.append([(at, f"{kind}-{number}") for at in sorted(requests(kind, dice, days))])
    return list(heapq.merge(*streams))


@dataclass
class Score:
    """What one rule brought, and what came of it."""

    brought: int = 0
    used: int = 0
    wakes: int = 0
    found: int = 0
    held_s: float = 0.0
    until: dict[str, tuple[float, float]] = field(default_factory=dict)  # what is there -> since when, until when

    def bring(self, adapter: str, now: float, until: float) -> None:
        if adapter in self.until:
            self.until[adapter] = (self.until[adapter][0], until)
        else:
            self.until[adapter] = (now, until)
            self.brought += 1

    def ask(self, adapter: str, now: float, idle_s: float | None) -> None:
        since, until = self.until.pop(adapter, (0.0, 0.0))
        is_there = until > now
        if until:
            self.used += is_there
            self.held_s += min(now, until) - since
        if idle_s is not None and idle_s > WAKE_S:
            self.wakes += 1
            self.found += is_there

    def expire(self, now: float) -> None:
        for adapter in [adapter for adapter, (_, until) in self.until.items() if until <= now]:
            since, until = self.until.pop(adapter)
            self.held_s += until - since


def simulate(trace: list[tuple[float, str]], warm_up_s: float) -> dict[str, Score]:
    """The scores of the histories, of each of their rules alone, and of yesterday."""
    histories = Histories()
    both, by, yesterday = Score(), {rule: Score() for rule in By}, Score()
    everything = (both, *by.values(), yesterday)
    active: dict[int, set[str]] = defaultdict(set)
    last: dict[str, float] = {}
    next_look, bucket, counts = 0.0, -1, False
    for now, adapter in trace:
        while next_look <= now:
            if not counts and next_look >= warm_up_s:
                counts = True
                for score in everything:
                    score.brought = score.used = score.wakes = score.found = 0
                    score.held_s = 0.0
                    score.until.clear()
            for score in everything:
                score.expire(next_look)
            for expected in histories.look(next_look, len(histories) // LOOKS_PER_MINUTE + 1):
                both.bring(expected.adapter, next_look, next_look + expected.for_s)
                by[expected.by].bring(expected.adapter, next_look, next_look + expected.for_s)
            if int(next_look // BUCKET_S) != bucket:
                bucket = int(next_look // BUCKET_S)
                for name in sorted(active[bucket - DAY]):
                    if next_look - last[name] > FLOOR_S:
                        yesterday.bring(name, next_look, next_look + BUCKET_S)
            next_look += MINUTE_S / LOOKS_PER_MINUTE
        idle_s = histories.see(adapter, now)
        for score in everything:
            score.ask(adapter, now, idle_s)
        active[int(now // BUCKET_S)].add(adapter)
        last[adapter] = now
    return {"histories": both, **{f"  only {rule.value}": score for rule, score in by.items()}, "active at this time yesterday": yesterday}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--clients", type=int, default=160)
    parser.add_argument("--days", type=int, default=9, help="three or more")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    trace = fleet(asked.clients, asked.days, asked.seed)
    scores = simulate(trace, TAUGHT_S)
    table = Table(title=f"{asked.clients} adapters, {asked.days} days, {len(trace)} requests")
    for column in ("what is brought", "wake-ups after an hour", "recall", "brought", "precision", "held, hours per day"):
        table.add_column(column, justify="left" if column == "what is brought" else "right")
    for name, score in scores.items():
        held = score.held_s / HOUR_S / (asked.days - TAUGHT_S / DAY_S)
        table.add_row(
            name, str(score.wakes), f"{score.found / score.wakes:.0%}", str(score.brought), f"{score.used / max(1, score.brought):.0%}", f"{held:.0f}"
        )
    console = Console(width=160)
    console.print(table)
    console.print(machine())


if __name__ == "__main__":
    main()
