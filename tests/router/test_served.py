"""Who really served: what a gateway says of it with the response, and what comes of that."""

import pytest

from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import Standing
from extproc.pb import ext_proc_pb2 as pb
from tests.fakes.wait import until

from .fakes import Gateway, Router, chat, serve

ELSEWHERE = "10.9.9.9:8000"


def answer(served: str, status: int) -> pb.ProcessingRequest:
    """Response headers with the address that they came from, as Envoy's attribute has it."""
    message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    message.response_headers.headers.headers.add(key=":status", raw_value=str(status).encode())
    message.attributes["envoy.filters.http.ext_proc"].fields["upstream.address"].string_value = served
    return message


def standing(router: Router, endpoint: Endpoint) -> Standing:
    return router.membership.snapshot.standing(endpoint)


async def sent(router: Router, model: str) -> Gateway:
    """A request on its way to an engine."""
    stream = Gateway(router, chat(model))
    await until(lambda: stream.written)
    return stream


async def test_the_endpoint_that_served_is_counted() -> None:
    """By whether it was the first of the list."""
    router = Router()
    for served in (router.owner("demo/sql").address, ELSEWHERE):
        stream = await sent(router, "demo/sql")
        stream.show(answer(served, 200))
        await stream.end()
    assert [router.value("lora_extproc_served_total", first=first) for first in ("true", "false")] == [1, 1]


async def test_an_answer_from_off_the_list_becomes_503_and_the_next_request_goes_elsewhere() -> None:
    """Never another endpoint's 404; what is repeated at once is not sent again to those that could not be reached."""
    router = Router()
    stream = await sent(router, "demo/sql")
    first = stream.first_destination()
    stream.show(answer(ELSEWHERE, 404))
    immediate = stream.written[-1].immediate_response
    assert (immediate.status.code, immediate.details) == (503, "no_endpoint")
    assert {option.header.key: option.header.raw_value for option in immediate.headers.set_headers}["retry-after"] == b"1"
    await stream.end()
    assert (await serve(router, chat("demo/sql"))).first_destination() != first
    assert router.count("rejected", "no_endpoint") == 1


async def test_a_base_models_answer_is_let_through_from_anywhere() -> None:
    """Every endpoint has it; those that were passed over are sent nothing all the same."""
    router = Router()
    stream = await sent(router, "base")
    named = stream.destination().split(",")
    stream.show(answer(ELSEWHERE, 200))
    assert stream.written[-1].WhichOneof("response") == "response_headers"
    await stream.end()
    assert {e.address for e in router.pool.table.endpoints if standing(router, e) is Standing.DOWN} == set(named)


@pytest.mark.parametrize(("status", "expected"), [(503, Standing.DOWN), (200, Standing.READY)])
async def test_a_503_is_no_proof_that_an_endpoint_can_be_reached(status: int, expected: Standing) -> None:
    """It may be the gateway's own, with the address that it tried last. Any other answer is the endpoint's."""
    router = Router()
    stream = await sent(router, "demo/sql")
    owner, other = router.owner("demo/sql"), next(e for e in router.pool.table.endpoints if e != router.owner("demo/sql"))
    router.membership.served((owner, other), other.address)
    stream.show(answer(owner.address, status))
    await stream.end()
    router.membership.served((owner, other), other.address)
    assert standing(router, owner) is expected


async def test_an_endpoint_that_the_settings_name_by_its_host_is_not_taken_for_passed_over() -> None:
    """The proxy tells the address that served, and the name may be that."""
    endpoints = [Endpoint(f"engine-{number}:8000", stager=f"10.0.0.{number}:9102") for number in (1, 2)]
    router = Router(2, pools=[Pool("models", frozenset({"base"}), ("*",), LookupTable(endpoints, 251))])
    for _ in range(3):
        stream = await sent(router, "demo/sql")
        stream.show(answer("10.0.0.1:8000", 200))
        await stream.end()
    assert router.membership.snapshot.standings == {}
