"""The book of flights: what is on its way and how far, one log line and one set of metrics for each that lands."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from ...core.artifact import AdapterName
from ...errors import LoraExtprocError, OriginFailed
from ..node import Node
from ..supply.job import Job

log = logging.getLogger(__name__)


class Flights:
    """`failed(name, error)` is called for each that ends in one of our errors."""

    def __init__(self, node: Node, failed: Callable[[AdapterName, LoraExtprocError], None]) -> None:
        self._timeout_s = node.settings.fetch_timeout_s
        self._metrics = node.metrics
        self._clock = node.clock
        self._failed = failed
        self._jobs: dict[AdapterName, Job] = {}
        self._awaited: dict[AdapterName, int] = {}  # names whose flight is about to be booked -> the most urgent of those who wait for it

    def get(self, name: AdapterName) -> Job | None:
        """The flight of `name`, if it is on its way."""
        return self._jobs.get(name)

    def hurry(self, name: AdapterName, priority: int) -> None:
        """Somebody waits for the flight of `name`: that on its way, or that which is booked as soon as its task has its turn."""
        if (job := self._jobs.get(name)) is not None:
            job.hurry(priority)
        else:
            self._awaited[name] = min(priority, self._awaited.get(name, priority))

    def landed(self, name: AdapterName) -> None:
        """Nothing of `name` is in flight: whoever hurried what had just landed hurries no later flight."""
        self._awaited.pop(name, None)

    def names(self) -> list[AdapterName]:
        return list(self._jobs)

    @contextlib.asynccontextmanager
    async def book(self, name: AdapterName, priority: int, done: str) -> AsyncIterator[Job]:
        """One flight from here to the end of the block. `done` is what logs and metrics call it when it lands well."""
        job = self._jobs[name] = Job(min(priority, self._awaited.pop(name, priority)))
        began = self._clock()
        result = "cancelled"
        self._metrics.flights.inc()
        try:
            async with asyncio.timeout(self._timeout_s):
                yield job
                result = job.outcome or done
        except TimeoutError:
            result = OriginFailed.reason
            raise OriginFailed(f"{name} did not arrive within {self._timeout_s:g} s") from None
        except LoraExtprocError as error:
            result = error.reason
            log.info("%s: %s: %s (%s)", name, error.reason, error.message, _phases(job) or "no phase")
            self._failed(name, error)
            raise
        finally:
            if self._jobs.get(name) is job:
                del self._jobs[name]
            self._count(job, result, self._clock() - began)
            if result == done:
                took_ms = (self._clock() - began) * 1000
                log.info("%s: %s from %s in %.0f ms, %d bytes (%s)", name, done, job.origin or "this node", took_ms, job.done_bytes, _phases(job))

    def _count(self, job: Job, result: str, took_s: float) -> None:
        origin = job.origin or "none"
        self._metrics.flights.dec()
        self._metrics.stages.labels(origin, result).inc()
        self._metrics.stage_total_seconds.labels(origin, result).observe(took_s)
        for phase, seconds in job.phases.items():
            self._metrics.stage_seconds.labels(phase).observe(seconds)


def _phases(job: Job) -> str:
    """Each phase with its milliseconds."""
    return ", ".join(f"{phase} {seconds * 1000:.0f}" for phase, seconds in job.phases.items())
