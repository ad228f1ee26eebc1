"""What a conformance suite's tests ask of their Endpoint Picker; that a router which is none does nothing of it."""

from dataclasses import replace

import pytest

from extproc.config.router import RouterSettings
from extproc.core.conformance import ECHO_HEADER, NOT_TOLD, SELECTION_HEADER, SERVED_HEADER, AnyPath, selected
from extproc.core.decision import Decision, Facts, NobodyReady, PassThrough, decide
from extproc.core.endpoint import Endpoint
from extproc.core.events import Decide, Direction, HeadersReply, Mode, Mutation, RequestHeaders, ResponseHeaders
from extproc.core.exchange import Exchange
from extproc.core.maglev import LookupTable
from extproc.core.paths import Path, Paths
from extproc.core.placement import Pool, Snapshot
from extproc.core.standing import Standing
from extproc.core.steering import Steering

RANKS = [Endpoint(f"10.0.0.{pod}:{port}") for pod in (1, 2, 3) for port in (3000, 3002, 3004)]
SNAPSHOT = Snapshot((Pool("primary", frozenset(), ("*",), LookupTable(RANKS, 251)),))
ON = RouterSettings(conformance=True)


def decided(selection: str | None, *, subset: tuple[str, ...] | None = None, settings: RouterSettings = ON, snapshot: Snapshot = SNAPSHOT) -> Decision:
    headers = {} if selection is None else {SELECTION_HEADER: selection}
    return decide(Facts("POST", AnyPath().path("/primary-gateway-test"), headers, None, subset), snapshot, settings.policy())


def chosen(decision: Decision) -> set[str]:
    assert isinstance(decision, PassThrough)
    return {endpoint.address for endpoint in decision.candidates}


@pytest.mark.parametrize(
    ("selection", "subset", "may_serve"),
    [
        ("10.0.0.2", None, {"10.0.0.2:3000", "10.0.0.2:3002", "10.0.0.2:3004"}),
        ("10.0.0.1, 10.0.0.3:3002", None, {"10.0.0.1:3000", "10.0.0.1:3002", "10.0.0.1:3004", "10.0.0.3:3002"}),
        ("10.0.0.1:3000,10.0.0.1:3004", None, {"10.0.0.1:3000", "10.0.0.1:3004"}),
        ("10.0.0.1:3000", ("10.0.0.2",), {"10.0.0.1:3000"}),
        (None, ("10.0.0.2:3002", "10.0.0.3:3000"), {"10.0.0.2:3002", "10.0.0.3:3000"}),
        ("", None, {endpoint.address for endpoint in RANKS}),
        (None, None, {endpoint.address for endpoint in RANKS}),
    ],
)
def test_a_test_says_who_may_serve(selection: str | None, subset: tuple[str, ...] | None, may_serve: set[str]) -> None:
    """By address, of which every rank counts, or by address and port; the header before the gateway's hint; without either everybody."""
    assert chosen(decided(selection, subset=subset)) == may_serve


@pytest.mark.parametrize(("selection", "subset"), [("10.9.9.9", None), (None, ()), (None, ("10.9.9.9:3000",))])
def test_nobody_who_may_serve_is_answered_503_at_once(selection: str | None, subset: tuple[str, ...] | None) -> None:
    """An address that is not of the pool is never sent anything; the protocol wants 503."""
    decision = decided(selection, subset=subset)
    assert isinstance(decision, NobodyReady)
    assert (decision.error.status, decision.wait_s) == (503, 0)


def test_an_endpoint_that_is_down_does_not_serve() -> None:
    """Named or not."""
    down = replace(SNAPSHOT, standings={"10.0.0.2:3002": (Standing.DOWN, "why")})
    assert chosen(decided("10.0.0.2", snapshot=down)) == {"10.0.0.2:3000", "10.0.0.2:3004"}


def test_a_router_that_is_not_asked_to_takes_no_notice_of_the_header() -> None:
    """Any client could aim its requests otherwise."""
    assert chosen(decided("10.0.0.2:3002", settings=RouterSettings())) == {endpoint.address for endpoint in RANKS}
    assert ECHO_HEADER not in RouterSettings().steers().mutation("primary", RANKS, {}).set_headers


def test_the_echo_server_is_asked_to_tell_who_was_chosen() -> None:
    """And the route is chosen anew, as the suite's own picker has it."""
    mutation = Steering(for_conformance=True).mutation("primary", RANKS[:2], {})
    assert mutation.set_headers[ECHO_HEADER] == f"{SERVED_HEADER}:{RANKS[0].address}"
    assert mutation.clear_route_cache


@pytest.mark.parametrize(("served", "told"), [("10.0.0.1:3000", "10.0.0.1:3000"), ("", NOT_TOLD)])
def test_the_test_is_told_who_served(served: str, told: str) -> None:
    """As the gateway says it in the response phase; a gateway that does not has failed."""
    exchange = Exchange(max_body_bytes=1000, model_header="x-model", allowed=AnyPath(), tells_served=True)
    headers = {":method": "POST", ":path": "/primary-gateway-test?a=b", "content-type": "text/plain"}
    [question] = exchange.receive(RequestHeaders(headers, False, response_mode=Mode.FULL_DUPLEX_STREAMED))
    assert isinstance(question, Decide)
    assert question.facts.path.text == "/primary-gateway-test"
    exchange.decided(Mutation(endpoints=("10.0.0.1:3000",), is_base=True))
    [reply] = exchange.receive(ResponseHeaders(False, served, 200))
    assert reply == HeadersReply(Direction.RESPONSE, Mutation({SERVED_HEADER: told}))


def test_a_body_is_not_looked_at() -> None:
    """The suite's bodies name a model that nobody has, or are none."""
    exchange = Exchange(max_body_bytes=1000, model_header="x-model", allowed=AnyPath())
    [question] = exchange.receive(RequestHeaders({":method": "POST", ":path": "/v1/completions", "content-type": "application/json"}, False))
    assert isinstance(question, Decide)
    assert question.facts.model is None


def test_what_a_test_names_is_read_as_lists_are_written() -> None:
    """Spaces and empty parts count for nothing."""
    assert selected({SELECTION_HEADER: " 10.0.0.1 ,, 10.0.0.2:1 "}, ("10.0.0.9",)) == ("10.0.0.1", "10.0.0.2:1")
    assert selected({SELECTION_HEADER: " , "}, ("10.0.0.9",)) == ("10.0.0.9",)


def test_only_a_conformance_router_takes_any_path() -> None:
    """Administration, too: an echo server has none."""
    assert isinstance(AnyPath().path("/metrics"), Path)
    with pytest.raises(Exception, match="administration"):
        Paths().path("/metrics")
