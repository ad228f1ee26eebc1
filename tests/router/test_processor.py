"""One stream from its first message to its last: decisions, waits, cancellations."""

import asyncio
import json
from types import FrameType, TracebackType

import pytest

from extproc.core.endpoint import Endpoint
from extproc.core.exchange import JUDGED_HERE_BYTES, Exchange
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import Stager
from extproc.errors import InvalidAdapter, LoraExtprocError, ModelNotFound, NoSpace, OriginFailed, StagerUnavailable
from extproc.pb import ext_proc_pb2 as pb
from extproc.router import processor as processor_module
from extproc.router.account import Account
from extproc.router.http2.calls import Message
from extproc.router.processor import Processor
from tests.fakes.wait import in_virtual_time, turns, until

from .fakes import MAX_BODY_BYTES, Gateway, Router, body, chat, get, headers, no_cycles, serve


def now() -> float:
    return asyncio.get_running_loop().time()


def all_down(router: Router) -> None:
    for endpoint in router.pool.table.endpoints:
        router.membership.observe(endpoint, stager=Stager.NOT_READY, why="ill")


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
    first.processor.abandon()
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
    """Any node can serve them; they take turns at being the first."""
    router = Router()
    for messages in (chat("base"), [get("/version")]):
        served = [(await serve(router, messages)).destination().split(",") for _ in range(6)]
        assert {len(destinations) for destinations in served} == {3}
        assert sorted(destinations[0] for destinations in served) == sorted(2 * [e.address for e in router.pool.table.endpoints])


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
    assert (stream.immediate().status.code, stream.immediate().details) == (403, "forbidden")


async def test_a_path_that_nobody_has_looked_at_is_not_found() -> None:
    """It does not reach an engine."""
    stream = await serve(Router(), [headers({":path": "/v1/brand_new"}, end=True)])
    assert (stream.immediate().status.code, stream.immediate().details) == (404, "unknown_path")


async def test_garbage_gets_an_answer() -> None:
    """Never a stream that just ends."""
    router = Router()
    stream = Gateway(router)
    stream.processor.receive(b"\xff\xff\xff")
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


