"""`python -m tests.bench.fleet`: what the rules of `core/choice.py`, and those that others use, make of a fleet in simulated time.

The core is imported (choice, load, placement, copies, standing, popularity), as are the stager's rule for what it tells and its picture of the engine's memory;
`node.py` models the rest. All rules of a case get the same requests. The machine's speed does not matter, since the clock is simulated.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from extproc.core.choice import Rule

from .router import Way
from .ways import FACTOR, Chwbl, Core, Dynamo, LeastLoaded
from .world import Case, Figures, World

OURS, OWNER, LEAST = "bounded", "owner only", "least loaded"
IMBALANCE = 1.35  # in flight max/mean, p99
LOADS = {1: 1.2, 4: 1.35, 8: 1.35}  # per request, as a multiple of owner only's; by routers
QUEUED_S = 0.05  # p99 in an engine's queue, beyond what the least loaded rule causes with exact load

WAYS: dict[str, Callable[[Case], Way]] = {
    OURS: lambda case: Core(Rule(random.Random(case.seed).randrange, factor=FACTOR)),
    OWNER: lambda case: Core(Rule(random.Random(case.seed).randrange, "maglev")),
    "CHWBL": lambda _: Chwbl(),
    "Dynamo": lambda case: Dynamo(case.slots),
    LEAST: lambda _: LeastLoaded(),
    "random": lambda case: Core(Rule(random.Random(case.seed).randrange, "random")),
}


@dataclass(frozen=True)
class Row:
    """One case with the rules that are compared in it."""

    name: str
    case: Case
    ways: tuple[str, ...] = (OURS, OWNER)
    routers: tuple[int, ...] = (1, 4)  # of ours; others have one


def rows(*, is_large: bool) -> list[Row]:
    """What the table shows."""
    base = Case()
    small = [
        Row("Zipf 1.0", base, tuple(WAYS), (1, 4, 8)),
        Row("Zipf 0.8", replace(base, zipf=0.8), tuple(WAYS)),
        Row("Zipf 1.4", replace(base, zipf=1.4), tuple(WAYS)),
        Row("85 % load", replace(base, load=0.85), tuple(WAYS)),
        Row("shifts", replace(base, shifts=True), tuple(WAYS)),
        Row("8 slots", replace(base, slots=8)),
        Row("64 slots", replace(base, slots=64)),
        Row("moves", replace(base, moves=True)),
        Row("moves, 64 slots", replace(base, moves=True, slots=64)),
        Row("100,000 adapters", replace(base, adapters=100_000)),
    ]
    large = replace(base, nodes=1000, warm_up_s=60.0, seconds=60.0)
    return (
        small
        + [
            Row("1,000 nodes", large),
            Row("1,000 nodes, 100,000 adapters", replace(large, adapters=100_000)),
        ]
        * is_large
    )


def work(rows: Sequence[Row]) -> Iterator[tuple[Row, str, Case]]:
    for row in rows:
        for way in row.ways:
            for routers in row.routers if way == OURS else (1,):
                yield row, way, replace(row.case, routers=routers)


def simulate(case: Case, way: str) -> Figures:
    """In a process of its own."""
    return World(case, lambda: WAYS[way](case)).run()


def typical(runs: Sequence[Figures]) -> Figures:
    """Of runs with several seeds: the median of each figure, and of what must not happen the most."""
    each = [asdict(run) for run in runs]
    return Figures(
        **{name: max(run[name] for run in each) if name in ("drain_waits", "death_waits") else statistics.median(run[name] for run in each) for name in each[0]}
    )


def verdict(row: Row, case: Case, figures: Figures, owner: Figures) -> str:
    """What misses a bound. Where there is a slot for every adapter owner only loads next to nothing, and a multiple of it says nothing."""
    misses = []
    if figures.imbalance > IMBALANCE:
        misses.append("uneven")
    if figures.queued_p99_s > QUEUED_S and case.load < 0.8:
        misses.append("queue")
    if case.adapters > case.nodes * case.slots and figures.loads > LOADS[case.routers] * owner.loads:
        misses.append("loads")
    if figures.drain_waits:
        misses.append("drain")
    if figures.death_waits:
        misses.append("death")
    return ", ".join(misses) or "ok"


def main(*, names: Sequence[str], is_large: bool, only_ours: bool, seconds: float, seeds: Sequence[int], processes: int) -> None:
    console = Console(width=170)
    chosen = [row for row in rows(is_large=is_large) if not names or row.name in names]
    if only_ours:
        chosen = [replace(row, ways=(OURS, OWNER)) for row in chosen]
    if seconds:
        chosen = [replace(row, case=replace(row.case, seconds=seconds, warm_up_s=seconds / 3)) for row in chosen]
    table = Table(
        "case", "rule", "routers", "loads/request", "x owner", "max/mean p99", "p50", "queued p99 s", "queued", "waited", "fetched", "prepared", "verdict"
    )
    with ProcessPoolExecutor(processes) as pool:
        runs = [(row, way, case, [pool.submit(simulate, replace(case, seed=seed), way) for seed in seeds]) for row, way, case in work(chosen)]
        owners = {row.name: run for row, way, _, run in runs if way == OWNER}
        for row, way, case, run in runs:
            f, owner = (typical([each.result() for each in of]) for of in (run, owners[row.name]))
            table.add_row(
                row.name,
                way,
                str(case.routers),
                f"{f.loads:.3f}",
                f"{f.loads / owner.loads:.2f}" if owner.loads else "",  # a fleet with a slot for every adapter
                f"{f.imbalance:.2f}",
                f"{f.imbalance_p50:.2f}",
                f"{f.queued_p99_s:.2f}",
                f"{f.queued:.1%}",
                f"{f.waited:.1%}",
                f"{f.fetches:.3f}",
                f"{f.prepared:.3f}",
                verdict(row, case, f, owner) if way == OURS else "",
            )
            if case.moves and way == OURS:
                console.print(
                    f"{row.name}, {case.routers} routers: held although some engine had it: {f.drain_waits} for the drain, {f.death_waits} for the death; "
                    f"{f.misread:g} read from the disk by an engine that was believed to have it; {f.orphan_waits} waits for what the dead node alone had"
                )
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="their names in the table; all without")
    parser.add_argument("--large", action="store_true", help="also the cases of 1,000 nodes, which take minutes")
    parser.add_argument("--ours", action="store_true", help="only the router's own rule, beside owner only")
    parser.add_argument("--seconds", type=float, default=0.0, help="of simulated time that count; 0: as the case says")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn: names' places in the law, arrivals, service times")
    parser.add_argument("--seeds", type=int, default=1, help="so many from --seed on; the table has the medians")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    main(
        names=arguments.cases,
        is_large=arguments.large,
        only_ours=arguments.ours,
        seconds=arguments.seconds,
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
        processes=arguments.processes,
    )
