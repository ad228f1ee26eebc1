"""One router's metrics out of its workers': counters and histograms are summed, gauges by what metrics.py says of each.

A sum must not fall when a worker dies or hangs: the last that was read of each is kept, and of those that ended their counters. So each worker is read
every few seconds, and what it counts after the last time before its death is lost; a reader of the sums has not seen that either.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from ...metrics import ALIKE, LARGEST

Families = Sequence[Metric]
_CREATED = "_created"  # when a counter began: of several, the first


def parsed(text: bytes) -> Families:
    """The Prometheus text format, as a process writes it."""
    return list(text_string_to_metric_families(text.decode()))


def added_up(several: Iterable[Families], *, counters_only: bool = False) -> Families:
    """One set of families out of those of several processes, in the order in which they come first."""
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Sample]] = {}
    for family in (family for families in several for family in families):
        if counters_only and family.type == "gauge" and not family.name.endswith(_CREATED):
            continue
        whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        samples = values.setdefault(whole.name, {})
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            before = samples.get(key)
            samples[key] = sample if before is None else sample._replace(value=_together(family, before.value, sample.value))
    for family in found.values():
        family.samples = list(values[family.name].values())
    return list(found.values())


def _together(family: Metric, one: float, other: float) -> float:
    if family.name.endswith(_CREATED):
        return min(one, other)
    if family.name in LARGEST:
        return max(one, other)
    return one if family.name in ALIKE else one + other


def rendered(families: Families) -> bytes:
    """In the Prometheus text format."""
    return generate_latest(_Collected(families))


class _Collected:
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Families:
        return self._families


class Sums:
    """What was read of each worker last, by the worker's life, and the counters of those that have ended."""

    def __init__(self) -> None:
        self._last: dict[str, Families] = {}
        self._ended: Families = ()

    def begin(self, life: str) -> None:
        """A worker lives. What is read of one that is not known as living is not kept: its end has been counted."""
        self._last[life] = ()

    def read(self, life: str, families: Families) -> None:
        """The worker says this now. What is the largest since the last scrape stays until `scraped`."""
        before = self._last.get(life)
        if before is not None:
            peaks = [family for family in before if family.name in LARGEST]
            self._last[life] = added_up([families, peaks]) if peaks else families

    def end(self, life: str) -> None:
        """The worker has ended."""
        self._ended = added_up([self._ended, self._last.pop(life, ())], counters_only=True)

    def whole(self) -> list[Families]:
        """What is to be added up for a scrape."""
        return [*self._last.values(), self._ended]

    def scraped(self) -> None:
        """Somebody has been told: from now on the largest is a new one."""
        self._last = {life: [family for family in families if family.name not in LARGEST] for life, families in self._last.items()}
