"""Limits on what is held, and what is held when they bite."""

import asyncio

import pytest

from extproc.errors import Overloaded
from extproc.metrics import RouterMetrics
from extproc.pb import ext_proc_pb2 as pb
from extproc.router.holding import Holding

from .fakes import Gateway, Router, body, chat, headers
from .test_processor import serve, until


def test_each_limit_names_itself() -> None:
    """All places, and the places of one adapter."""
    holding = Holding(RouterMetrics(), max_waiting=2, max_waiting_per_adapter=1, max_bytes=10)
    with holding.waiting("a"):
        with pytest.raises(Overloaded, match="1 requests wait for a; the limit is 1"), holding.waiting("a"):
            pass
        with holding.waiting("b"), pytest.raises(Overloaded, match="2 requests wait for adapters"), holding.waiting("c"):
            pass
    with holding.waiting("a"):
        pass


def test_bytes_that_go_down_are_never_too_many() -> None:
    """Only what adds to them is refused."""
    holding = Holding(RouterMetrics(), max_waiting=1, max_waiting_per_adapter=1, max_bytes=10)
    assert holding.change_bytes(10)
    assert not holding.change_bytes(5)
    assert holding.change_bytes(-1)


async def test_one_more_than_may_wait_is_429_and_the_others_are_served() -> None:
    """With Retry-After; other adapters still have places."""
    router = Router()
    stager = router.stager_of(router.owner("demo/sql"))
    stager.gate.clear()
    held = [Gateway(router, chat("demo/sql")) for _ in range(3)]
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 3)
    refused = await serve(router, chat("demo/sql"))
    assert (refused.immediate().status.code, refused.immediate().details) == (429, "overloaded")
    assert any(option.header.key == "retry-after" for option in refused.immediate().headers.set_headers)
    stager.gate.set()
    for stream in held:
        await stream.end()
        assert stream.destination()
    assert router.metrics.registry.get_sample_value("lora_extproc_held_requests") == 0


async def test_bodies_that_take_too_much_together_are_429() -> None:
    """The one that goes over the cap; what the others hold stays, and is given back when they end."""
    router = Router(max_body_bytes=1000)
    held = [Gateway(router, [headers(), body(b" " * 900, end=False)]) for _ in range(4)]
    refused = Gateway(router, [headers(), body(b" " * 900, end=False)])
    assert refused.immediate().details == "overloaded"
    value = router.metrics.registry.get_sample_value
    assert value("lora_extproc_held_bytes") == 3600
    for stream in held:
        stream.conversation.abandon()
    assert value("lora_extproc_held_bytes") == 0
    refused.conversation.half_close()


async def test_a_clients_own_timeout_ends_its_wait() -> None:
    """Others go on waiting."""
    router = Router()
    router.stager_of(router.owner("demo/sql")).gate.clear()
    patient = Gateway(router, chat("demo/sql"))
    hasty = await serve(router, [headers({"x-request-timeout": "10ms"}), body(b'{"model":"demo/sql"}')])
    assert hasty.immediate().details == "staging"
    assert patient.written == []
    router.stager_of(router.owner("demo/sql")).gate.set()
    await patient.end()
    assert patient.destination()


async def test_a_timeout_that_is_none_is_400() -> None:
    """Rather than a wait of another length than was asked for."""
    stream = await serve(Router(), [headers({"x-request-timeout": "soon"}), body(b'{"model":"demo/sql"}')])
    assert stream.immediate().details == "invalid_request"


async def test_what_waits_is_given_back_when_the_client_goes() -> None:
    """Place and bytes."""
    router = Router()
    router.stager_of(router.owner("demo/sql")).gate.clear()
    stream = Gateway(router, chat("demo/sql"))
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 1)
    stream.conversation.abandon()
    for _ in range(5):
        await asyncio.sleep(0)
    value = router.metrics.registry.get_sample_value
    assert (value("lora_extproc_held_requests"), value("lora_extproc_held_bytes")) == (0, 0)
    router.stager_of(router.owner("demo/sql")).gate.set()


async def test_the_endpoint_that_served_is_noted() -> None:
    """The gateway tells it with the response."""
    router = Router()
    stream = Gateway(router, chat("demo/sql"))
    await until(lambda: stream.written)
    for served in (router.owner("demo/sql").address, "10.9.9.9:8000"):
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
        message.metadata_context.filter_metadata["envoy.lb"].fields["x-gateway-destination-endpoint-served"].string_value = served
        stream.show(message)
    value = router.metrics.registry.get_sample_value
    assert [value("lora_extproc_served_total", {"first": first}) for first in ("true", "false")] == [1, 1]
    await stream.end()
