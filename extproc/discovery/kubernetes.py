"""Endpoints from the Kubernetes API: the pods of an InferencePool or of a label selector, or the EndpointSlices of a Service.

Each is followed by a reflector (kubernetes/reflector.py), an InferencePool by two: one of the pool, and one of the pods that its selector names now. A set
is shown when all of them are current; the source fails while one of them is interrupted. An object is read once, and a set is made in a thread.

The rights that this needs are `list` and `watch` in the one namespace: of pods and inferencepools, of pods alone, or of endpointslices alone.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic

from ..config.discovery import KubernetesSourceSettings
from ..errors import shortened
from ..kubernetes.access import find_access
from ..kubernetes.api import Api
from ..kubernetes.failures import KubernetesFailed
from ..kubernetes.objects import ENDPOINT_SLICES, INFERENCE_POOLS, PODS, T
from ..kubernetes.reflector import Changes, Interrupted, Query, Reflector
from .entries import collect
from .kubernetes_objects import EndpointSlice, Entry, InferencePool, Pod, PodReader, SliceReader, of_pods, of_slices
from .pace import next_change, rest_s
from .source import Failed, Seen, Shown

RETRY_S = 5.0  # after the service account or the kubeconfig could not be read


class KubernetesSource:
    """One InferencePool, Service or selector."""

    is_final = False

    def __init__(self, settings: KubernetesSourceSettings) -> None:
        self.name = settings.label
        self._settings = settings

    async def sets(self) -> AsyncGenerator[Seen, None]:
        """The set as it is, and after each change."""
        while True:
            try:
                access = await asyncio.to_thread(find_access, self._settings.kubeconfig)
            except KubernetesFailed as error:
                yield Failed(shortened(str(error)))
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311
                continue
            async with Api(access, self._settings.timeout_s) as api, contextlib.aclosing(self._follow(api)) as sets:
                async for seen in sets:
                    yield seen

    async def _follow(self, api: Api) -> AsyncGenerator[Seen, None]:
        scope = _Scope(api, self._settings, self._settings.namespace or api.access.namespace)
        place = _Slices(scope) if self._settings.service else _Pool(scope) if self._settings.inference_pool else _Pods(scope, self._settings.selector)
        following = asyncio.create_task(place.follow(), name=self.name)
        try:
            while True:
                await next_change(scope.changed, [following])
                began = time.monotonic()
                seen = await place.seen()
                took_s = time.monotonic() - began
                if seen is not None:
                    yield seen
                await asyncio.sleep(rest_s(took_s))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the parts of one source share."""

    api: Api
    settings: KubernetesSourceSettings
    namespace: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # something has been taken in


@dataclass(slots=True)
class _Kept(Generic[T]):
    object: T
    entries: tuple[Entry, ...] | None = None  # what it says, once it was read


class _View(Generic[T]):
    """The objects of one query as its reflector has shown them, which bounds their number."""

    def __init__(self, scope: _Scope, query: Query, type_: type[T]) -> None:
        self._reflector = Reflector(scope.api, query, type_, scope.settings.watch_s)
        self._changed = scope.changed
        self._kept: dict[str, _Kept[T]] = {}
        self._is_current = False
        self._trouble = ""  # why it is interrupted

    @property
    def is_current(self) -> bool:
        """Whether it has been shown, and is not interrupted."""
        return self._is_current and not self._trouble

    def first(self) -> T | None:
        """Of a query that selects one object by its name."""
        return next((kept.object for kept in self._kept.values()), None)

    async def changes(self) -> AsyncGenerator[None, None]:
        """Take in what the reflector shows; yields after each."""
        async with contextlib.aclosing(self._reflector.changes()) as changes:
            async for news in changes:
                match news:
                    case Interrupted(why):
                        self._trouble = why
                    case Changes(put, gone):
                        self._trouble, self._is_current = "", True
                        for key in gone:
                            self._kept.pop(key, None)
                        self._kept.update((one.key, _Kept(one)) for one in put)
                self._changed.set()
                yield

    async def follow(self) -> None:
        async with contextlib.aclosing(self.changes()) as changes:
            async for _ in changes:
                pass

    def forget_entries(self) -> None:
        """They are to be read in another way from now on."""
        self._kept = {key: _Kept(kept.object) for key, kept in self._kept.items()}

    def trouble(self) -> Failed | None:
        return Failed(self._trouble) if self._trouble else None

    async def seen(self, read: Callable[[T], tuple[Entry, ...]], arrange: Callable[[Iterable[tuple[T, tuple[Entry, ...]]]], list[Entry]]) -> Seen | None:
        """The set, its entries arranged; None before there is one. In a thread: ten thousand pods take it 200 ms."""
        if not self.is_current:
            return self.trouble()
        return await asyncio.to_thread(_collect, list(self._kept.values()), read, arrange)


