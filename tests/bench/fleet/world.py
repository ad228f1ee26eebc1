"""A run of the simulated fleet: requests come, popularity shifts, nodes join, drain and die; what a rule makes of it."""

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from extproc.core.copies import Copies
from extproc.core.endpoint import Endpoint
from extproc.core.load import Engine
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import Stager, Standing
from extproc.stager.engine.meter import BUSY_S, Reading

from .node import CONCURRENT, Clock, Node, Request
from .router import Router, Way

SERVICE_S, SIGMA = 4.0, 1.0  # mean time that a request is computed for; of its logarithm
SHIFT_S = 60.0  # between two shifts of popularity
SHIFTED = 10  # one in so many adapters changes places with another
SAMPLE_S = 0.5
DEMAND_S = 5.0  # between two words of how many adapters are in demand
WAIT_S = 0.05  # more than a call to a stager takes
AFTER_S = 60.0  # a move is to blame for the first wait of each adapter that it concerned, so long


@dataclass(frozen=True)
class Case:
    """What is simulated. Times in seconds."""

    nodes: int = 32
    adapters: int = 2000
    zipf: float = 1.0
    load: float = 0.6
    slots: int = 16
    routers: int = 1
    shifts: bool = False
    moves: bool = False  # a join, a drain and a death
    is_exact: bool = False  # load is known at once
    warm_up_s: float = 150.0
    seconds: float = 450.0
    seed: int = 1


@dataclass
class Figures:
    """What came of it."""

    requests: int = 0
    loads: float = 0.0  # into an engine, per request
    fetches: float = 0.0
    prepared: float = 0.0
    imbalance: float = 0.0  # in flight, max/mean, p99 of the samples
    imbalance_p50: float = 0.0
    queued_p99_s: float = 0.0
    queued: float = 0.0  # part of the requests
    waited: float = 0.0  # part of the requests that waited for a fetch or a load
    drain_waits: int = 0  # requests for what a draining node had that were held, although some engine had it in memory, as its stager told
    death_waits: int = 0  # the same of a node that died
    misread: int = 0  # those of both that were not held, and found that the engine they were sent to had it only on its disk
    orphan_waits: int = 0  # and those for what no other engine had in memory


@dataclass
class _Move:
    """A node goes, and what it had in memory."""

    node: Node
    adapters: set[str]  # that were not asked for since
    until: float
    blames: Callable[[Request], None]


