"""Complaints in the log: each once, and never more than a person would read."""

import pytest

from extproc.discovery.told import AGAIN_S, MAX_TOLD, Told
from tests.fakes.wait import Clock


def test_a_complaint_is_told_once_an_hour(caplog: pytest.LogCaptureFixture) -> None:
    """Also where others come and go between: two entries that take turns to be first are two complaints, not one per set."""
    clock = Clock()
    told = Told("pool p: etcd /p/", clock)
    for _ in range(10):
        told.tell(["a repeats b"])
        told.tell(["b repeats a"])
        told.tell([])
    assert caplog.messages == ["pool p: etcd /p/: a repeats b", "pool p: etcd /p/: b repeats a"]
    clock.now += AGAIN_S
    told.tell(["a repeats b"])
    assert len(caplog.messages) == 3


def test_complaints_without_end_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """The metric goes on counting, and the log says which."""
    clock = Clock()
    told = Told("pool p: etcd /p/", clock)
    for n in range(10 * MAX_TOLD):
        told.tell([f"key {n} is no JSON"])
    assert len(caplog.messages) == MAX_TOLD + 1
    assert "lora_extproc_discovery_left_out" in caplog.messages[-1]
    clock.now += AGAIN_S
    told.tell(["key x is no JSON"])
    assert caplog.messages[-1] == "pool p: etcd /p/: key x is no JSON"
