"""The whole routing policy, as one function of what is known."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from extproc.config.router import RouterSettings
from extproc.core.artifact import AdapterName
from extproc.core.decision import PLACES, Decision, Facts, Forward, HashOn, ListModels, NobodyReady, PassThrough, Policy, Reject, decide
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.paths import Paths
from extproc.core.placement import Pool, Snapshot
from extproc.core.standing import Standing
from extproc.errors import InvalidRequest, LoraExtprocError, ModelNotFound, NoEndpoint

LLAMA = Pool("llama", frozenset({"llama-3"}), ("org/*", "demo/*"), LookupTable([Endpoint(f"10.0.0.{i}:8000") for i in range(1, 5)], 251))
QWEN = Pool("qwen", frozenset({"qwen-3"}), ("*/qwen-*", "org/*"), LookupTable([Endpoint(f"10.0.1.{i}:8000") for i in range(1, 3)], 251), ("/v1/audio/*",))
PATHS = Paths()
POLICY = RouterSettings().policy()
BOTH = Snapshot((LLAMA, QWEN))


def decided(
    model: str | None = "demo/sql",
    *,
    snapshot: Snapshot = BOTH,
    policy: Policy | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    subset: tuple[str, ...] | None = None,
) -> Decision:
    return decide(Facts(method, PATHS.path(path), headers or {}, model, subset), snapshot, policy or POLICY)


def hashed_on(text: str) -> Policy:
    return replace(POLICY, hash_on=HashOn.parse(text, "x-tenant-id"))


def standing(as_it_is: Standing, *addresses: str) -> dict[str, tuple[Standing, str]]:
    return dict.fromkeys(addresses, (as_it_is, "why"))


def rejected(decision: Decision) -> LoraExtprocError:
    assert isinstance(decision, Reject)
    return decision.error


# ---- what is hashed


@pytest.mark.parametrize(
    ("text", "headers", "key"),
    [
        ("model", {}, "demo/sql"),
        ("model", {"x-tenant-id": "acme"}, "demo/sql"),
        ("tenant", {"x-tenant-id": "acme"}, "acme"),
        ("tenant", {}, "demo/sql"),
        ("tenant", {"x-tenant-id": ""}, "demo/sql"),
        ("tenant/model", {"x-tenant-id": "acme"}, "acme/demo/sql"),
        ("tenant/model", {}, "demo/sql"),
        ("header:x-session", {"x-session": "s1"}, "s1"),
        ("header:x-session", {"x-tenant-id": "acme"}, "demo/sql"),
        ("header:x-session/model", {"x-session": "s1"}, "s1/demo/sql"),
        ("header:x-session/model", {}, "demo/sql"),
        ("header:X-Session", {"x-session": "s1"}, "s1"),
    ],
)
def test_the_key_is_made_as_configured(text: str, headers: dict[str, str], key: str) -> None:
    """Without its header the key is the model: an empty key would send everybody to one node."""
    hash_on = HashOn.parse(text, "X-Tenant-Id")
    assert hash_on.key("demo/sql", headers) == key
    decision = decided(policy=replace(POLICY, hash_on=hash_on), headers=headers)
    assert isinstance(decision, Forward)
    assert decision.key == key
    assert decision.candidates == LLAMA.candidates(key)


@pytest.mark.parametrize(
    "text", ["", "models", "Model", "tenant/", "tenant/x", "model/tenant", "header:", "header:/model", "header:x/", "header:x/tenant", "header", "/model"]
)
def test_other_forms_are_refused(text: str) -> None:
    """There are five."""
    with pytest.raises(ValueError, match="is none of model, tenant, tenant/model, header:NAME, header:NAME/model"):
        HashOn.parse(text, "x-tenant-id")


# ---- adapters


def test_an_adapter_goes_to_its_keys_candidates() -> None:
    """Owner first, then the next of its pool in the key's order."""
    order = LLAMA.candidates("demo/sql")
    assert decided("demo/sql") == Forward(AdapterName("demo/sql"), LLAMA, "demo/sql", order, BOTH, None, 120.0, plain=True)