async def test_a_fault_of_the_router_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Envoy would let a request through unprocessed if the stream just ended."""
    router = Router()
    monkeypatch.setattr(router.membership, "turn", None)
    stream = await serve(router, chat("base"))
    assert (stream.immediate().status.code, stream.immediate().details) == (500, "internal")
    assert "a request failed in the router itself" in caplog.text


# ---- nobody can serve


def test_a_request_that_nobody_can_serve_is_held_until_somebody_can() -> None:
    """As at a start, or while the only node restarts: for an adapter, for a base model, for a request that names none."""

    async def main() -> None:
        router = Router(no_endpoint_wait_s=10.0, clock=now)
        all_down(router)
        held = [Gateway(router, messages) for messages in (chat("demo/sql"), chat("base"), [get("/health")])]
        await asyncio.sleep(9)
        assert [stream.written for stream in held] == [[], [], []]
        assert router.value("lora_extproc_held_requests") == 3
        [endpoint, *_] = router.pool.table.endpoints
        router.membership.observe(endpoint, stager=Stager.READY, why="")
        for stream in held:
            await stream.end()
            assert stream.first_destination() == endpoint.address
        [noted] = [reply.dynamic_metadata for reply in held[0].written if reply.HasField("dynamic_metadata")]
        assert noted.fields["lora_extproc"].struct_value.fields["waited_ms"].number_value == 9000
        assert router.value("lora_extproc_held_requests") == 0

    in_virtual_time(main)


@pytest.mark.parametrize(("limit", "asked", "seconds"), [(10.0, "", 10.0), (10.0, "2500ms", 2.5), (10.0, "1m", 10.0), (0.0, "", 0.0)])
@pytest.mark.parametrize("model", ["demo/sql", "base"])
def test_a_request_that_nobody_can_serve_is_told_so_in_the_end(limit: float, asked: str, seconds: float, model: str) -> None:
    """503 with Retry-After, after `no_endpoint_wait_s`, or when its client would wait no longer."""

    async def main() -> None:
        router = Router(no_endpoint_wait_s=limit, clock=now)
        all_down(router)
        began = now()
        stream = await serve(router, chat(model, {"x-request-timeout": asked}))
        assert now() - began == pytest.approx(seconds)
        assert (stream.immediate().details, stream.answer_headers()["retry-after"]) == ("no_endpoint", "2")
        assert router.count("rejected", "no_endpoint") == 1

    in_virtual_time(main)


def test_stagers_that_do_not_answer_are_asked_again() -> None:
    """All of them restart, which the router has not noticed: the request is held until one is there, and not for longer in all than it may."""

    async def main() -> None:
        router = Router(no_endpoint_wait_s=10.0, clock=now)
        for stager in router.stagers.values():
            stager.error = StagerUnavailable("gone")
        held = Gateway(router, chat("demo/sql"))
        await asyncio.sleep(4)
        router.stager_of(router.owner("demo/sql")).error = None
        await held.end()
        assert held.first_destination() == router.owner("demo/sql").address
        for stager in router.stagers.values():
            stager.error = StagerUnavailable("gone")
        began = now()
        refused = await serve(router, chat("demo/other"))
        assert refused.immediate().details == "no_endpoint"
        assert 10 <= now() - began <= 10.5
        await router.stop()

    in_virtual_time(main)


def test_an_adapter_that_is_nowhere_waits_while_every_node_drains() -> None:
    """What is leased is served meanwhile; for what is not, somebody has to be there again."""

    async def main() -> None:
        router = Router(no_endpoint_wait_s=10.0, clock=now)
        owner = router.owner("warm")
        await router.residency.ensure(owner, "warm")
        for endpoint in router.pool.table.endpoints:
            router.membership.observe(endpoint, stager=Stager.STOPPING, why="the stager is stopping")
        assert (await serve(router, chat("warm"))).first_destination() == owner.address
        assert (await serve(router, chat("base"))).destination()
        held = Gateway(router, chat("cold"))
        await asyncio.sleep(5)
        assert held.written == []
        router.membership.observe(router.owner("cold"), stager=Stager.READY, why="")
        await held.end()
        assert held.first_destination() == router.owner("cold").address
        assert [stager.asked.count("cold") for stager in router.stagers.values()].count(1) == 1

    in_virtual_time(main)


async def test_who_waits_for_an_endpoint_takes_a_place_too() -> None:
    """Requests that nobody can serve pile up like others."""
    router = Router(no_endpoint_wait_s=10.0)
    all_down(router)
    held = [Gateway(router, chat("base")) for _ in range(10)]
    await turns()
    assert (await serve(router, chat("base"))).immediate().details == "overloaded"
    for stream in held:
        stream.processor.abandon()
    await until(lambda: router.value("lora_extproc_held_requests") == 0)


# ---- bodies that are judged elsewhere


async def test_a_large_body_is_judged_elsewhere_and_then_served() -> None:
    """Nothing is asked and nothing is answered before its verdict."""
    router = Router(max_body_bytes=2**22)
    router.judges.gate.clear()
    large = b'{"model":"demo/sql","x":"' + b"x" * JUDGED_HERE_BYTES + b'"}'
    stream = Gateway(router, [headers(), body(large)])
    await turns()
    assert (stream.written, router.value("lora_extproc_held_bytes")) == ([], len(large))
    router.judges.gate.set()
    await stream.end()
    assert (stream.first_destination(), stream.body()) == (router.owner("demo/sql").address, large)
    assert router.value("lora_extproc_scan_seconds_count") == 1


async def test_a_form_is_judged_elsewhere_and_named_anew() -> None:
    """Audio, as the OpenAI clients send it."""
    router = Router(1)
    router.stager_of(router.owner("a")).renames = True
    form = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n'
    stream = await serve(router, [headers({":path": "/v1/audio/transcriptions", "content-type": "multipart/form-data; boundary=x"}), body(form)])
    assert stream.body() == form.replace(b"\r\na\r\n", b"\r\na@sha256:dddddddddddd\r\n")


async def test_what_is_wrong_with_a_body_that_is_judged_elsewhere_is_answered() -> None:
    """As of any other."""
    stream = await serve(Router(), [headers(), body(b"[" + b" " * JUDGED_HERE_BYTES + b"]")])
    assert json.loads(stream.immediate().body)["error"]["message"] == "the body is JSON, but not an object"


async def test_who_hangs_up_while_its_body_is_judged_leaves_nothing() -> None:
    """No answer, no bytes, no question to a stager."""
    router = Router()
    router.judges.gate.clear()
    stream = Gateway(router, [headers(), body(b'{"model":"demo/sql","x":"' + b"x" * JUDGED_HERE_BYTES + b'"}')])
    await turns()
    stream.processor.abandon()
    router.judges.gate.set()
    await turns()
    assert (stream.written, router.judges.judged, router.value("lora_extproc_held_bytes")) == ([], 0, 0)
    assert not any(stager.asked for stager in router.stagers.values())


# ---- the end of a router


async def test_a_router_that_stops_tells_who_waits_to_come_again() -> None:
    """503 staging with Retry-After, which another replica will answer: for files, for an endpoint, for a verdict, for the rest of a body."""
    router = Router(no_endpoint_wait_s=10.0)
    router.judges.gate.clear()
    for stager in router.stagers.values():
        stager.gate.clear()
    staged = Gateway(router, chat("demo/sql"))
    judged = Gateway(router, [headers(), body(b" " * (JUDGED_HERE_BYTES + 1))])
    arriving = Gateway(router, [headers(), body(b'{"model":', end=False)])
    all_down(router)
    nobody = Gateway(router, chat("base"))
    await turns()
    for stream in (staged, judged, arriving, nobody):
        stream.processor.drain()
    for stream in (staged, judged, arriving, nobody):
        assert (stream.immediate().status.code, stream.immediate().details, stream.answer_headers()["retry-after"]) == (503, "staging", "2")
        await stream.end()
    await turns()
    assert router.value("lora_extproc_held_requests") == 0


async def test_a_request_that_was_answered_is_not_answered_again_by_the_drain() -> None:
    """Its stream may be open while the engine generates."""
    router = Router()
    stream = Gateway(router, chat("base"))
    written = len(stream.written)
    stream.processor.drain()
    assert len(stream.written) == written
    await stream.end()


# ---- what is sent


async def test_a_large_body_leaves_a_part_per_turn_of_the_loop() -> None:
    """Others are served in between; what comes after it waits its turn, and the end is not sent before it."""
    router = Router(max_body_bytes=2**23)
    large = b'{"model":"base","x":"' + b"x" * (5 * 2**20) + b'"}'
    stream = Gateway(router, [headers(), body(large, end=False), pb.ProcessingRequest(request_trailers=pb.HttpTrailers())])
    stream.processor.half_close()
    await until(lambda: stream.written)
    sent = [len(stream.body())]
    while not stream.finished.is_set():
        await asyncio.sleep(0)
        sent.append(len(stream.body()))
    assert stream.body() == large
    parts = [after - before for before, after in zip([0, *sent], sent, strict=False)]
    assert max(parts) <= processor_module.SENT_PER_TURN_BYTES + 62_000
    assert sum(part > 0 for part in parts) >= 5
    assert stream.written[-1].WhichOneof("response") == "request_trailers"


async def test_who_hangs_up_in_the_middle_of_a_large_body_is_sent_no_more() -> None:
    """The rest is let go."""
    router = Router(max_body_bytes=2**23)
    stream = Gateway(router, [headers(), body(b'{"model":"base","x":"' + b"x" * (5 * 2**20) + b'"}')])
    await until(lambda: stream.written)
    stream.processor.abandon()
    written = len(stream.written)
    await turns()
    assert len(stream.written) == written
    assert router.value("lora_extproc_held_bytes") == 0


async def test_a_warm_mutation_is_encoded_once_per_lease() -> None:
    """Five thousand adapters in turn cost no more than one: the lease keeps the bytes. Another order of nodes, another name or a new lease makes others."""
    router = Router()
    first, *others = [await serve(router, chat("demo/sql")) for _ in range(4)]
    warm = [stream.raw[0] for stream in others]
    assert warm[0] is warm[1] is warm[2]
    assert first.raw[0] is not warm[0]  # staged, not hit
    await router.residency.ensure(router.pool.candidates("demo/sql")[1], "demo/sql")
    more = await serve(router, chat("demo/sql"))
    assert more.raw[0] is not warm[0]
    assert len(more.destination().split(",")) == 2
    assert (await serve(router, chat("demo/sql"))).raw[0] is more.raw[0]


async def test_a_base_models_mutation_is_encoded_once_per_order() -> None:
    """As many as there are endpoints that can come first."""
    router = Router()
    assert len({id((await serve(router, chat("base"))).raw[0]) for _ in range(9)}) == 3


# ---- who may read an answer


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (("*",), {"access-control-allow-origin": "*"}),
        (("https://a.test",), {"access-control-allow-origin": "https://a.test", "vary": "Origin"}),
        (("https://b.test",), {"vary": "Origin"}),
        ((), {}),
    ],
)
async def test_own_answers_carry_the_headers_that_pages_need(allowed: tuple[str, ...], expected: dict[str, str]) -> None:
    """Errors at once, errors after a wait, and lists; a request that names no origin is told nothing of them."""
    router = Router(cors_allow_origins=allowed)
    for stager in router.stagers.values():
        stager.error = ModelNotFound("no origin has it")
    origin = {"origin": "https://a.test"}
    for messages in (chat("../x", origin), chat("demo/x", origin), [get("/sleep", origin)], [get("/v1/models", origin)], [get("/v1/models/none", origin)]):
        answered = (await serve(router, messages)).answer_headers()
        assert {name: value for name, value in answered.items() if name.startswith("access-") or name == "vary"} == expected
    assert not {"access-control-allow-origin", "vary"} & set((await serve(router, chat("../x"))).answer_headers())


# ---- requests that name no model


def two_pools() -> tuple[Pool, Pool]:
    return tuple(  # type: ignore[return-value]  # two
        Pool(name, frozenset({f"{name}-base"}), (f"{name}/*",), LookupTable([Endpoint(f"10.0.{number}.{i}:8000") for i in (1, 2, 3)], 251), paths)
        for number, (name, paths) in enumerate({"text": (), "audio": ("/v1/audio/*", "/v1/realtime")}.items(), 1)
    )


@pytest.mark.parametrize(
    ("path", "values", "pool"),
    [
        ("/v1/responses/r1", {}, 0),
        ("/v1/realtime", {}, 1),
        ("/v1/responses/r1", {"x-lora-extproc-pool": "audio"}, 1),
        ("/v1/responses/r1", {"x-gateway-model-name": "audio/a"}, 1),
        ("/v1/realtime", {"x-gateway-model-name": "text-base"}, 0),
    ],
)
async def test_a_request_without_a_model_goes_to_the_pool_it_names_and_by_its_header(path: str, values: dict[str, str], pool: int) -> None:
    """Always to the same endpoint of that pool where `hash_on` names a header that it has."""
    pools = two_pools()
    router = Router(pools=pools, hash_on="header:x-session")
    expected = pools[pool].candidates("s1")
    for _ in range(3):
        stream = await serve(router, [get(path, {**values, "x-session": "s1"})])
        assert stream.destination() == ",".join(e.address for e in expected)
    assert {(await serve(router, [get(path, values)])).first_destination() for _ in range(9)} == {e.address for e in expected}


# ---- nothing is left of a request


class Sent:
    """A sender that keeps nothing of whom it sends for."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.finished = False

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def finish(self, status: int = 0, text: str = "") -> None:
        self.finished = True


