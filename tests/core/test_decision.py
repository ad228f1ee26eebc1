"""The whole routing policy, as one function of what is known."""

from collections.abc import Mapping

import pytest

from extproc.core.artifact import AdapterName
from extproc.core.decision import ENGINE_ADMIN_PATHS, Decision, Facts, Forward, HashOn, ListModels, PassThrough, Policy, Reject, check_path, decide
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool, Snapshot
from extproc.errors import Forbidden, InvalidRequest, LoraExtprocError, ModelNotFound, NoEndpoint

LLAMA = Pool("llama", frozenset({"llama-3"}), ("org/*", "demo/*"), LookupTable([Endpoint(f"10.0.0.{i}:8000") for i in range(1, 5)], 251))
QWEN = Pool("qwen", frozenset({"qwen-3"}), ("*/qwen-*", "org/*"), LookupTable([Endpoint(f"10.0.1.{i}:8000") for i in range(1, 3)], 251))
BOTH = Snapshot((LLAMA, QWEN))


def decided(
    model: str | None = "demo/sql",
    *,
    snapshot: Snapshot = BOTH,
    policy: Policy | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    subset: tuple[str, ...] | None = None,
) -> Decision:
    return decide(Facts("POST", path, headers or {}, model, subset), snapshot, policy or Policy())


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
    decision = decided(policy=Policy(hash_on), headers=headers)
    assert isinstance(decision, Forward)
    assert decision.key == key
    assert decision.candidates == LLAMA.table.candidates(key)


@pytest.mark.parametrize(
    "text", ["", "models", "Model", "tenant/", "tenant/x", "model/tenant", "header:", "header:/model", "header:x/", "header:x/tenant", "header", "/model"]
)
def test_other_forms_are_refused(text: str) -> None:
    """There are five."""
    with pytest.raises(ValueError, match="is none of model, tenant, tenant/model, header:NAME, header:NAME/model"):
        HashOn.parse(text, "x-tenant-id")


# ---- adapters


def test_an_adapter_goes_to_its_keys_candidates() -> None:
    """Owner first, all of its pool."""
    assert decided("demo/sql") == Forward(AdapterName("demo/sql"), LLAMA, "demo/sql", LLAMA.table.candidates("demo/sql"), 120.0, plain=True)


def test_an_engine_must_know_the_adapters_own_name_where_the_body_cannot_be_changed() -> None:
    """Mode NONE shows no body; with one, each version has a name of its own."""
    facts = Facts("POST", "/v1/completions", {}, "demo/sql")
    for can_rename in (False, True):
        facts.can_rename = can_rename
        decision = decide(facts, BOTH, Policy())
        assert isinstance(decision, Forward)
        assert decision.plain is not can_rename


@pytest.mark.parametrize(
    ("method", "path", "lists"),
    [("GET", "/v1/models", True), ("GET", "/v1/models?limit=1", True), ("POST", "/v1/models", False), ("GET", "/v1/models/a", False), ("GET", "/v1", False)],
)
def test_the_list_of_models_is_the_fleets(method: str, path: str, lists: bool) -> None:
    """One engine's list is what it was asked for so far. It may be switched off."""
    facts = Facts(method, path, {}, None)
    assert (decide(facts, BOTH, Policy()) == ListModels()) is lists
    assert isinstance(decide(facts, BOTH, Policy(lists_models=False)), PassThrough)


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
    policy = Policy(HashOn.parse("tenant", "x-tenant-id"))
    assert decided("llama-3", policy=policy, headers={"x-tenant-id": "acme"}) == PassThrough(LLAMA, "acme", LLAMA.table.candidates("acme"))
    assert decided("llama-3", policy=policy) == PassThrough(LLAMA, None, LLAMA.table.endpoints)


def test_a_base_model_is_no_key_of_its_own() -> None:
    """All requests of the base model on one node would be the worst placement."""
    assert decided("llama-3", policy=Policy(HashOn.parse("model", ""))) == PassThrough(LLAMA, None, LLAMA.table.endpoints)


def test_a_base_model_may_have_a_name_no_adapter_could_have() -> None:
    """Engines serve `/models/llama` under that very name."""
    pool = Pool("p", frozenset({"/models/llama"}), (), LLAMA.table)
    assert isinstance(decided("/models/llama", snapshot=Snapshot((pool,))), PassThrough)


