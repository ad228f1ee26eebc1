"""`python -m tests.bench.prefix`: what choosing by prefix saves the engines, and what it costs the router.

Conversations of several tenants, each with a system prompt of its own, at eight engines that all serve all tenants. Each engine's KV cache is modelled:
blocks of 16 tokens, least recently used out first, a prompt's last block before its first. Requests are chosen by the router's own code; beside it the
least loaded engine, the tenant's owner, and the best that is possible: one cache for all that forgets nothing. A hit share is the share of prompt tokens that
an engine need not compute. What is not modelled: queues, and decoding that slows down in a full engine.
"""

import argparse
import heapq
import json
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.prefix import Prefixes, of_session
from extproc.core.verdict import judge

from .harness import machine
from .router import best

ENGINES = [Endpoint(f"10.0.0.{i}:8000") for i in range(1, 9)]
TENANTS = 24
TURNS = 8
SYSTEM_BYTES = (1000, 8000)  # of a tenant
BYTES_PER_TOKEN = 4
KV_BLOCK_BYTES = 16 * BYTES_PER_TOKEN  # vLLM's default of 16 tokens
KV_BLOCKS = {"500,000 tokens": 31_250, "128,000 tokens": 8_000}  # what llm-d takes for an 8B model on 80 GB; and a cache too small for its conversations
STARTS_PER_S = 4.0  # conversations; about 32 requests per second, and 25 in flight at each engine
THINK_S = 15.0  # between an answer and the next question, on average
PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 8000.0, 50.0
BALANCE_FACTOR = 1.25  # of the mean in flight, as router.balance_factor
WARM_UP = 0.25  # of the conversations are not counted: caches are empty at the start
MAX_BLOCKS = 1_000_000  # router.prefix_blocks


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation, as the router and as the engine see it."""

    blocks: tuple[int, ...]  # the router's, by the verdict on the body
    prompt: range  # the engine's blocks of the prompt, as far as they are the conversation's own
    prompt_bytes: int
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class Conversation:
    id: int
    tenant: int
    system_blocks: int  # of the engine, shared with all conversations of the tenant
    turns: tuple[Turn, ...]

    def keys(self, blocks: range) -> Iterator[int]:
        """What the engine keeps these blocks under, the last one first, as it gives them up."""
        for block in reversed(blocks):
            yield self.id << 20 | block
        for block in reversed(range(self.system_blocks)):
            yield -(self.tenant << 20 | block) - 1


def conversations(number: int, seed: int) -> list[Conversation]:
    """As clients write them: the body grows by an answer and a question each turn. Tenants have Zipf popularity (exponent 1)."""
    rng = random.Random(seed)
    systems = [text(rng, rng.randint(*SYSTEM_BYTES)) for _ in range(TENANTS)]
    weights = [1 / rank for rank in range(1, TENANTS + 1)]
    made = []
    for identity in range(number):
        [tenant] = rng.choices(range(TENANTS), weights)
        messages = [{"role": "system", "content": systems[tenant]}]
        system_blocks = len(systems[tenant]) // KV_BLOCK_BYTES
        turns = []
        for _ in range(TURNS):
            messages.append({"role": "user", "content": text(rng, rng.randint(100, 1500))})
            size = sum(len(message["content"]) for message in messages)
            reply = text(rng, rng.randint(300, 2000))
            body = json.dumps({"model": f"tenant-{tenant}", "messages": messages, "stream": True}).encode()
            turns.append(Turn(judge(body, with_blocks=True).blocks, range(system_blocks, size // KV_BLOCK_BYTES), size, len(reply)))
            messages.append({"role": "assistant", "content": reply})
        made.append(Conversation(identity, tenant, system_blocks, tuple(turns)))
    return made


def text(rng: random.Random, size: int) -> str:
    return rng.randbytes(size // 2).hex()


# ---- the engines


class KvCache:
    """What one engine can answer from, in blocks."""

    def __init__(self, size: int | None) -> None:
        self._size = size  # None: it forgets nothing
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def serve(self, conversation: Conversation, turn: Turn) -> int:
        """Bytes of the prompt that were there; then the prompt and its answer are."""
        found = 0
        for key in reversed(list(conversation.keys(turn.prompt))):
            if key not in self._blocks:
                break
            found += 1
        for key in conversation.keys(range(turn.prompt.start, (turn.prompt_bytes + turn.reply_bytes) // KV_BLOCK_BYTES)):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while self._size is not None and len(self._blocks) > self._size:
            self._blocks.popitem(last=False)
        return found * KV_BLOCK_BYTES


# ---- who chooses

Choose = Callable[[Conversation, Turn, Sequence[int]], Endpoint]  # by the requests in flight at each engine


def below_bound(in_flight: Sequence[int]) -> list[Endpoint]:
    """The engines that may take one more."""
    bound = BALANCE_FACTOR * (sum(in_flight) + 1) / len(in_flight)
    return [engine for engine, load in zip(ENGINES, in_flight, strict=True) if load + 1 <= bound] or [least(ENGINES, in_flight)]


def least(engines: Sequence[Endpoint], in_flight: Sequence[int]) -> Endpoint:
    return min(engines, key=lambda engine: (in_flight[ENGINES.index(engine)], random.random()))


def by_load(_conversation: Conversation, _turn: Turn, in_flight: Sequence[int]) -> Endpoint:
    return least(ENGINES, in_flight)


def by_owner() -> Choose:
    table = LookupTable(ENGINES, 65_537)
    owners = {tenant: table.owner(f"tenant-{tenant}") or ENGINES[0] for tenant in range(TENANTS)}
    return lambda conversation, _turn, _in_flight: owners[conversation.tenant]


def by_session(conversation: Conversation, _turn: Turn, in_flight: Sequence[int]) -> Endpoint:
    return of_session(f"session-{conversation.id}", below_bound(in_flight))


def by_prefix(routers: int) -> Choose:
    """Each request comes to any of the routers, which know of each other's loads but not of each other's prompts."""
    known = [Prefixes(MAX_BLOCKS) for _ in range(routers)]

    def choose(_conversation: Conversation, turn: Turn, in_flight: Sequence[int]) -> Endpoint:
        prefixes = random.choice(known)
        engine = prefixes.preferred(below_bound(in_flight), turn.blocks) or least(ENGINES, in_flight)
        prefixes.record(engine, turn.blocks)
        return engine

    return choose


@dataclass(slots=True)
class Result:
    hit_share: float
    imbalance: float  # in flight, max/mean at the 99th percentile of arrivals
    to_first_token_ms: float  # the computing of what was not cached, on average


def simulate(work: Sequence[Conversation], choose: Choose, kv_blocks: int | None, seed: int, engines: int = len(ENGINES)) -> Result:
    """Every conversation to its end, in the order of time."""
    rng = random.Random(seed)
    random.seed(seed)
    caches = [KvCache(kv_blocks) for _ in range(engines)]
    in_flight = [0] * len(ENGINES)
    order = count()
    events: list[tuple[float, int, Conversation, int, int]] = []  # when, order, which conversation and turn, where it was answered or -1: it is asked
    at = 0.0
    for conversation in work:
        at += rng.expovariate(STARTS_PER_S)
        events.append((at, next(order), conversation, 0, -1))
    heapq.heapify(events)
    first = work[int(len(work) * WARM_UP)].id
    last_start = at
    cached = whole = computed = requests = 0
    ratios: list[float] = []
    while events:
        now, _, conversation, number, where = heapq.heappop(events)
        if where >= 0:
            in_flight[where] -= 1
            if number + 1 < len(conversation.turns):
                heapq.heappush(events, (now + rng.expovariate(1 / THINK_S), next(order), conversation, number + 1, -1))
            continue
        turn = conversation.turns[number]
        where = ENGINES.index(choose(conversation, turn, in_flight))
        found = caches[where % engines].serve(conversation, turn)
        in_flight[where] += 1
        missing = (turn.prompt_bytes - found) / BYTES_PER_TOKEN
        takes_s = missing / PREFILL_TOKENS_PER_S + turn.reply_bytes / BYTES_PER_TOKEN / DECODE_TOKENS_PER_S
        heapq.heappush(events, (now + takes_s, next(order), conversation, number, where))
        if conversation.id >= first and now <= last_start:
            cached, whole, computed, requests = cached + found, whole + turn.prompt_bytes, computed + int(missing), requests + 1
            ratios.append(max(in_flight) * len(in_flight) / sum(in_flight))
    ratios.sort()
    return Result(cached / whole, ratios[int(0.99 * len(ratios))], computed / requests / PREFILL_TOKENS_PER_S * 1000)


def show_hits(console: Console, number: int, seed: int) -> None:
    work = conversations(number, seed)
    sizes = Counter(len(turn.blocks) for conversation in work for turn in conversation.turns)
    console.print(
        f"{number} conversations of {TURNS} turns, {TENANTS} tenants, prompts of {min(sizes)} to {max(sizes)} blocks; "
        f"{STARTS_PER_S:g} conversations start per second; the first {WARM_UP:.0%} are not counted"
    )
    oracle = simulate(work, by_load, None, seed, engines=1)
    for name, kv_blocks in KV_BLOCKS.items():
        table = Table("chosen by", "hit share", "of the best", "in flight max/mean p99", "prompt ms", title=f"KV cache of {name} per engine")
        ways: dict[str, Choose] = {
            "least in flight": by_load,
            "tenant's owner": by_owner(),
            "prefix, 1 router": by_prefix(1),
            "prefix, 2 routers": by_prefix(2),
            "prefix, 4 routers": by_prefix(4),
            "session header, any number of routers": by_session,
        }
        for way, choose in ways.items():
            result = simulate(work, choose, kv_blocks, seed)
            share = f"{result.hit_share / oracle.hit_share:.2f}"
            table.add_row(way, f"{result.hit_share:.3f}", share, f"{result.imbalance:.2f}", f"{result.to_first_token_ms:.0f}")
        table.add_row("one cache that forgets nothing", f"{oracle.hit_share:.3f}", "1.00", "", f"{oracle.to_first_token_ms:.0f}")
        console.print(table)


# ---- what it costs


def show_costs(console: Console, endpoints: int) -> None:
    rng = random.Random(1)
    table = Table("prompt", "blocks", "verdict us", "with blocks us", "choice of 8 us", "record us", title="what the router does more")
    for size in (200, 4096, 16_384, 65_536, 480 * 1024):
        body = json.dumps({"model": "bench/adapter", "messages": [{"role": "user", "content": text(rng, size)}], "stream": True}).encode()
        blocks = judge(body, with_blocks=True).blocks
        prefixes = Prefixes(MAX_BLOCKS)
        for index, engine in enumerate(ENGINES):
            prefixes.record(engine, [*blocks[: len(blocks) * index // 7], *range(1000)])
        plain, hashed = best(judge, body), best(lambda body: judge(body, with_blocks=True), body)
        looked, recorded = (
            best(work, b"") for work in (lambda _, p=prefixes, b=blocks: p.preferred(ENGINES, b), lambda _, p=prefixes, b=blocks: p.record(ENGINES[0], b))
        )
        table.add_row(f"{size} bytes", str(len(blocks)), f"{plain:.1f}", f"{hashed:.1f}", f"{looked:.2f}", f"{recorded:.2f}")
    console.print(table)
    prefixes, before, longest_s = Prefixes(MAX_BLOCKS), memory_bytes(), 0.0
    for _ in range(2 * MAX_BLOCKS // 48):
        engine, blocks = Endpoint(f"10.1.{rng.randrange(endpoints)}:8000"), tuple(rng.getrandbits(60) for _ in range(48))
        began = time.thread_time()
        prefixes.record(engine, blocks)
        longest_s = max(longest_s, time.thread_time() - began)
    used = memory_bytes() - before
    console.print(
        f"{endpoints} endpoints, filled twice over: {len(prefixes):,} blocks in {used / 2**20:.0f} MiB, {used / len(prefixes):.0f} bytes each; "
        f"the longest record took {longest_s * 1000:.2f} ms"
    )


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(number: int, endpoints: int, seed: int) -> None:
    """Both tables."""
    console = Console(width=140)
    console.print(machine())
    show_hits(console, number, seed)
    show_costs(console, endpoints)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=3000)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.conversations, arguments.endpoints, arguments.seed)
