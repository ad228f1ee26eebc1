"""Which requests run and which wait, as vLLM's scheduler decides it.

The first in the queue goes first. Nothing starts beyond `max_num_seqs` requests, or beyond what the KV cache holds. A request of an adapter that would be
one more than `max_loras` is passed over and keeps its place; requests of the base model need no adapter's slot.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

KV_TOKENS = 65_536  # what 24 GB of a GPU hold beside a model of 8 billion parameters, about


@dataclass(slots=True, eq=False)
class _Waiter:
    name: str
    tokens: int
    turn: "asyncio.Future[None]"


class Scheduler:
    """`running` counts requests by adapter; the base model's are under its own name, the empty one."""

    def __init__(self, max_loras: int, max_num_seqs: int) -> None:
        self.max_loras = max_loras
        self._max_num_seqs = max_num_seqs
        self.running: Counter[str] = Counter()
        self.waiting = 0  # requests in the queue, of whatever adapter
        self._tokens = 0
        self._queue: deque[_Waiter] = deque()

    @property
    def adapters(self) -> list[str]:
        """Those of which requests run."""
        return [name for name in self.running if name]

    @property
    def kv_usage(self) -> float:
        """Part of the KV cache that is in use."""
        return min(1.0, self._tokens / KV_TOKENS)

    @asynccontextmanager
    async def turn(self, name: str, tokens: int) -> AsyncIterator[None]:
        """Run a request of `name` ("": the base model) that takes so many tokens, when its turn has come."""
        waiter = _Waiter(name, tokens, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self.waiting += 1
        self._start()
        try:
            await waiter.turn
            yield
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)
                self.waiting -= 1
            else:
                self._end(waiter)

    def _start(self) -> None:
        """Let all run whose turn has come."""
        passed_over: list[_Waiter] = []
        while self._queue and self.running.total() < self._max_num_seqs:
            waiter = self._queue.popleft()
            if waiter.turn.done() or not self._has_slot(waiter.name):  # done: whoever sent it has gone
                passed_over.append(waiter)
            elif self._tokens and self._tokens + waiter.tokens > KV_TOKENS:
                passed_over.append(waiter)
                break
            else:
                self.waiting -= 1
                self.running[waiter.name] += 1
                self._tokens += waiter.tokens
                waiter.turn.set_result(None)
        self._queue.extendleft(reversed(passed_over))

    def _has_slot(self, name: str) -> bool:
        return not name or name in self.running or len(self.adapters) < self.max_loras

    def _end(self, waiter: _Waiter) -> None:
        self.running[waiter.name] -= 1
        if not self.running[waiter.name]:
            del self.running[waiter.name]
        self._tokens -= waiter.tokens
        self._start()
