"""Endpoints from the keys below a prefix of etcd: listed once, then watched from the revision of the list on.

A key is one endpoint, which a node writes with a lease and etcd deletes when the lease ends. Where two keys have one address, as the old and the new pod
for the time of a lease, the key that was written last counts.

Three things end a watch, and each leads to a new list: etcd ends it (its history was compacted, the member stops), the member no longer answers, or the
watch has gone deaf. A member that hangs keeps its connections, and a watch whose packets are dropped looks as one where nothing happens. So the member is
asked every `timeout_s` how many keys there are and which was written last: an answer that twice differs from what the watch has brought proves it deaf.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

import msgspec

from ..config.discovery import EtcdSourceSettings
from ..core.fleet import Found
from ..errors import shortened
from .entries import MAX_ENTRIES, BadEntry, collect, read_entry
from .etcd_api import Compacted, Etcd, EtcdFailed, Event, KeyValue
from .pace import SHOW_EVERY_S, next_change, rest_s
from .source import Failed, Seen

log = logging.getLogger(__name__)

RETRY_S = 1.0  # after all members have failed
MAX_VALUE_BYTES = 4096  # five texts of the length that an entry may have


class EtcdSource:
    """One prefix of one cluster."""

    is_final = False

    def __init__(self, settings: EtcdSourceSettings) -> None:
        self.name = settings.label
        self._settings = settings

    async def sets(self) -> AsyncGenerator[Seen, None]:
        """The list, and a set after each change. The next member is asked when one fails; when all have, that is said.

        A member has failed, too, that lists its keys and soon ends the watch: listing would go round and round.
        """
        members = self._settings.endpoints
        turn = failed = 0
        while True:
            member, began = members[turn % len(members)], time.monotonic()
            try:
                async with contextlib.aclosing(self._follow(member)) as sets:
                    async for seen in sets:
                        yield seen
            except Compacted as error:
                log.info("%s: %s; the keys are listed anew", self.name, error)
                await asyncio.sleep(SHOW_EVERY_S)
            except EtcdFailed as error:
                turn += 1
                failed = 1 if time.monotonic() - began >= self._settings.timeout_s else failed + 1
                log.debug("%s: %s", self.name, error)
                if failed >= len(members):
                    yield Failed(shortened(str(error)))
                    await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311  # routers that lost it together must not come back together

    async def _follow(self, member: str) -> AsyncGenerator[Seen, None]:
        """One member, until it fails. Raises EtcdFailed."""
        async with Etcd(self._settings, member) as etcd:
            revision, listed = await etcd.keys()
            book = _Book()
            book.put(listed)
            tasks = [asyncio.create_task(step, name=self.name) for step in (_watch(etcd, revision, book), _check(etcd, self._settings.timeout_s, book))]
            try:
                while True:
                    began = time.monotonic()
                    yield await asyncio.to_thread(book.read, list(book.entries.items()))
                    took_s = time.monotonic() - began
                    await next_change(book.changed, tasks)
                    await asyncio.sleep(rest_s(took_s))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class _Entry:
    mod_revision: int
    value: bytes
    read: Found | BadEntry | None = None  # what the value says, once it was read


@dataclass(slots=True)
class _Book:
    """The keys as the list and the watch have shown them."""

    entries: dict[bytes, _Entry] = field(default_factory=dict)
    changes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, listed: Iterable[KeyValue]) -> None:
        for one in listed:
            self.entries[one.key] = _Entry(one.mod_revision, one.value)

    def take(self, events: list[Event]) -> None:
        """What the watch shows. Raises EtcdFailed for more keys than a set may have."""
        for event in events:
            if event.type == "DELETE":
                self.entries.pop(event.kv.key, None)
            else:
                self.put([event.kv])
        if len(self.entries) > MAX_ENTRIES:
            raise EtcdFailed(f"there are more than {MAX_ENTRIES} keys")
        self.changes += 1
        self.changed.set()

    def latest(self) -> tuple[int, int]:
        """As `Etcd.latest`, of what is known here."""
        return len(self.entries), max((entry.mod_revision for entry in self.entries.values()), default=0)

    @staticmethod
    def read(entries: list[tuple[bytes, _Entry]]) -> Seen:
        """The set, the keys in the order in which they were written. In a thread: each value is read once, a thousand take 10 ms."""
        entries.sort(key=lambda pair: pair[1].mod_revision)
        for _, entry in entries:
            if entry.read is None:
                entry.read = _read_value(entry.value)
        return collect((f"key {key[-80:].decode(errors='replace')!a}", entry.read) for key, entry in entries if entry.read is not None)


async def _watch(etcd: Etcd, revision: int, book: _Book) -> None:
    async with contextlib.aclosing(etcd.watch(revision)) as changes:
        async for events in changes:
            book.take(events)


async def _check(etcd: Etcd, every_s: float, book: _Book) -> None:
    """Raises EtcdFailed for a member that does not answer, or whose watch is deaf."""
    suspected: tuple[tuple[int, int], int] | None = None
    while True:
        await asyncio.sleep(every_s)
        latest = await etcd.latest()
        if latest == book.latest():
            suspected = None
        elif suspected == (latest, book.changes):
            raise EtcdFailed(f"{etcd.member} has changed keys and did not show that on its watch for {every_s:g} s")
        else:
            suspected = (latest, book.changes)


def _read_value(value: bytes) -> Found | BadEntry:
    if len(value) > MAX_VALUE_BYTES:
        return BadEntry(f"has {len(value)} bytes; {MAX_VALUE_BYTES} is the limit")
    try:
        return read_entry(msgspec.json.decode(value))
    except (msgspec.MsgspecError, RecursionError):
        return BadEntry("is no JSON")
    except BadEntry as error:
        return error