JSON = body(b'{"model":"demo/sql"}')
LARGE = b" " * JUDGED_HERE_BYTES
REJECTIONS: dict[str, list[pb.ProcessingRequest]] = {
    "not JSON": [headers(), body(b'{"model":')],
    "two models": [headers(), body(b'{"model":"a","model":"b"}')],
    "not JSON, judged elsewhere": [headers(), body(LARGE + b"!")],
    "no model": [headers(), body(b"{}")],
    "a form that is none": [headers({"content-type": "multipart/form-data; boundary=x"}), body(b"--y--")],
    "no boundary": [headers({"content-type": "multipart/form-data"}), JSON],
    "an encoding that is none": [headers({"content-encoding": "gzip"}), body(b"plain")],
    "too large": [headers(), body(b" " * (MAX_BODY_BYTES + 1))],
    "a name that is none": chat("../up"),
    "no path": [headers({":path": "/nowhere"})],
    "administration": [headers({":path": "/sleep"})],
    "of no known media": [headers({"content-type": "text/plain"})],
    "a time that is none": [headers({"x-request-timeout": "soon"}), JSON],
    "out of order": [JSON],
    "unreadable": [pb.ProcessingRequest()],
    "a mode that is not spoken": [headers(mode=pb.STREAMED)],
    "a pool that is none": [get("/health", {"x-lora-extproc-pool": "none"})],
    "a card that is none": [get("/v1/models/none")],
}
FAILURES: list[LoraExtprocError] = [
    ModelNotFound("x"),
    InvalidAdapter("x"),
    OriginFailed("x"),
    NoSpace("x"),
    StagerUnavailable("x"),
]
KINDS = (Processor, Exchange, Account, LoraExtprocError, FrameType, TracebackType)


