"""How long the loop stands still, and for whom."""

import asyncio
import time

import pytest

from extproc.metrics import RouterMetrics
from extproc.router.watchdog import REMEMBERED, Watchdog
from tests.fakes.wait import until


async def test_a_loop_that_stands_still_is_measured_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """With the requests that were handled meanwhile, each once, and a bound on how many and how long."""
    metrics = RouterMetrics()
    watchdog = Watchdog(metrics)
    watchdog.start()
    for number in range(REMEMBERED):
        watchdog.handles(f"old-{number}")
    for request_id in ("r-1", "r-2", "r-2", "", "x" * 1000):
        watchdog.handles(request_id)
    time.sleep(0.15)  # noqa: ASYNC251  # the stall
    await until(lambda: "the event loop stood still" in caplog.text)
    [message] = [record.getMessage() for record in caplog.records if record.name == "extproc.router.watchdog"]
    assert message.endswith(f"r-1, r-2, {'x' * 64}")
    assert "old-4," not in message
    value = metrics.registry.get_sample_value
    assert (value("lora_extproc_loop_stall_seconds_sum") or 0) >= 0.1
    assert (value("lora_extproc_loop_longest_stall_seconds") or 0) >= 0.1
    watchdog.stop()


async def test_the_longest_stall_is_told_once() -> None:
    """Each scrape has its own."""
    metrics = RouterMetrics()
    watchdog = Watchdog(metrics)
    watchdog._worst_s = 0.5
    value = metrics.registry.get_sample_value
    assert [value("lora_extproc_loop_longest_stall_seconds") for _ in range(2)] == [0.5, 0.0]


async def test_a_watchdog_that_is_stopped_ticks_no_more() -> None:
    """Also one that never began."""
    watchdog = Watchdog(RouterMetrics())
    watchdog.stop()
    watchdog.start()
    timer = watchdog._timer
    watchdog.stop()
    assert timer is not None
    assert timer.cancelled()
    await asyncio.sleep(0)