class World:
    """One run."""

    def __init__(self, case: Case, way: Callable[[], Way]) -> None:
        self.case = case
        self.clock = Clock()
        self._random = random.Random(case.seed)
        self._copies = Copies()
        self._nodes: dict[str, Node] = {}
        for index in range(case.nodes):
            self._add_node(index)
        pool = Pool("p", frozenset(), ("*",), LookupTable(node.endpoint for node in self._nodes.values()))
        self._routers = [Router(f"router-{number}", self._nodes, self._copies, pool, way(), self.clock) for number in range(case.routers)]
        self._weights = list(accumulate((rank + 1) ** -case.zipf for rank in range(case.adapters)))
        self._names = [f"a{number}" for number in range(case.adapters)]
        self._random.shuffle(self._names)
        self._mu = math.log(SERVICE_S) - SIGMA**2 / 2
        self._rate = case.nodes * CONCURRENT * case.load / SERVICE_S
        self._figures = Figures()
        self._came = 0
        self._queued: list[float] = []
        self._ratios: list[float] = []
        self._moves: list[_Move] = []

    def run(self) -> Figures:
        case, clock, figures = self.case, self.clock, self._figures
        clock.after(0.0, self._arrive)
        clock.after(0.0, self._tell_demand)
        if case.shifts:
            clock.after(SHIFT_S, self._shift)
        clock.run(case.warm_up_s)
        loads, fetches = self._loads()
        prepared = sum(router.prepared for router in self._routers)
        clock.after(0.0, self._sample)
        if case.moves:
            for part, move in ((0.1, self._join), (0.4, self._drain), (0.7, self._death)):
                clock.after(part * case.seconds, move)
        clock.run(case.warm_up_s + case.seconds)
        loads_after, fetches_after = self._loads()
        count = figures.requests = self._came
        figures.loads, figures.fetches = (loads_after - loads) / count, (fetches_after - fetches) / count
        figures.prepared = (sum(router.prepared for router in self._routers) - prepared) / count
        figures.imbalance, figures.imbalance_p50 = _percentile(self._ratios, 0.99), _percentile(self._ratios, 0.5)
        figures.queued_p99_s = _percentile(self._queued, 0.99)
        figures.queued = sum(queued > 0 for queued in self._queued) / max(1, len(self._queued))
        figures.waited /= count
        return figures

    def _loads(self) -> tuple[int, int]:
        return sum(node.loads for node in self._nodes.values()), sum(node.fetches for node in self._nodes.values())

    def _add_node(self, index: int) -> Node:
        address = f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"
        endpoint = Endpoint(f"{address}:8000", node=f"node-{index}", stager=f"{address}:9102")
        case = self.case
        node = Node(
            endpoint,
            case.slots,
            self.clock,
            told=self._told,
            moved=self._moved,
            started=self._started,
            is_exact=case.is_exact,
            routers=case.routers,
            has_peer=lambda adapter: bool(self._copies.of(adapter)),
        )
        self._nodes[endpoint.stager] = node
        self.clock.after(self._random.random() * BUSY_S, node.poll)
        return node

    # -- what nodes say

    def _told(self, node: Node, engine: Engine, reading: Reading) -> None:
        for router in self._routers:
            router.loads.say(node.endpoint.address, replace(engine, others_held=reading.held_by_others(router.name)), reading.at)

    def _moved(self, node: Node, adapter: str, is_warm: bool) -> None:
        self._copies.put(node.endpoint.stager, adapter, warm=is_warm)

    def _tell_demand(self) -> None:
        for node in self._nodes.values():
            for router in self._routers:
                router.loads.demand(node.endpoint.address, node.demand(), self.case.slots)
        self.clock.after(DEMAND_S, self._tell_demand)

    # -- requests

    def _arrive(self) -> None:
        draw, now = self._random, self.clock.now
        adapter = self._names[bisect_left(self._weights, draw.random() * self._weights[-1])]
        request = Request(adapter, draw.lognormvariate(self._mu, SIGMA), now, is_counted=now >= self.case.warm_up_s)
        self._came += request.is_counted
        going = [move.node for move in self._moves if adapter in move.adapters]
        if going:
            standing = self._routers[0].snapshot.standing
            told = [self._nodes[stager] for stager, is_warm in self._copies.of(adapter) if is_warm]
            there = [node for node in told if node.memory.get(adapter, now + 1) <= now]
            request.was_there = any(node.is_alive and (node in going or standing(node.endpoint) is Standing.READY) for node in there)
        self._routers[draw.randrange(len(self._routers))].take(request)
        self.clock.after(draw.expovariate(self._rate), self._arrive)

    def _started(self, request: Request) -> None:
        if not request.is_counted:
            return
        waits = request.held_s + request.loading_s > WAIT_S
        self._queued.append(request.queued_s)
        self._figures.waited += waits
        for move in self._moves:
            if request.adapter in move.adapters:
                move.adapters.discard(request.adapter)
                if waits and self.clock.now < move.until:
                    move.blames(request)

    def _shift(self) -> None:
        names, draw = self._names, self._random
        for _ in range(len(names) // SHIFTED):
            one, other = draw.randrange(len(names)), draw.randrange(len(names))
            names[one], names[other] = names[other], names[one]
        self.clock.after(SHIFT_S, self._shift)

    def _sample(self) -> None:
        standing = self._routers[0].snapshot.standing
        counts = [node.in_flight for node in self._nodes.values() if standing(node.endpoint) is Standing.READY]
        self._ratios.append(max(counts) * len(counts) / (sum(counts) or 1))
        self.clock.after(SAMPLE_S, self._sample)

    # -- how the fleet moves

    def _join(self) -> None:
        came = self._add_node(len(self._nodes))
        pool = Pool("p", frozenset(), ("*",), LookupTable(node.endpoint for node in self._nodes.values()))
        for router in self._routers:
            router.follow(pool, came.endpoint)

    def _drain(self) -> None:
        node = self._node(0)

        def blame(request: Request) -> None:
            self._figures.drain_waits += request.was_there and request.held_s > WAIT_S
            self._figures.misread += request.was_there and request.held_s <= WAIT_S

        self._moves.append(_Move(node, set(node.memory), self.clock.now + AFTER_S, blame))
        for router in self._routers:
            router.observe(node.endpoint, stager=Stager.DRAINING)
            router.leave(node.endpoint)

    def _death(self) -> None:
        node = self._node(1)

        def blame(request: Request) -> None:
            self._figures.death_waits += request.was_there and request.held_s > WAIT_S
            self._figures.misread += request.was_there and request.held_s <= WAIT_S
            self._figures.orphan_waits += not request.was_there

        self._moves.append(_Move(node, set(node.memory), self.clock.now + AFTER_S, blame))
        waiting = node.die()
        self._copies.forget(node.endpoint.stager)
        for router in self._routers:
            router.observe(node.endpoint, stager=Stager.LOST, engine_answers=False)
        for then in waiting:
            then(False)

    def _node(self, index: int) -> Node:
        return list(self._nodes.values())[index]


def _percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
