"""What the whole fleet serves, as one list in vLLM's words. Any engine alone would list only what it happened to be asked for.

An adapter is listed if some node has it or, with `servable`, an origin: clients that look first would never ask for it otherwise. One that a node found
invalid is listed only where another node serves it.
A stager is asked for its part when the list is wanted and something has changed there since; one that does not answer counts with what it said last.
A list of a hundred thousand adapters has ten megabytes: it comes in pages, is rendered in slices between which the event loop turns, once for all who
ask, and is kept in pieces that are sent as they are.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from ..client import Model, StagerClient
from ..core.placement import Pool
from ..errors import LoraExtprocError, ModelNotFound
from ..flight import SingleFlight
from .servable import Servable

ASK_S = 2.0  # who has not answered by then counts with what it said last
PAGE = 1000  # adapters of one stager that are read in one turn of the event loop
SLICE = 250  # cards that are rendered in one turn
MAX_PIECE_BYTES = 64 * 1024
LONG_S = 0.1  # asking and rendering that takes longer
REST = 10  # is not done again before so many times that time has passed: at most a tenth of a core goes into lists
REFUSED_S = 30.0  # nobody tells when a stager no longer remembers what it refused: one that did is asked again after so long
OWNED_BY = "vllm"
CREATED = 0  # seconds since 1970: vLLM says when it was asked, which would make every list another

Body = tuple[bytes, ...]


@dataclass(slots=True)
class _Part:
    """What one stager said, never changed afterwards. Adapters are in the order of their names."""

    bases: list[Model] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)  # name -> directory, as its engine would show it
    refused: frozenset[str] = frozenset()  # names that are invalid there
    said: float = field(default_factory=time.monotonic)  # when


class Models:
    """Base models and adapters of all pools, from what their stagers say. With `shows_paths` a card's `root` is where the files are.

    Without `servable` only what some node has is listed.
    """

    def __init__(self, pools: Sequence[Pool], clients: Mapping[str, StagerClient], servable: Servable | None = None, *, shows_paths: bool) -> None:
        self._pools = pools
        self._bases = frozenset(base for pool in pools for base in pool.base_models)
        self._clients = clients
        self._shows_paths = shows_paths
        self._parts: dict[str, _Part] = {}  # by stager
        self._servable = servable
        self._stale: set[str] = set(clients)
        self._said = 1  # how many parts
        self._rendered: tuple[int, Body] = (0, ())  # the version, and the list of it
        self._rests_until = 0.0
        self._flights: SingleFlight[str, None] = SingleFlight()

    def follow(self, pools: Sequence[Pool]) -> None:
        """These are the pools now, with their endpoints."""
        self._pools = pools
        stagers = {endpoint.stager for pool in pools for endpoint in pool.table.endpoints if endpoint.stager}
        self._parts = {stager: part for stager, part in self._parts.items() if stager in stagers}
        self._stale = (self._stale & stagers) | (stagers - self._parts.keys())
        self._said += 1
        if self._servable is not None:
            self._servable.follow(pools)

    def changed(self, stager: str) -> None:
        """Something came or went there."""
        self._stale.add(stager)

    def came(self, stager: str) -> None:
        """It was heard of, as after a start: everything may be different there."""
        self._stale.add(stager)
        if self._servable is not None:
            self._servable.prepare(stager)

    async def close(self) -> None:
        await self._flights.close()
        if self._servable is not None:
            await self._servable.close()

    @property
    def _version(self) -> int:
        """Of what was said; it only grows."""
        return self._said + (self._servable.changes if self._servable is not None else 0)

    async def list(self) -> Body:
        """The list as `GET /v1/models` answers it, in pieces."""
        if self._servable is not None and time.monotonic() >= self._rests_until:
            await asyncio.gather(self._ask_stale(), self._servable.ask(ASK_S))  # the second may wait for an origin's listing, which keeps no core busy
        else:
            await self._ask_stale()
        wanted = self._version
        while self._rendered[0] < wanted:  # a rendering that began before something was said does not show it
            await self._flights.join("", self._render)
        return self._rendered[1]

    async def card(self, name: str) -> Body:
        """One model's card, as `GET /v1/models/{name}` answers it. Raises ModelNotFound, or what the origin fails with that has to be asked."""
        await self._ask_stale()
        for pool in self._pools:
            if name in pool.base_models:
                return (msgspec.json.encode(self._base_card(name, self._parts_of(pool))),)
        owner = self._pool_of(name)
        if owner is None:
            raise ModelNotFound(f"The model `{name}` does not exist: it belongs to no pool")
        parts = self._parts_of(owner)
        root = next((part.adapters[name] for part in parts if name in part.adapters), None)
        if root is None:
            if self._servable is None:
                raise ModelNotFound(f"The model `{name}` does not exist, or no node has it yet")
            refusing = [stager for stager, part in self._parts.items() if name in part.refused]
            if refusing or not self._servable.has(owner, name):
                await self._servable.check(owner, name, refusing)  # of what was refused the origin may have another version now
            root = name
        return (msgspec.json.encode(self._adapter_card(name, root, owner)),)

    # -- what stagers say

    async def _ask_stale(self) -> None:
        """Let the parts be as new as the fleet is. What is not there within ASK_S is in the next list."""
        began = time.monotonic()
        if began < self._rests_until:
            return
        stale = self._stale | {stager for stager, part in self._parts.items() if part.refused and began - part.said >= REFUSED_S}
        asking = {asyncio.ensure_future(self._flights.join(stager, partial(self._ask, stager))) for stager in stale}
        if asking:
            await asyncio.wait(asking, timeout=ASK_S)
            for task in asking:
                task.cancel()
        self._rest(began)

    def _rest(self, began: float) -> None:
        took_s = time.monotonic() - began
        if took_s >= LONG_S:
            self._rests_until = max(self._rests_until, began + (REST + 1) * took_s)

    async def _ask(self, stager: str) -> None:
        self._stale.discard(stager)  # before it is asked: what changes meanwhile makes it stale again
        part, after = _Part(), ""
        client = self._clients.get(stager)
        if client is None:
            return  # it has left
        try:
            while True:
                page = await client.models(after, PAGE)
                part.bases += page.bases
                part.refused |= frozenset(page.refused)
                part.adapters.update((model.id, model.root if self._shows_paths else "") for model in page.adapters)
                if not page.more or not page.adapters:
                    break
                after = page.adapters[-1].id
        except LoraExtprocError:
            self._stale.add(stager)
            return
        self._parts[stager] = part
        self._said += 1

    # -- rendering

    async def _render(self) -> None:
        began, version = time.monotonic(), self._version
        pieces, piece = [], bytearray(b'{"object":"list","data":[')
        cards = self._cards()
        first = True
        while batch := list(itertools.islice(cards, SLICE)):
            text = msgspec.json.encode(batch)
            piece += text[1:-1] if first else b"," + text[1:-1]
            first = False
            if len(piece) >= MAX_PIECE_BYTES:
                pieces.append(bytes(piece))
                piece.clear()
            await asyncio.sleep(0)
        pieces.append(bytes(piece + b"]}"))
        self._rendered = (version, tuple(pieces))
        self._rest(began)

    def _cards(self) -> Iterator[dict[str, Any]]:
        for pool in self._pools:
            parts = self._parts_of(pool)
            for name in sorted(pool.base_models):
                yield self._base_card(name, parts)
            servable = self._servable.names(pool) if self._servable is not None else ()
            refused = frozenset().union(*(part.refused for part in parts))
            last = None
            for name, index in heapq.merge(*(_numbered(names, index) for index, names in enumerate((*(part.adapters for part in parts), servable)))):
                is_staged = index < len(parts)
                if name != last and (is_staged or name not in refused) and name not in self._bases and self._pool_of(name) is pool:
                    yield self._adapter_card(name, parts[index].adapters[name] if is_staged else name, pool)
                last = name

    def _parts_of(self, pool: Pool) -> Sequence[_Part]:
        stagers = dict.fromkeys(e.stager for e in pool.table.endpoints)
        return [self._parts[stager] for stager in stagers if stager in self._parts]

    def _pool_of(self, adapter: str) -> Pool | None:
        return next((pool for pool in self._pools if pool.serves(adapter)), None)

    def _base_card(self, name: str, parts: Sequence[_Part]) -> dict[str, Any]:
        base = next((base for part in parts for base in part.bases if base.id == name), Model(name, name))
        return self._card(name, base.root, None, base.max_model_len or None)

    def _adapter_card(self, name: str, root: str, pool: Pool) -> dict[str, Any]:
        return self._card(name, root, min(pool.base_models, default=None), None)

    def _card(self, name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": CREATED, "owned_by": OWNED_BY}
        return {**card, "root": root if self._shows_paths else name, "parent": parent, "max_model_len": max_model_len, "permission": []}


def _numbered(names: Iterable[str], index: int) -> Iterator[tuple[str, int]]:
    return ((name, index) for name in names)