def test_an_engine_must_know_the_adapters_own_name_where_the_body_cannot_be_changed() -> None:
    """Mode NONE shows no body; with one, each version has a name of its own."""
    facts = Facts("POST", PATHS.path("/v1/completions"), {}, "demo/sql")
    for can_rename in (False, True):
        facts.can_rename = can_rename
        decision = decide(facts, BOTH, POLICY)
        assert isinstance(decision, Forward)
        assert decision.plain is not can_rename


@pytest.mark.parametrize(
    ("method", "path", "listed"),
    [
        ("GET", "/v1/models", ListModels()),
        ("GET", "/v1/models?limit=1", ListModels()),
        ("GET", "/v1/models/acme%2Fsql", ListModels("acme/sql")),
        ("GET", "/v1/models/llama-3", ListModels("llama-3")),
        ("POST", "/v1/models", None),
        ("HEAD", "/v1/models", None),
        ("GET", "/v1/chat/completions", None),
        ("GET", "/health", None),
    ],
)
def test_the_list_of_models_is_the_fleets(method: str, path: str, listed: ListModels | None) -> None:
    """So is one model's card: an engine knows what it was asked for so far. It may be switched off."""
    decision = decided(None, method=method, path=path)
    assert decision == listed if listed else isinstance(decision, PassThrough)
    assert isinstance(decided(None, method=method, path=path, policy=replace(POLICY, lists_models=False)), PassThrough)


def test_a_wait_is_what_the_client_allows() -> None:
    """Within what the operator allows; what is no time is refused, whatever is asked for."""
    decision = decided(headers={"x-request-timeout": "5s"})
    assert isinstance(decision, Forward)
    assert decision.wait_s == 5.0
    for model in ("demo/sql", "llama-3", None):
        assert "x-request-timeout: 'soon' is no time" in rejected(decided(model, headers={"x-request-timeout": "soon"})).message


def test_the_first_pool_that_matches_takes_the_adapter() -> None:
    """`org/qwen-x` matches both; the order of the pools decides."""
    first, second = decided("org/qwen-x"), decided("org/qwen-x", snapshot=Snapshot((QWEN, LLAMA)))
    assert isinstance(first, Forward)
    assert isinstance(second, Forward)
    assert (first.pool, second.pool) == (LLAMA, QWEN)


def test_an_adapter_that_no_pool_takes_is_not_found() -> None:
    """The message names it."""
    error = rejected(decided("else/where"))
    assert isinstance(error, ModelNotFound)
    assert "else/where" in error.message


@pytest.mark.parametrize("model", ["", "../up", "/abs", "a//b", "a\nb", "a" * 300, "a\ud800"])
def test_an_unusable_name_is_refused(model: str) -> None:
    """Before anything is asked or opened for it."""
    assert isinstance(rejected(decided(model)), InvalidRequest)


# ---- base models


def test_a_base_model_passes_without_a_key() -> None:
    """Any endpoint is as good: all ready ones, and no key."""
    assert decided("qwen-3") == PassThrough(QWEN, None, QWEN.table.endpoints)


def test_a_base_model_passes_by_key_where_the_request_has_one() -> None:
    """A tenant's requests stay together for the prefix cache."""
    policy = hashed_on("tenant")
    assert decided("llama-3", policy=policy, headers={"x-tenant-id": "acme"}) == PassThrough(LLAMA, "acme", LLAMA.candidates("acme"))
    assert decided("llama-3", policy=policy) == PassThrough(LLAMA, None, LLAMA.table.endpoints)


def test_a_base_model_is_no_key_of_its_own() -> None:
    """All requests of the base model on one node would be the worst placement."""
    assert decided("llama-3", policy=hashed_on("model")) == PassThrough(LLAMA, None, LLAMA.table.endpoints)


