"""What the whole fleet serves, as one list in vLLM's words. Any engine alone would list only what it happened to be asked for.

A stager is asked for its part when the list is wanted and something has changed there since; one that does not answer counts with what it said last.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..client import Model, Models, StagerClient
from ..core.placement import Pool
from ..errors import LoraExtprocError
from ..flight import SingleFlight

ASK_S = 2.0  # who has not answered by then counts with what it said last
OWNED_BY = "vllm"
CREATED = 0  # seconds since 1970: vLLM says when it was asked, which would make every list another


class Catalog:
    """Base models and adapters of all pools, from what their stagers say."""

    def __init__(self, pools: Sequence[Pool], clients: Mapping[str, StagerClient]) -> None:
        self._pools = pools
        self._clients = clients
        self._said: dict[str, Models] = {}  # by stager
        self._stale: set[str] = set(clients)
        self._body: bytes | None = None
        self._flights: SingleFlight[str, None] = SingleFlight()

    def changed(self, stager: str) -> None:
        """Something came or went there."""
        self._stale.add(stager)

    async def close(self) -> None:
        await self._flights.close()

    async def body(self) -> bytes:
        """The list as `GET /v1/models` answers it; made anew when a stager has said something new."""
        asking = {asyncio.ensure_future(self._flights.join(stager, partial(self._ask, stager))) for stager in self._stale}
        if asking:
            await asyncio.wait(asking, timeout=ASK_S)
            for task in asking:
                task.cancel()
        if self._body is None:
            self._body = await asyncio.to_thread(self._render, dict(self._said))  # of a hundred thousand adapters it has tens of megabytes
        return self._body

    def _render(self, said: Mapping[str, Models]) -> bytes:
        return json.dumps({"object": "list", "data": list(self._cards(said))}).encode()

    async def _ask(self, stager: str) -> None:
        self._stale.discard(stager)  # before it is asked: what changes meanwhile makes it stale again
        try:
            self._said[stager] = await self._clients[stager].models()
            self._body = None
        except LoraExtprocError:
            self._stale.add(stager)

    def _cards(self, all_said: Mapping[str, Models]) -> Iterable[dict[str, Any]]:
        for pool in self._pools:
            said = [all_said[e.stager] for e in pool.table.endpoints if e.stager in all_said]
            told = {base.id: base for models in reversed(said) for base in models.bases}
            names = sorted(pool.base_models)
            for name in names:
                base = told.get(name, Model(name, name))
                yield self._card(name, base.root, None, base.max_model_len or None)
            adapters = {model.id: model.root for models in reversed(said) for model in models.adapters if self._pool_of(model.id) is pool}
            parent = next(iter(names), None)
            for name in sorted(adapters):
                yield self._card(name, adapters[name], parent, None)

    def _pool_of(self, adapter: str) -> Pool | None:
        return next((pool for pool in self._pools if pool.serves(adapter)), None)

    def _card(self, name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": CREATED, "owned_by": OWNED_BY}
        return {**card, "root": root, "parent": parent, "max_model_len": max_model_len, "permission": []}