def test_a_request_without_a_model_goes_to_the_first_pool() -> None:
    """`GET /v1/models`, for one."""
    assert decided(None, path="/v1/models") == PassThrough(LLAMA, None, LLAMA.table.endpoints)


# ---- who is ready


def test_an_endpoint_that_is_down_is_no_candidate() -> None:
    """The key's next one takes its place."""
    order = LLAMA.table.candidates("demo/sql")
    decision = decided(snapshot=Snapshot((LLAMA,), {order[0].address: "ill"}))
    assert isinstance(decision, Forward)
    assert decision.candidates == order[1:]


@pytest.mark.parametrize("subset", [("10.0.0.2", "10.0.0.3:8000"), ("10.0.0.3", "10.0.0.2:8000", "10.9.9.9:1")])
def test_the_subset_hint_narrows_the_candidates(subset: tuple[str, ...]) -> None:
    """As ip and as ip:port, in the key's order and not the hint's."""
    decision = decided(subset=subset)
    assert isinstance(decision, Forward)
    assert decision.candidates == tuple(e for e in LLAMA.table.candidates("demo/sql") if e.address in ("10.0.0.2:8000", "10.0.0.3:8000"))


@pytest.mark.parametrize("model", ["demo/sql", "llama-3", None])
def test_where_nobody_is_eligible_there_is_no_endpoint(model: str | None) -> None:
    """By the hint, by an empty one, by health, or because the pool is empty; for adapters and for base models."""
    down = Snapshot((LLAMA,), {e.address: "ill" for e in LLAMA.table.endpoints})
    empty = Snapshot((Pool("llama", frozenset({"llama-3"}), ("*",), LookupTable([])),))
    for decision in (decided(model, subset=("10.9.9.9",)), decided(model, subset=()), decided(model, snapshot=down), decided(model, snapshot=empty)):
        error = rejected(decision)
        assert isinstance(error, NoEndpoint)
        assert "llama" in error.message


def test_the_message_says_whether_the_subset_was_to_blame() -> None:
    """An operator looks at the gateway or at the nodes."""
    assert "within the gateway's subset" in rejected(decided(subset=())).message
    assert "subset" not in rejected(decided(snapshot=Snapshot((LLAMA,), {e.address: "ill" for e in LLAMA.table.endpoints}))).message


@pytest.mark.parametrize("model", ["demo/sql", "llama-3", None])
def test_without_pools_there_is_no_endpoint(model: str | None) -> None:
    """A router may start before its pools are configured."""
    assert isinstance(rejected(decided(model, snapshot=Snapshot(()))), NoEndpoint)


# ---- paths


@pytest.mark.parametrize("admin", ENGINE_ADMIN_PATHS)
@pytest.mark.parametrize("suffix", ["", "?a=b", "/", "/below", "/below?x=/v1/models", "?"])
def test_the_engines_administration_is_not_for_clients(admin: str, suffix: str) -> None:
    """Neither the path itself nor what is below it, whatever the model."""
    for model in ("demo/sql", "llama-3", None):
        error = rejected(decided(model, path=admin + suffix))
        assert isinstance(error, Forbidden)
        assert admin in error.message


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/load_lora_adapters", "/sleepy", "/v1", "/", "", "/v1/models?path=/sleep", "/v1/adapters"])
def test_other_paths_pass(path: str) -> None:
    """Only whole parts count, and the query does not."""
    assert isinstance(decided(path=path), Forward)


@pytest.mark.parametrize("path", ["/v1%2fload_lora_adapter", "/v1%2Fload_lora_adapter", "/v1/load%5Flora_adapter", "/%73leep", "/sleep%2Fx", "/%61dapters?x"])
def test_a_forbidden_path_spelled_with_escapes_is_forbidden(path: str) -> None:
    """Engines decode the path before they look it up, and Envoy's normalize_path leaves `%2f` as it is."""
    with pytest.raises(Forbidden):
        check_path(path, ENGINE_ADMIN_PATHS)


def test_the_forbidden_paths_are_the_policys() -> None:
    """None forbidden, none refused."""
    assert isinstance(decided(path="/sleep", policy=Policy(forbidden_paths=())), Forward)
    assert isinstance(rejected(decided(path="/x/y", policy=Policy(forbidden_paths=("/x",)))), Forbidden)