def test_a_base_model_may_have_a_name_no_adapter_could_have() -> None:
    """Engines serve `/models/llama` under that very name."""
    pool = Pool("p", frozenset({"/models/llama"}), (), LLAMA.table)
    assert isinstance(decided("/models/llama", snapshot=Snapshot((pool,))), PassThrough)


# ---- requests that name no model


@pytest.mark.parametrize(
    ("path", "headers", "pool"),
    [
        ("/v1/completions", {}, LLAMA),
        ("/health", {}, LLAMA),
        ("/v1/audio/transcriptions", {}, QWEN),
        ("/v1/audio/transcriptions", {"x-lora-extproc-pool": "llama"}, LLAMA),
        ("/v1/responses/resp_1/cancel", {"x-lora-extproc-pool": "qwen"}, QWEN),
        ("/v1/responses/resp_1/cancel", {"x-lora-extproc-pool": ""}, LLAMA),
        ("/v1/responses/resp_1/cancel", {"x-gateway-model-name": "qwen-3"}, QWEN),
        ("/v1/responses/resp_1/cancel", {"x-gateway-model-name": "acme/qwen-sql"}, QWEN),
        ("/v1/responses/resp_1/cancel", {"x-gateway-model-name": "qwen-3", "x-lora-extproc-pool": "llama"}, QWEN),
        ("/v1/audio/transcriptions", {"x-gateway-model-name": "demo/sql"}, LLAMA),
        ("/v1/audio/transcriptions", {"x-gateway-model-name": "of/nobody"}, QWEN),
        ("/v1/responses/resp_1/cancel", {"x-gateway-model-name": "of/nobody", "x-lora-extproc-pool": "qwen"}, QWEN),
    ],
)
def test_a_request_without_a_model_goes_to_the_pool_that_its_headers_or_its_path_name(path: str, headers: dict[str, str], pool: Pool) -> None:
    """The header that names a model, then the one that names a pool, then the path, then the first pool."""
    assert decided(None, path=path, headers=headers) == PassThrough(pool, None, pool.table.endpoints)


def test_a_pool_that_does_not_exist_is_named() -> None:
    """Rather than another one be taken for it; of what the client wrote, a part."""
    error = rejected(decided(None, headers={"x-lora-extproc-pool": "lama" + "a" * 1000}))
    assert isinstance(error, NoEndpoint)
    assert error.message.startswith("x-lora-extproc-pool: there is no pool 'lamaa")
    assert len(error.message) < 150


@pytest.mark.parametrize(
    ("hash_on", "headers", "key"),
    [
        ("header:x-session", {"x-session": "s1"}, "s1"),
        ("header:x-session/model", {"x-session": "s1"}, "s1"),
        ("header:x-session/model", {"x-session": "s1", "x-gateway-model-name": "llama-3"}, "s1/llama-3"),
        ("tenant", {"x-tenant-id": "acme"}, "acme"),
        ("tenant/model", {"x-tenant-id": "acme"}, "acme"),
        ("header:x-session", {}, None),
        ("model", {"x-session": "s1", "x-gateway-model-name": "llama-3"}, None),
    ],
)
def test_a_request_without_a_model_goes_where_its_header_is_hashed_to(hash_on: str, headers: dict[str, str], key: str | None) -> None:
    """What an engine remembers of a session is asked of the same engine: the key is the one that a request for the base model has."""
    decision = decided(None, path="/v1/responses/resp_1", method="GET", policy=hashed_on(hash_on), headers=headers)
    assert decision == PassThrough(LLAMA, key, LLAMA.candidates(key) if key else LLAMA.table.endpoints)


# ---- who is ready


def test_an_endpoint_that_is_down_is_no_candidate() -> None:
    """The key's next one takes its place."""
    order = LLAMA.candidates("demo/sql")
    decision = decided(snapshot=Snapshot((LLAMA,), standing(Standing.DOWN, order[0].address)))
    assert isinstance(decision, Forward)
    assert decision.candidates == decision.snapshot.stageable(decision.candidates) == order[1:]


