"""Workers' metrics added up: what is summed, what is not, and what stays of a worker that has ended."""

from extproc import __version__
from extproc.metrics import ALIKE, LARGEST, SUMMED, RouterMetrics
from extproc.router.workers.sums import Sums, added_up, parsed, rendered


def told(metrics: RouterMetrics) -> dict[str, float]:
    return values(metrics.render())


def values(text: bytes) -> dict[str, float]:
    """By name and labels, as they are written."""
    return {name: float(value) for line in text.decode().splitlines() if not line.startswith("#") for name, _, value in [line.rpartition(" ")]}


def worker(*, passed: int, held: int, stall_s: float = 0.0) -> RouterMetrics:
    metrics = RouterMetrics()
    for _ in range(passed):
        metrics.answered("pass", "")
    metrics.held.set(held)
    metrics.wait.observe(0.01)
    metrics.share.labels("10.0.0.1:8000").set(0.5)
    metrics.loop_longest_stall.set(stall_s)
    return metrics


PASSED = 'lora_extproc_requests_total{outcome="pass",reason=""}'


def test_every_gauge_says_how_it_adds_up() -> None:
    """One that is new needs a decision: a sum of what each worker says of the same fleet would be wrong."""
    gauges = {family.name for family in RouterMetrics().registry.collect() if family.type in ("gauge", "info")}
    named = SUMMED | LARGEST | ALIKE
    assert {name.replace("lora_extproc_build", "lora_extproc_build_info") for name in gauges} == named
    assert not SUMMED & LARGEST | SUMMED & ALIKE | LARGEST & ALIKE


def test_counters_and_histograms_are_summed_and_gauges_by_their_kind() -> None:
    """Held requests add up, the share of an endpoint does not, and of stalls the longest counts."""
    two = [parsed(metrics.render()) for metrics in (worker(passed=2, held=1, stall_s=0.1), worker(passed=3, held=4, stall_s=0.3))]
    whole = values(rendered(added_up(two)))
    assert whole[PASSED] == 5
    assert whole["lora_extproc_wait_seconds_count"] == 2
    assert whole['lora_extproc_wait_seconds_bucket{le="0.02"}'] == 2
    assert whole["lora_extproc_held_requests"] == 5
    assert whole['lora_extproc_owner_share{endpoint="10.0.0.1:8000"}'] == 0.5
    assert whole["lora_extproc_loop_longest_stall_seconds"] == 0.3
    assert whole[f'lora_extproc_build_info{{version="{__version__}"}}'] == 1


def test_a_counter_began_when_the_first_worker_began_it() -> None:
    """A sum of points in time means nothing."""
    first, second = worker(passed=1, held=0), worker(passed=1, held=0)
    created = PASSED.replace("_total", "_created")
    whole = values(rendered(added_up([parsed(second.render()), parsed(first.render())])))
    assert whole[created] == min(told(first)[created], told(second)[created])


def test_one_worker_is_shown_as_it_shows_itself() -> None:
    """Byte for byte."""
    text = worker(passed=2, held=1).render()
    assert rendered(added_up([parsed(text)])) == text


def test_the_counters_of_a_worker_that_ended_stay() -> None:
    """Its gauges go, since it holds nothing any more; what is read of it late changes nothing."""
    sums = Sums()
    for life, metrics in (("0.1", worker(passed=2, held=1)), ("1.1", worker(passed=3, held=4))):
        sums.begin(life)
        sums.read(life, parsed(metrics.render()))
    sums.end("0.1")
    sums.read("0.1", parsed(worker(passed=9, held=9).render()))
    whole = values(rendered(added_up(sums.whole())))
    assert (whole[PASSED], whole["lora_extproc_held_requests"]) == (5, 4)
    sums.begin("0.2")
    sums.read("0.2", parsed(worker(passed=1, held=0).render()))
    sums.end("0.2")
    assert values(rendered(added_up(sums.whole())))[PASSED] == 6


def test_the_longest_stall_stays_until_somebody_scrapes() -> None:
    """A worker forgets it whenever it is read, also in between."""
    sums = Sums()
    sums.begin("0.1")
    for stall_s in (0.5, 0.0):
        sums.read("0.1", parsed(worker(passed=0, held=0, stall_s=stall_s).render()))
    name = "lora_extproc_loop_longest_stall_seconds"
    assert values(rendered(added_up(sums.whole())))[name] == 0.5
    sums.scraped()
    sums.read("0.1", parsed(worker(passed=0, held=0, stall_s=0.1).render()))
    assert values(rendered(added_up(sums.whole())))[name] == 0.1
