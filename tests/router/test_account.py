"""What one request costs and is counted as: given back once, counted once."""

import logging

import pytest

from extproc.errors import LoraExtprocError, NoSpace
from extproc.router.account import Account

from .fakes import Router


def account(router: Router, refused: list[LoraExtprocError] | None = None) -> Account:
    return Account(router.admission, router.metrics, None, ([] if refused is None else refused).append)


def test_bytes_are_those_of_the_exchange_and_of_what_the_transport_holds() -> None:
    """And none when it is closed, however often."""
    router = Router()
    one = account(router)
    assert router.value("lora_extproc_streams") == 1
    one.count(100)
    one.transport_holds(50, 100)
    assert (one.held_bytes, router.value("lora_extproc_held_bytes")) == (150, 150)
    one.transport_holds(0, 100)
    assert one.held_bytes == 100
    for _ in range(2):
        one.close(has_begun=True)
    assert (one.held_bytes, router.value("lora_extproc_held_bytes"), router.value("lora_extproc_streams")) == (0, 0, 0)
    assert router.count("abandoned") == 1


def test_a_stream_whose_headers_never_came_is_no_request() -> None:
    """A health check that opens a connection, for one."""
    router = Router()
    account(router).close(has_begun=False)
    assert router.count("abandoned") == 0


def test_an_account_that_is_closed_refuses_nobody() -> None:
    """Whose bytes were over the budget a moment ago."""
    router = Router()
    refused: list[LoraExtprocError] = []
    one = account(router, refused)
    error = NoSpace("full")
    one.refuse(error)
    one.close(has_begun=True)
    one.refuse(error)
    assert refused == [error]


def test_a_body_that_arrives_is_known_until_it_has_arrived_or_its_stream_ends() -> None:
    """Nobody is refused for it afterwards."""
    router = Router()
    router.now = 1000.0
    refused: list[LoraExtprocError] = []
    arrived, closed, arriving = (account(router, refused) for _ in range(3))
    for one in (arrived, closed, arriving):
        one.arrives()
    arrived.settle(0, is_arriving=False)
    closed.close(has_begun=True)
    router.now = 2000.0
    router.admission.refuse_late()
    assert [error.reason for error in refused] == ["body_timeout"]


def test_one_line_per_exchange_without_what_is_empty(caplog: pytest.LogCaptureFixture) -> None:
    """At debug, with the words of the metrics' labels."""
    caplog.set_level(logging.DEBUG, "extproc.router.account")
    router = Router()
    one = account(router)
    one.begin({"x-request-id": "r-1"})
    one.outcome, one.reason = "rejected", "no_space"
    one.close(has_begun=True)
    assert caplog.messages == ["exchange request_id=r-1 outcome=rejected reason=no_space"]
    assert router.count("rejected", "no_space") == 1
