"""What to do with one request: forward to an adapter's candidates, pass through, or reject. One function, no side effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from ..errors import Forbidden, LoraExtprocError, ModelNotFound, NoEndpoint
from .artifact import AdapterName, adapter_name
from .deadline import wait_s
from .endpoint import Endpoint
from .placement import Pool, Snapshot

# Paths by which an engine can be told to load, forget or sleep. vLLM guards them with the same key as inference, or not at all.
ENGINE_ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache")


MODELS_PATH = "/v1/models"


@dataclass(frozen=True, slots=True)
class HashOn:
    """How the key is made of a request: `model`, `tenant`, `tenant/model`, `header:NAME` or `header:NAME/model`."""

    header: str | None  # lower-case; None = the model alone
    with_model: bool

    @classmethod
    def parse(cls, text: str, tenant_header: str) -> "HashOn":
        """Raises ValueError for anything but the five forms."""
        if text == "model":
            return cls(None, True)
        what, slash, rest = text.partition("/")
        if (not slash or rest == "model") and what == "tenant":
            return cls(tenant_header.lower(), bool(slash))
        if (not slash or rest == "model") and what.startswith("header:") and len(what) > len("header:"):
            return cls(what.removeprefix("header:").lower(), bool(slash))
        raise ValueError(f"{text!r} is none of model, tenant, tenant/model, header:NAME, header:NAME/model")

    def key(self, model: str, headers: Mapping[str, str]) -> str:
        """The key of a request. A missing header falls back to the model: an empty key would send everybody to one node."""
        return self.header_key(model, headers) or model

    def header_key(self, model: str, headers: Mapping[str, str]) -> str | None:
        """The key if the request carries the header it is made of, else None."""
        value = headers.get(self.header) if self.header else None
        if not value:
            return None
        return f"{value}/{model}" if self.with_model else value


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings a decision depends on."""

    hash_on: HashOn = HashOn(None, True)
    model_header: str = "x-gateway-model-name"  # names the model where the body is not shown to us
    forbidden_paths: tuple[str, ...] = ENGINE_ADMIN_PATHS
    timeout_header: str = "x-request-timeout"
    stage_deadline_s: float = 120.0  # without that header
    max_stage_deadline_s: float = 120.0  # with it
    lists_models: bool = True


@dataclass(slots=True)
class Facts:
    """What is known of a request when it is decided."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    model: str | None  # from the body, or from the model header; None = the request names no model
    subset: tuple[str, ...] | None = None  # the gateway's hint: only these endpoints
    can_rename: bool = False  # whether the body's `model` can be changed before it goes on


@dataclass(slots=True)
class Forward:
    """To one of the candidates, once it has the adapter."""

    adapter: AdapterName
    pool: Pool
    key: str
    candidates: tuple[Endpoint, ...]  # ready ones, owner first; never empty
    wait_s: float  # how long it may be held
    plain: bool = False  # the engine must know it by the adapter's own name


@dataclass(slots=True)
class PassThrough:
    """Nothing to stage. Without a key, any endpoint is as good: take the one with the fewest requests in flight."""

    pool: Pool
    key: str | None
    candidates: tuple[Endpoint, ...]  # ready ones; never empty


@dataclass(frozen=True, slots=True)
class ListModels:
    """Answer with what the whole fleet serves: any engine would list only what it was asked for."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer with this error."""

    error: LoraExtprocError


Decision = Forward | PassThrough | ListModels | Reject


def check_path(path: str, forbidden_paths: tuple[str, ...]) -> None:
    """Raises Forbidden if `path` is one of the forbidden ones or below one. The gateway has normalised it."""
    path = path.partition("?")[0]
    if "%" in path:
        path = unquote(path)  # Envoy leaves `%2f` as it is; the engine's framework reads it as a slash
    elif not path.startswith(forbidden_paths):
        return
    for forbidden in forbidden_paths:
        if path == forbidden or path.startswith(forbidden + "/"):
            raise Forbidden(f"{forbidden} is not for clients")


def decide(facts: Facts, snapshot: Snapshot, policy: Policy) -> Decision:
    """The whole routing policy. Raises nothing."""
    try:
        return _decide(facts, snapshot, policy)
    except LoraExtprocError as error:
        return Reject(error)


def _decide(facts: Facts, snapshot: Snapshot, policy: Policy) -> Decision:
    check_path(facts.path, policy.forbidden_paths)
    if not snapshot.pools:
        raise NoEndpoint("no pool is configured")
    if facts.method == "GET" and policy.lists_models and facts.path.partition("?")[0] == MODELS_PATH:
        return ListModels()
    if facts.model is None:
        return _pass_through(facts, snapshot, snapshot.pools[0], key=None)
    base = snapshot.base_pool(facts.model)
    if base is not None:
        return _pass_through(facts, snapshot, base, policy.hash_on.header_key(facts.model, facts.headers))
    adapter = adapter_name(facts.model)
    pool = snapshot.adapter_pool(adapter)
    if pool is None:
        raise ModelNotFound(f"{adapter} belongs to no pool")
    key = policy.hash_on.key(adapter, facts.headers)
    wait = wait_s(facts.headers.get(policy.timeout_header), policy.stage_deadline_s, policy.max_stage_deadline_s)
    return Forward(adapter, pool, key, _eligible(facts, snapshot, pool, pool.candidates(key)), wait, not facts.can_rename)


def _pass_through(facts: Facts, snapshot: Snapshot, pool: Pool, key: str | None) -> PassThrough:
    order = pool.candidates(key) if key else pool.table.endpoints
    return PassThrough(pool, key, _eligible(facts, snapshot, pool, order))


def _eligible(facts: Facts, snapshot: Snapshot, pool: Pool, order: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    ready = snapshot.ready(order, facts.subset)
    if not ready:
        hint = " within the gateway's subset" if facts.subset is not None else ""
        raise NoEndpoint(f"pool {pool.name}: none of {len(order)} endpoints is ready{hint}")
    return ready