class _Pods:
    """The pods of one selector."""

    def __init__(self, scope: _Scope, selector: str) -> None:
        self._reader = PodReader(scope.settings.ports, scope.settings.stager_port)
        self._view = _View(scope, Query(PODS, scope.namespace, labels=selector), Pod)

    async def follow(self) -> None:
        await self._view.follow()

    async def seen(self) -> Seen | None:
        return await self._view.seen(self._reader.read, of_pods)

    def have_ports(self, ports: tuple[int, ...]) -> None:
        """An InferencePool says which."""
        if ports != self._reader.ports:
            self._reader = PodReader(ports, self._reader.stager_port)
            self._view.forget_entries()


class _Slices:
    """The EndpointSlices of one Service."""

    def __init__(self, scope: _Scope) -> None:
        self._reader = SliceReader(scope.settings.port_names, scope.settings.stager_port)
        self._view = _View(scope, Query(ENDPOINT_SLICES, scope.namespace, labels=f"kubernetes.io/service-name={scope.settings.service}"), EndpointSlice)

    async def follow(self) -> None:
        await self._view.follow()

    async def seen(self) -> Seen | None:
        return await self._view.seen(self._reader.read, of_slices)


class _Pool:
    """An InferencePool, and the pods of its selector: followed anew when the selector is another."""

    def __init__(self, scope: _Scope) -> None:
        self._scope = scope
        self._view = _View(scope, Query(INFERENCE_POOLS, scope.namespace, fields=f"metadata.name={scope.settings.inference_pool}"), InferencePool)
        self._pods: _Pods | None = None

    async def follow(self) -> None:
        selector = ""
        following: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as group, contextlib.aclosing(self._view.changes()) as changes:
            async for _ in changes:
                pool = self._view.first()
                wanted = pool.selector if pool is not None else ""
                if wanted != selector:
                    selector = wanted
                    if following is not None:
                        following.cancel()
                    self._pods = _Pods(self._scope, selector) if selector else None
                    following = group.create_task(self._pods.follow()) if self._pods is not None else None
                if pool is not None and self._pods is not None:
                    self._pods.have_ports(pool.ports)

    async def seen(self) -> Seen | None:
        if (trouble := self._view.trouble()) is not None:
            return trouble
        if self._pods is not None:
            return await self._pods.seen()
        if not self._view.is_current:
            return None
        return Shown((), note=f"there is no InferencePool {self._scope.settings.inference_pool} in namespace {self._scope.namespace}")


def _collect(kept: list[_Kept[T]], read: Callable[[T], tuple[Entry, ...]], arrange: Callable[[Iterable[tuple[T, tuple[Entry, ...]]]], list[Entry]]) -> Seen:
    pairs: list[tuple[T, tuple[Entry, ...]]] = []
    for one in kept:
        if one.entries is None:
            one.entries = read(one.object)
        pairs.append((one.object, one.entries))
    return collect(arrange(pairs))