def test_an_endpoint_that_drains_is_given_nothing_new() -> None:
    """An adapter that is leased there is served there; base models go elsewhere, while there is an elsewhere."""
    order = LLAMA.candidates("demo/sql")
    one = Snapshot((LLAMA,), standing(Standing.DRAINING, order[0].address))
    decision = decided(snapshot=one)
    assert isinstance(decision, Forward)
    assert (decision.candidates, decision.snapshot.stageable(decision.candidates)) == (order, order[1:])
    base = decided("llama-3", snapshot=one)
    assert isinstance(base, PassThrough)
    assert set(base.candidates) == set(order[1:])
    everyone = Snapshot((LLAMA,), standing(Standing.DRAINING, *(e.address for e in order)))
    decision = decided(snapshot=everyone)
    assert isinstance(decision, Forward)
    assert (decision.candidates, decision.snapshot.stageable(decision.candidates)) == (order, ())
    assert decided("llama-3", snapshot=everyone) == PassThrough(LLAMA, None, LLAMA.table.endpoints)


def test_a_key_stays_where_it_is_while_its_owner_drains() -> None:
    """A base model's request with a key: what the engine remembers of it is there, and it still answers."""
    order = LLAMA.candidates("acme")
    draining = Snapshot((LLAMA,), standing(Standing.DRAINING, order[0].address))
    assert decided("llama-3", snapshot=draining, policy=hashed_on("tenant"), headers={"x-tenant-id": "acme"}) == PassThrough(LLAMA, "acme", order)


@pytest.mark.parametrize("subset", [("10.0.0.2", "10.0.0.3:8000"), ("10.0.0.3", "10.0.0.2:8000", "10.9.9.9:1")])
def test_the_subset_hint_narrows_the_candidates(subset: tuple[str, ...]) -> None:
    """As ip and as ip:port, in the key's order and not the hint's."""
    decision = decided(subset=subset)
    assert isinstance(decision, Forward)
    assert decision.candidates == tuple(e for e in LLAMA.candidates("demo/sql") if e.address in ("10.0.0.2:8000", "10.0.0.3:8000"))


def nobody(decision: Decision) -> NobodyReady:
    assert isinstance(decision, NobodyReady)
    return decision


ALL_DOWN = Snapshot((LLAMA,), standing(Standing.DOWN, *(e.address for e in LLAMA.table.endpoints)))


@pytest.mark.parametrize("model", ["demo/sql", "llama-3", None])
def test_where_nobody_is_eligible_the_request_may_be_held(model: str | None) -> None:
    """By the hint, by an empty one, by health, or because the pool is empty; for adapters and for base models. For how long it would wait for files."""
    empty = Snapshot((Pool("llama", frozenset({"llama-3"}), ("*",), LookupTable([])),))
    for subset, snapshot in ((("10.9.9.9",), BOTH), ((), BOTH), (None, ALL_DOWN), (None, empty)):
        decision = nobody(decided(model, subset=subset, snapshot=snapshot, headers={"x-request-timeout": "7"}))
        assert isinstance(decision.error, NoEndpoint)
        assert "llama" in decision.error.message
        assert decision.wait_s == 7.0


def test_the_message_says_whether_the_subset_was_to_blame() -> None:
    """An operator looks at the gateway or at the nodes."""
    assert "within the gateway's subset" in nobody(decided(subset=())).error.message
    assert "subset" not in nobody(decided(snapshot=ALL_DOWN)).error.message


@pytest.mark.parametrize("model", ["demo/sql", "llama-3", None])
def test_without_pools_there_is_no_endpoint(model: str | None) -> None:
    """A router may start before its pools are configured; nothing is waited for, since they come with a restart."""
    assert isinstance(rejected(decided(model, snapshot=Snapshot(()))), NoEndpoint)


def test_a_refusal_holds_no_frame() -> None:
    """Frames hold the request's headers; nothing may be left of them until the garbage collector runs."""
    assert rejected(decided("../up")).__traceback__ is None


# ---- what binds a request to a place