async def run(router: Router, messages: list[pb.ProcessingRequest]) -> None:
    """A whole stream, whose processor is dropped at its end."""
    sent = Sent()
    processor = Processor(router.services, sent)
    for message in messages:
        processor.receive(message.SerializeToString())
    processor.half_close()
    await until(lambda: sent.finished)
    await turns()
    assert sent.messages


@pytest.mark.parametrize("why", REJECTIONS)
async def test_a_rejected_request_leaves_no_reference_cycle(why: str) -> None:
    """Its body would lie there until the garbage collector comes to it, which is after many others."""
    router = Router()
    await run(router, REJECTIONS[why])
    with no_cycles(*KINDS):
        await run(router, REJECTIONS[why])


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_a_request_that_fails_after_a_wait_leaves_no_reference_cycle(error: LoraExtprocError) -> None:
    """The error has been through the flight, the walk and the wait."""
    router = Router()
    for stager in router.stagers.values():
        stager.error = error
    with no_cycles(*KINDS):
        await run(router, chat("demo/x"))


async def test_a_wait_that_ends_leaves_no_reference_cycle() -> None:
    """By its deadline, by the limit of those that wait, for want of an endpoint, by a drain, or because the client has gone."""
    router = Router(deadline_s=0.001, no_endpoint_wait_s=0.001)
    for stager in router.stagers.values():
        stager.gate.clear()
    with no_cycles(*KINDS):
        await run(router, chat("demo/x"))
    patient = {"x-request-timeout": "60"}
    waiting = [Processor(router.services, Sent()) for _ in range(3)]
    for processor in waiting:
        for message in chat("demo/x", patient):
            processor.receive(message.SerializeToString())
    await turns()
    with no_cycles(*KINDS):
        await run(router, chat("demo/x", patient))
    with no_cycles(*KINDS):
        waiting.pop().drain()
        waiting.pop().abandon()
        waiting.pop().half_close()
        await turns()
    all_down(router)
    with no_cycles(*KINDS):
        await run(router, chat("base"))
    for stager in router.stagers.values():
        stager.gate.set()
    await turns()


async def test_nothing_is_left_of_a_served_request_either() -> None:
    """Warm, cold, and passed through; the processor goes with its last reference."""
    router = Router()
    for messages in (chat("demo/sql"), chat("demo/sql"), chat("base"), [get("/v1/models")]):
        with no_cycles(*KINDS):
            await run(router, messages)
    with no_cycles(*KINDS):
        processor = Processor(router.services, Sent())
        processor.receive(headers().SerializeToString())
        processor.abandon()
        del processor
