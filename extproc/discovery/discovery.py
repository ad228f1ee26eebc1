"""Runs the sources of all pools, and hands whole fleets on: one at a time, the newest only, and no more often than the debounce allows.

Nothing here ends because a source does. What a source says goes through its `Belief`; what is believed is merged in a thread, and handed on if it differs
from the last fleet. With a directory, the last good sets are on disk within SAVE_EVERY_S, and a start uses them at once for each source that has not
answered: a router that starts while etcd is down serves what it served before.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from ..config.discovery import DiscoverySettings
from ..core.fleet import Fleet
from ..metrics import DiscoveryMetrics
from .belief import Belief, Keep, State
from .kept import Damaged, Kept, load, save
from .merge import Merged, Sets, is_same, merge
from .source import Failed, Seen, Shown, Source
from .told import Told

log = logging.getLogger(__name__)

Apply = Callable[[Fleet], Awaitable[None]]

AGAIN_S = 5.0  # after an error of our own, in a source or in what takes the fleet: an error that repeats fills no log
SAVE_EVERY_S = 5.0  # so that a fleet that changes all the time is a small write now and then
REFRESH_S = 600.0  # the age of a set that has not changed is this exact on disk; the day that it is kept for by default is long beside it


class Discovery:
    """The fleet as its sources show it. `first`, then `follow`; `stop` at the end, however far it came."""

    def __init__(self, sources: Mapping[str, Sequence[Source]], settings: DiscoverySettings, metrics: DiscoveryMetrics) -> None:
        """`sources` by pool, in the settings' order, as `build_sources` gives them."""
        self._settings = settings
        self._directory = Path(settings.dir) if settings.dir else None
        self._answered = asyncio.Event()  # every source has said something, or something is kept of it
        self._changed = asyncio.Event()
        self._changed_at = 0.0
        self._unsaved = asyncio.Event()
        self._save_fails = False
        self._fleet: Fleet = {}  # what was handed on last
        self._told = Told("discovery")
        self._tasks: list[asyncio.Task[None]] = []
        keep = Keep(settings.keep_failed_s, settings.keep_empty_s)
        self._pools = {pool: tuple(_Followed(pool, source, keep, metrics, self._mark) for source in several) for pool, several in sources.items()}
        self._followed = tuple(followed for several in self._pools.values() for followed in several)

    async def first(self, timeout_s: float | None = None) -> Fleet:
        """Begin to follow all sources, and return the fleet once each has said something or is on disk; at the latest after `timeout_s`, by default
        `discovery.first_wait_s`."""
        if self._directory is not None:
            await self._restore(self._directory)
        self._tasks += [asyncio.create_task(followed.follow(), name=f"discovery {followed.who}") for followed in self._followed]
        self._mark()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.first_wait_s if timeout_s is None else timeout_s):
                await self._answered.wait()
        for followed in self._followed:
            if followed.is_awaited:
                log.warning("%s has not answered yet; its endpoints are missing until it does", followed.who)
        self._changed.clear()
        merged = await asyncio.to_thread(merge, self._sets())
        self._told.tell(merged.complaints)
        self._fleet = merged.fleet
        return self._fleet

    def follow(self, apply: Apply) -> None:
        """From now on await `apply` with each fleet that differs from the one before, which for the first is that of `first`."""
        self._tasks.append(asyncio.create_task(self._hand_on(apply), name="discovery"))
        if self._directory is not None:
            self._tasks.append(asyncio.create_task(self._keep(self._directory), name="discovery on disk"))

    async def stop(self) -> None:
        """Follow nothing more. The last good sets are on disk when this returns."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for followed in self._followed:
            followed.close()
        if self._directory is not None and self._unsaved.is_set():
            await self._save(self._directory)

    # -- handing on

    def _mark(self) -> None:
        """Something else is believed of a source."""
        self._changed_at = asyncio.get_running_loop().time()
        self._changed.set()
        self._unsaved.set()
        if not any(followed.is_awaited for followed in self._followed):
            self._answered.set()

    async def _hand_on(self, apply: Apply) -> None:
        while True:
            await self._changed.wait()
            await self._settle()
            self._changed.clear()
            try:
                merged, is_news = await asyncio.to_thread(_news, self._sets(), self._fleet)
                self._told.tell(merged.complaints)
                if is_news:
                    await apply(merged.fleet)
                    self._fleet = merged.fleet
            except Exception:
                log.exception("a fleet could not be taken over; the newest is tried again in %g s", AGAIN_S)
                await asyncio.sleep(AGAIN_S)
                self._changed.set()

    async def _settle(self) -> None:
        """Wait until nothing has changed for `debounce_s`, at most `debounce_max_s`."""
        now = asyncio.get_running_loop().time
        latest = now() + self._settings.debounce_max_s
        while True:
            wait_s = min(self._changed_at + self._settings.debounce_s, latest) - now()
            if wait_s <= 0:
                return
            await asyncio.sleep(wait_s)

    def _sets(self) -> Sets:
        return {pool: [(f.source.name, f.belief.endpoints) for f in several] for pool, several in self._pools.items()}

    # -- on disk

    async def _restore(self, directory: Path) -> None:
        try:
            kept = {(k.pool, k.source): k for k in await asyncio.to_thread(load, directory)}
        except (Damaged, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            log.warning("the endpoints kept in %s cannot be used: %s; the sources alone count", directory, why)
            return
        for followed in self._followed:
            one = kept.get((followed.pool, followed.source.name))
            if one is not None:
                followed.restore(one)

    async def _keep(self, directory: Path) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._unsaved.wait()
            await self._save(directory)
            await asyncio.sleep(SAVE_EVERY_S)

    async def _save(self, directory: Path) -> None:
        self._unsaved.clear()
        sets = [f.kept() for f in self._followed if f.belief.endpoints and not f.source.is_final]
        try:
            await _write(directory, sets)
        except OSError as error:
            self._unsaved.set()
            if not self._save_fails:
                log.warning("discovery.dir: %s cannot be written: %s; a restart has the endpoints of the last write", directory, error.strerror)
            self._save_fails = True
        else:
            self._save_fails = False


class _Followed:
    """One source, what is believed of it, and the log lines and metrics that follow from a change."""

    def __init__(self, pool: str, source: Source, keep: Keep, metrics: DiscoveryMetrics, mark: Callable[[], None]) -> None:
        self.pool = pool
        self.source = source
        self.who = f"pool {pool}: {source.name}"
        self.belief = Belief(Keep(0, 0) if source.is_final else keep)
        self._good_at = 0.0  # when it was current last, in seconds since 1970; while it is current, that is now
        self._told = Told(self.who)
        self._mark = mark
        self._timer: asyncio.TimerHandle | None = None
        self._endpoints = metrics.endpoints.labels(pool, source.name)
        self._stale = metrics.stale.labels(pool, source.name)
        self._failures = metrics.failures.labels(pool, source.name)
        self._left_out = metrics.left_out.labels(pool, source.name)
        self._stale.set(1)

    @property
    def is_awaited(self) -> bool:
        """Whether nothing at all is known of it."""
        return self.belief.state is State.WAITING and not self.belief.endpoints

    async def follow(self) -> None:
        """Take what the source says, for good."""
        while True:
            try:
                async with contextlib.aclosing(self.source.sets()) as sets:
                    async for seen in sets:
                        self._take(seen)
            except Exception:
                log.exception("%s met an error of this program's own; it is followed anew in %g s", self.who, AGAIN_S)
            self._take(Failed("is not followed at the moment"))
            await asyncio.sleep(AGAIN_S)

    def restore(self, kept: Kept) -> None:
        """Begin with what an earlier process knew. What is too old by now counts no more."""
        now = asyncio.get_running_loop().time()
        self._good_at = kept.at
        restored = Belief(self.belief.keep, State.WAITING, kept.endpoints, now - (time.time() - kept.at))
        if restored.at(now).endpoints:
            self._become(restored)
            log.info("%s had %d endpoints when it was read last; they count until it answers", self.who, len(kept.endpoints))

    def kept(self) -> Kept:
        """What a later process may begin with."""
        at = time.time() if self.belief.state is State.CURRENT else self._good_at
        return Kept(self.pool, self.source.name, at, self.belief.endpoints)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _take(self, seen: Seen) -> None:
        now = asyncio.get_running_loop().time()
        match seen:
            case Shown(endpoints):
                self._left_out.set(seen.left_out_count)
                self._told.tell(seen.left_out)
                self._become(self.belief.shown(endpoints, now), seen.note)
            case Failed(why):
                self._become(self.belief.failed(now), why)

    def _expire(self) -> None:
        self._become(self.belief.at(asyncio.get_running_loop().time()))

    def _become(self, belief: Belief, why: str = "") -> None:
        before, self.belief = self.belief, belief
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if belief.until is None else asyncio.get_running_loop().call_at(belief.until, self._expire)
        if before.state is State.CURRENT and belief.state is not State.CURRENT:
            self._good_at = time.time()
        if belief.state is not before.state:
            self._tell(before, why)
        self._endpoints.set(len(belief.endpoints))
        self._stale.set(belief.state is not State.CURRENT)
        if belief.state is not before.state or belief.endpoints is not before.endpoints:
            self._mark()

    def _tell(self, before: Belief, why: str) -> None:
        state, keep, count = self.belief.state, self.belief.keep, len(self.belief.endpoints)
        because = f": {why}" if why else ""
        last = f"its last {count} endpoints count for at most {keep.failed_s if state is State.FAILING else keep.empty_s:g} s"
        if state in {State.FAILING, State.LOST} and before.state is not State.FAILING:
            self._failures.inc()
        match state:
            case State.FAILING:
                log.warning("%s fails%s; %s", self.who, because, last if count else "no endpoint of it is known")
            case State.EMPTIED:
                log.warning("%s shows no endpoints%s; %s, then it is believed", self.who, because, last)
            case State.LOST:
                log.error("%s fails%s, for over %g s now; its endpoints count no more", self.who, because, keep.failed_s)
            case State.CURRENT if not count and not self.source.is_final:
                log.warning("%s has no endpoints%s", self.who, because)
            case State.CURRENT if before.state is not State.WAITING:
                log.info("%s is current again, with %d endpoints", self.who, count)
            case _:
                pass


async def _write(directory: Path, sets: list[Kept]) -> None:
    """Save. Who is cancelled meanwhile waits for the end: a thread cannot be stopped, and the next write would meet this one in the same file."""
    writing = asyncio.create_task(asyncio.to_thread(save, directory, sets))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise


def _news(sets: Sets, before: Fleet) -> tuple[Merged, bool]:
    """The fleet, and whether it says anything else than the one before."""
    merged = merge(sets)
    return merged, not is_same(merged.fleet, before)