@pytest.mark.parametrize(("header", "session"), [("x-session-id", "s1"), ("x-other", "")])
def test_a_request_belongs_to_the_session_that_its_header_names(header: str, session: str) -> None:
    """For adapters and base models; nothing names one where the setting is empty."""
    for model in ("demo/sql", "llama-3"):
        for policy, expected in ((POLICY, session), (replace(POLICY, session_header=""), "")):
            decision = decided(model, headers={header: "s1"}, policy=policy)
            assert isinstance(decision, Forward | PassThrough)
            assert decision.session == expected


@pytest.mark.parametrize("count", [PLACES, PLACES + 2, 300])
@pytest.mark.parametrize("headers", [{}, {"x-session-id": "s1"}])
def test_a_base_models_places_are_all_of_few_endpoints_and_the_same_ones_of_many(count: int, headers: dict[str, str]) -> None:
    """Without a session, by the second block of the prompt; whoever drains is no place, and one who is gone leaves the others."""
    pool = Pool("p", frozenset({"base"}), (), LookupTable([Endpoint(f"10.1.{i // 200}.{i % 200}:8000") for i in range(count)], 65_537))

    def places(blocks: tuple[int, ...], *draining: Endpoint) -> tuple[Endpoint, ...]:
        snapshot = Snapshot((pool,), standing(Standing.DRAINING, *(endpoint.address for endpoint in draining)))
        decision = decide(Facts("POST", PATHS.path("/v1/completions"), headers, "base", blocks=blocks), snapshot, POLICY)
        assert isinstance(decision, PassThrough)
        return decision.places

    first = places((1, 2, 3))
    assert len(first) == PLACES
    assert first == places((1, 2, 9, 9))
    assert set(places((1, 2, 3), first[0])) == set(first) - {first[0]}
    assert (places((1, 7)) == first) == (count == PLACES or bool(headers))
    assert places((1,)) == (first if headers else ())


# ---- pools that only decode


DECODE = replace(LLAMA, prefill="prefill")
PREFILL = Pool("prefill", frozenset(), (), LookupTable([Endpoint(f"10.0.2.{i}:8000") for i in range(1, 4)], 251), is_prefill=True)


@pytest.mark.parametrize("model", ["demo/sql", "llama-3"])
def test_a_decoding_pools_request_is_decided_for_the_other_side_too(model: str) -> None:
    """By the same key, among all of its endpoints, whatever the gateway may send requests to itself."""
    decision = decided(model, snapshot=Snapshot((DECODE, PREFILL)), subset=("10.0.0.1:8000",))
    assert isinstance(decision, Forward | PassThrough)
    assert decision.candidates == (Endpoint("10.0.0.1:8000"),)
    assert decision.prefill is not None
    assert decision.prefill.pool is PREFILL
    assert set(decision.prefill.candidates) == set(PREFILL.table.endpoints)


@pytest.mark.parametrize("model", ["demo/sql", "llama-3"])
def test_where_the_other_side_is_down_the_decoding_pool_is_alone(model: str) -> None:
    """It can do both, if slower."""
    down = standing(Standing.DOWN, *(endpoint.address for endpoint in PREFILL.table.endpoints))
    decision = decided(model, snapshot=Snapshot((DECODE, PREFILL), down))
    assert isinstance(decision, Forward | PassThrough)
    assert decision.prefill is None


def test_a_request_without_a_model_has_no_prompt_and_none_is_for_the_other_side() -> None:
    """Not by the header that names a pool either."""
    decision = decided(None, path="/version", method="GET", snapshot=Snapshot((DECODE, PREFILL)))
    assert isinstance(decision, PassThrough)
    assert (decision.pool, decision.prefill) == (DECODE, None)
    error = rejected(decided(None, path="/version", method="GET", snapshot=Snapshot((DECODE, PREFILL)), headers={"x-lora-extproc-pool": "prefill"}))
    assert error.message == "x-lora-extproc-pool: there is no pool 'prefill'"
