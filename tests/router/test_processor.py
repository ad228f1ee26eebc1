"""One stream from its first message to its last: decisions, waits, cancellations."""

import asyncio
import json
from collections.abc import Sequence

import pytest

from extproc.errors import InvalidAdapter, ModelNotFound, NoSpace, OriginFailed, StagerUnavailable
from extproc.pb import ext_proc_pb2 as pb

from .fakes import Gateway, Router, body, chat, headers


async def serve(router: Router, messages: Sequence[pb.ProcessingRequest]) -> Gateway:
    """A whole stream, to its end."""
    stream = Gateway(router, messages)
    await stream.end()
    return stream


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0)


async def test_a_cold_request_waits_for_the_owner_and_goes_there() -> None:
    """Headers answer with the destination, then the whole body."""
    router = Router()
    stream = await serve(router, chat("demo/sql"))
    assert stream.destination() == router.owner("demo/sql").address
    assert [m.WhichOneof("response") for m in stream.written] == ["request_headers", "request_body"]
    streamed = stream.written[1].request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (b'{"messages":[],"model":"demo/sql"}', True)
    assert router.stager_of(router.owner("demo/sql")).asked == ["demo/sql"]
    assert router.count("staged") == 1


async def test_a_warm_request_makes_no_call() -> None:
    """The lease of the first answers the second."""
    router = Router()
    for _ in range(3):
        await serve(router, chat("demo/sql"))
    assert router.stager_of(router.owner("demo/sql")).asked == ["demo/sql"]
    assert (router.count("staged"), router.count("hit")) == (1, 2)


async def test_staging_begins_while_the_body_arrives() -> None:
    """The stager is asked as soon as `model` is known; nothing is answered before the body has ended."""
    router = Router()
    stream = Gateway(router, [headers(), body(b'{"model":"demo/sql","messages":["' + b"x" * 20_000, end=False)])
    await until(lambda: router.stager_of(router.owner("demo/sql")).asked)
    for _ in range(20):
        await asyncio.sleep(0)
    assert stream.written == []
    stream.show(body(b'"]}'))
    await until(lambda: len(stream.written) == 2)
    assert stream.destination() == router.owner("demo/sql").address


async def test_a_client_that_hangs_up_changes_nothing_for_others() -> None:
    """A's stream is cancelled while both wait for one flight; B gets its answer and the stager was asked once."""
    router = Router()
    stager = router.stager_of(router.owner("demo/sql"))
    stager.gate.clear()
    first, second = Gateway(router, chat("demo/sql")), Gateway(router, chat("demo/sql"))
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 2)
    first.conversation.abandon()
    await until(lambda: router.residency.waiting(router.owner("demo/sql"), "demo/sql") == 1)
    stager.gate.set()
    await second.end()
    assert first.written == []
    assert second.destination() == router.owner("demo/sql").address
    assert (stager.asked, stager.cancelled) == (["demo/sql"], 0)
    assert router.count("abandoned") == 1


@pytest.mark.parametrize("error", [ModelNotFound("no origin has x"), InvalidAdapter("bad"), OriginFailed("down")])
async def test_a_failure_every_node_shares_is_answered_at_once(error: Exception) -> None:
    """No other node is asked."""
    router = Router()
    for stager in router.stagers.values():
        stager.error = error  # type: ignore[assignment]
    stream = await serve(router, chat("demo/x"))
    assert stream.immediate().status.code == error.status  # type: ignore[attr-defined]
    assert sum(len(stager.asked) for stager in router.stagers.values()) == 1


@pytest.mark.parametrize("error", [NoSpace("full"), StagerUnavailable("gone")])
async def test_a_failure_of_one_node_goes_to_the_next_candidate(error: Exception) -> None:
    """A full disk or a dead stager is not the adapter's fault."""
    router = Router()
    order = router.pool.candidates("demo/sql")
    router.stager_of(order[0]).error = error  # type: ignore[assignment]
    stream = await serve(router, chat("demo/sql"))
    assert stream.destination() == order[1].address


async def test_when_every_candidate_fails_the_last_failure_is_the_answer() -> None:
    """With Retry-After: the next try may find room."""
    router = Router()
    for stager in router.stagers.values():
        stager.error = NoSpace("full")
    stream = await serve(router, chat("demo/sql"))
    assert stream.immediate().details == "no_space"
    assert router.count("rejected", "no_space") == 1


