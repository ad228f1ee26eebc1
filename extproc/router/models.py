"""What the whole fleet serves, as one list in vLLM's words. Any engine alone would list only what it happened to be asked for.

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

ASK_S = 2.0  # who has not answered by then counts with what it said last
PAGE = 1000  # adapters of one stager that are read in one turn of the event loop
SLICE = 250  # cards that are rendered in one turn
MAX_PIECE_BYTES = 64 * 1024
LONG_S = 0.1  # asking and rendering that takes longer
REST = 10  # is not done again before so many times that time has passed: at most a tenth of a core goes into lists
OWNED_BY = "vllm"
CREATED = 0  # seconds since 1970: vLLM says when it was asked, which would make every list another

Body = tuple[bytes, ...]


@dataclass(slots=True)
class _Part:
    """What one stager said, never changed afterwards. Adapters are in the order of their names."""

    bases: list[Model] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)  # name -> directory, as its engine would show it


class Models:
    """Base models and adapters of all pools, from what their stagers say. With `shows_paths` a card's `root` is where the files are."""

    def __init__(self, pools: Sequence[Pool], clients: Mapping[str, StagerClient], *, shows_paths: bool) -> None:
        self._pools = pools
        self._clients = clients
        self._shows_paths = shows_paths
        self._parts: dict[str, _Part] = {}  # by stager
        self._stale: set[str] = set(clients)
        self._version = 1  # of what was said
        self._rendered: tuple[int, Body] = (0, ())  # the version, and the list of it
        self._rests_until = 0.0
        self._flights: SingleFlight[str, None] = SingleFlight()

    def changed(self, stager: str) -> None:
        """Something came or went there."""
        self._stale.add(stager)

    async def close(self) -> None:
        await self._flights.close()

    async def list(self) -> Body:
        """The list as `GET /v1/models` answers it, in pieces."""
        await self._ask_stale()
        wanted = self._version
        while self._rendered[0] < wanted:  # a rendering that began before something was said does not show it
            await self._flights.join("", self._render)
        return self._rendered[1]

    async def card(self, name: str) -> Body:
        """One model's card, as `GET /v1/models/{name}` answers it. Raises ModelNotFound."""
        await self._ask_stale()
        for pool in self._pools:
            parts = self._parts_of(pool)
            if name in pool.base_models:
                return (msgspec.json.encode(self._base_card(name, parts)),)
            if self._pool_of(name) is pool and (root := next((part.adapters[name] for part in parts if name in part.adapters), None)) is not None:
                return (msgspec.json.encode(self._adapter_card(name, root, pool)),)
        raise ModelNotFound(f"The model `{name}` does not exist, or no node has it yet")

    # -- what stagers say

    async def _ask_stale(self) -> None:
        began = time.monotonic()
        if began < self._rests_until:
            return
        asking = {asyncio.ensure_future(self._flights.join(stager, partial(self._ask, stager))) for stager in self._stale}
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
        try:
            while True:
                page = await self._clients[stager].models(after, PAGE)
                part.bases += page.bases
                part.adapters.update((model.id, model.root if self._shows_paths else "") for model in page.adapters)
                if not page.more or not page.adapters:
                    break
                after = page.adapters[-1].id
        except LoraExtprocError:
            self._stale.add(stager)
            return
        self._parts[stager] = part
        self._version += 1

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
            last = None
            for name, index in heapq.merge(*(_numbered(part.adapters, index) for index, part in enumerate(parts))):
                if name != last and self._pool_of(name) is pool:
                    yield self._adapter_card(name, parts[index].adapters[name], pool)
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
