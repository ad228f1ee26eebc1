"""List, then watch: the objects of one kind as they are, and every change of them, for as long as it is listened to.

| what happens | what follows |
| --- | --- |
| the watch ends, is cut, or says nothing for longer than it may last | it is resumed after the last version that it showed; a bookmark is one, too |
| 410 Gone, as the answer or as an ERROR of the watch: the version is no longer known | a new list; what is missing in it was deleted meanwhile |
| another ERROR, or a watch that cannot be begun: the API server may be another one, with other data | that is said; a new list after a pause |
| a list fails | that is said; again after a pause |
| the pages of a list grow too old (410 for `continue`) | that list is begun again |

A list counts once the watch after it has begun, so that a role that may list and not watch is told of and shows nothing that would grow old. Pauses
double up to MAX_PAUSE_S and are jittered: routers that lost the API server together must not come back together.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Generic

import msgspec

from ..errors import shortened
from .api import Api, Event, read_event, version_of
from .failures import Gone, KubernetesFailed, NotFound
from .objects import Kind, T

log = logging.getLogger(__name__)

PAGE_OBJECTS = 500  # as client-go's; so many pods of 6 KB are decoded in 3 ms, for which the event loop stops
MAX_OBJECTS = 100_000  # a hundred times what this is built for; more is a selector that is wrong
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0  # as client-go's
STEADY_S = 5.0  # a watch that lasted this long, or half as long as it was to last, was a good one: the next is begun at once, the next pause is the first again


@dataclass(frozen=True, slots=True)
class Changes(Generic[T]):
    """What is different from what was yielded before. The first one, however empty, is all there is; one follows each Interrupted, too."""

    put: tuple[T, ...] = ()  # new, or changed
    gone: tuple[str, ...] = ()  # keys of those that are there no more


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The API server cannot be asked, or refuses: what was yielded may be out of date from now on."""

    why: str


@dataclass(frozen=True, slots=True)
class Query:
    """Which objects. An empty selector selects all; an empty namespace is all namespaces."""

    kind: Kind
    namespace: str = ""
    labels: str = ""
    fields: str = ""

    def params(self) -> dict[str, str]:
        return {name: value for name, value in (("labelSelector", self.labels), ("fieldSelector", self.fields)) if value}


class Reflector(Generic[T]):
    """The objects that `query` selects, as Structs of `type_`."""

    def __init__(self, api: Api, query: Query, type_: type[T], watch_s: float) -> None:
        """`watch_s`: about how long a watch lasts, after which it is resumed."""
        self._api = api
        self._query = query
        self._type = type_
        self._decoder = msgspec.json.Decoder(type_)
        self._watch_s = watch_s
        self._versions: dict[str, str] = {}  # of each object as it was yielded last, by key; at most MAX_OBJECTS
        self._pause = _Pause()

    async def changes(self) -> AsyncGenerator[Changes[T] | Interrupted, None]:
        """Ends only when it is closed."""
        while True:
            retry_after_s = 0.0
            try:
                async with contextlib.aclosing(self._follow()) as changes:
                    async for news in changes:
                        yield news
            except Gone as error:
                log.info("%s: %s; the objects are listed anew", self._query.kind.label, error)
            except KubernetesFailed as error:
                retry_after_s = error.retry_after_s
                yield Interrupted(shortened(str(error)))
            await asyncio.sleep(max(retry_after_s, self._pause.next()))

    async def _follow(self) -> AsyncGenerator[Changes[T], None]:
        """One list, and watches that resume each other. Raises KubernetesFailed."""
        now = asyncio.get_running_loop().time
        version, listed = await self._list()
        is_shown = False
        while True:
            seconds = max(1, round(self._watch_s * random.uniform(0.75, 1.25)))  # noqa: S311  # spreads the load of resumed watches
            params = {**self._query.params(), "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
            async with self._api.watch(self._query.kind, self._query.namespace, params, seconds + self._watch_s / 4) as watch:
                began = now()
                if not is_shown:
                    yield self._difference(listed)
                    is_shown, listed = True, {}
                try:
                    async for events in watch:
                        version, news = self._read(events, version)
                        if news.put or news.gone:
                            yield news
                finally:
                    is_steady = now() - began >= min(STEADY_S, seconds / 2)
                    if is_steady:
                        self._pause.reset()
            if not is_steady:
                await asyncio.sleep(self._pause.next())

    async def _list(self) -> tuple[str, dict[str, T]]:
        """All objects by key, and the version that they are of."""
        found: dict[str, T] = {}
        params = {**self._query.params(), "limit": str(PAGE_OBJECTS)}
        while True:
            try:
                page = await self._api.page(self._query.kind, self._query.namespace, params, self._type)
            except NotFound:  # "the server could not find the requested resource", whose name it does not say
                raise KubernetesFailed(f"the API server has no {self._query.kind.label} of version {self._query.kind.version}: their CRD is missing") from None
            found.update((one.key, one) for one in page.items)
            if len(found) > MAX_OBJECTS:
                raise KubernetesFailed(f"there are more than {MAX_OBJECTS} {self._query.kind.label}")
            if not page.metadata.continue_:
                return page.metadata.resource_version, found
            params["continue"] = page.metadata.continue_

    def _difference(self, listed: dict[str, T]) -> Changes[T]:
        """From what was yielded before, which is empty at first."""
        put = tuple(one for key, one in listed.items() if self._versions.get(key) != one.metadata.resource_version)
        gone = tuple(key for key in self._versions if key not in listed)
        self._versions = {key: one.metadata.resource_version for key, one in listed.items()}
        return Changes(put, gone)

    def _read(self, events: list[Event], version: str) -> tuple[str, Changes[T]]:
        """The last version that the events show, and what they change. Of several events of one object the last one counts."""
        news: dict[str, T | None] = {}
        for event in events:
            if event.type == "BOOKMARK":
                version = version_of(event).resource_version
                continue
            one = read_event(event, self._decoder)
            version = one.metadata.resource_version
            news[one.key] = None if event.type == "DELETED" else one
        put = tuple(one for one in news.values() if one is not None)
        gone = tuple(key for key, one in news.items() if one is None and key in self._versions)
        if len(self._versions) - len(gone) + sum(one.key not in self._versions for one in put) > MAX_OBJECTS:
            raise KubernetesFailed(f"there are more than {MAX_OBJECTS} {self._query.kind.label}")
        for key in gone:
            del self._versions[key]
        self._versions.update((one.key, one.metadata.resource_version) for one in put)
        return version, Changes(put, gone)


class _Pause:
    """How long to wait before the next attempt."""

    def __init__(self) -> None:
        self._s = FIRST_PAUSE_S

    def next(self) -> float:
        pause_s, self._s = self._s, min(self._s * 2, MAX_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311

    def reset(self) -> None:
        self._s = FIRST_PAUSE_S