async def test_the_deadline_ends_the_wait_not_the_flight() -> None:
    """503 staging; the fetch goes on and the next request hits."""
    router = Router(deadline_s=0.01)
    stager = router.stager_of(router.owner("demo/sql"))
    stager.gate.clear()
    stream = await serve(router, chat("demo/sql"))
    answer = stream.immediate()
    assert (answer.status.code, answer.details) == (503, "staging")
    assert any(option.header.key == "retry-after" for option in answer.headers.set_headers)
    stager.gate.set()
    await until(lambda: router.residency.lease(router.owner("demo/sql"), "demo/sql"))
    again = await serve(router, chat("demo/sql"))
    assert again.destination() == router.owner("demo/sql").address
    assert stager.asked == ["demo/sql"]


async def test_retries_name_only_nodes_that_have_the_adapter() -> None:
    """A node that lacks it would answer 404, which no client repeats."""
    router = Router()
    order = router.pool.candidates("demo/sql")
    await router.residency.ensure(order[2], "demo/sql")
    await router.residency.ensure(order[0], "demo/sql")
    stream = await serve(router, chat("demo/sql"))
    assert stream.destination() == f"{order[0].address},{order[2].address}"


async def test_base_models_and_bodyless_requests_pass_with_every_endpoint_named() -> None:
    """Any node can serve them; requests in flight decide who comes first."""
    router = Router()
    held = Gateway(router, chat("base"))
    first = held.destination().split(",")[0]
    for _ in range(4):
        models = await serve(router, [headers({":method": "GET", ":path": "/version"}, end=True, mode=pb.NONE)])
        assert models.destination().split(",")[0] != first
        assert len(models.destination().split(",")) == 3
    await held.end()


async def test_a_duplicate_model_is_refused_though_staging_had_begun() -> None:
    """Router and engine would read different ones. The wait is given up, nothing is forwarded."""
    router = Router()
    stager = router.stager_of(router.owner("demo/sql"))
    stager.gate.clear()
    stream = await serve(router, [headers(), body(b'{"model":"demo/sql","pad":"' + b"x" * 20_000, end=False), body(b'","model":"demo/other"}')])
    assert json.loads(stream.immediate().body)["error"]["code"] == "invalid_request"
    assert router.count("rejected", "invalid_request") == 1
    stager.gate.set()


async def test_engine_administration_is_forbidden() -> None:
    """A client that may ask for tokens may not load or unload adapters."""
    router = Router()
    stream = await serve(router, [headers({":path": "/v1/unload_lora_adapter"}, end=True)])
    assert stream.immediate().status.code == 403


async def test_garbage_gets_an_answer() -> None:
    """Never a stream that just ends."""
    router = Router()
    stream = Gateway(router)
    stream.conversation.receive(b"\xff\xff\xff")
    await stream.end()
    assert stream.immediate().details == "protocol"


async def test_a_rejection_says_for_the_access_log_what_was_asked_for() -> None:
    """The model and the wait, beside the reason."""
    router = Router()
    for stager in router.stagers.values():
        stager.error = ModelNotFound("no origin has demo/x")
    waited = await serve(router, chat("demo/x"))
    notes = waited.written[0].dynamic_metadata.fields["lora_extproc"].struct_value.fields
    assert (notes["model"].string_value, notes["reason"].string_value, "waited_ms" in notes) == ("demo/x", "model_not_found", True)
    refused = await serve(router, chat("../x"))
    notes = refused.written[0].dynamic_metadata.fields["lora_extproc"].struct_value.fields
    assert (notes["model"].string_value, notes["reason"].string_value, "waited_ms" in notes) == ("../x", "invalid_request", False)


async def test_everybody_down_is_no_endpoint() -> None:
    """503 with Retry-After, not a wait for nothing."""
    router = Router()
    for endpoint in router.pool.table.endpoints:
        router.membership.set_down(endpoint, "test")
    stream = await serve(router, chat("demo/sql"))
    assert stream.immediate().details == "no_endpoint"


async def test_a_fault_of_the_router_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Envoy would let a request through unprocessed if the stream just ended."""
    router = Router()
    monkeypatch.setattr(router.membership, "least_loaded", None)
    stream = await serve(router, chat("base"))
    assert (stream.immediate().status.code, stream.immediate().details) == (500, "internal")
    assert "a request failed in the router itself" in caplog.text
