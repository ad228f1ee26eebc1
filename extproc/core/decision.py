"""What to do with one request: forward to an adapter's candidates, pass through, answer here, or reject. One function, no side effects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import LoraExtprocError, ModelNotFound, NoEndpoint
from . import conformance
from .artifact import AdapterName, adapter_name
from .deadline import wait_s
from .endpoint import Endpoint
from .paths import Kind, Path
from .placement import Pool, Snapshot
from .prefix import MIN_BLOCKS

PLACES = 16  # of a base model's request, among which its session or its prompt chooses: a look at each costs a quarter of a microsecond
_LISTING = Kind.LISTING  # as the states of core/exchange.py


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

    def header_key(self, model: str | None, headers: Mapping[str, str]) -> str | None:
        """The key if the request carries the header it is made of, else None. A request that names no model has the header's value alone."""
        value = headers.get(self.header) if self.header else None
        if not value:
            return None
        return f"{value}/{model}" if self.with_model and model else value


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings a decision depends on. Their defaults are the settings' own, and nowhere else."""

    hash_on: HashOn
    model_header: str  # names the model where the body is not shown to us
    pool_header: str  # names the pool of a request that names no model
    timeout_header: str
    session_header: str  # "": none
    stage_deadline_s: float  # without that header
    max_stage_deadline_s: float  # with it
    lists_models: bool
    for_conformance: bool = False  # whether a conformance test says who serves


@dataclass(slots=True)
class Facts:
    """What is known of a request when it is decided."""

    method: str
    path: Path
    headers: Mapping[str, str]  # names in lower case
    model: str | None  # from the body, or from the model header; None = the request names no model
    subset: tuple[str, ...] | None = None  # the gateway's hint: only these endpoints
    can_rename: bool = False  # whether the body's `model` can be changed before it goes on
    blocks: tuple[int, ...] = ()  # the hashes of the prompt's blocks; none while the body arrives, or where it was not read for them


@dataclass(slots=True)
class Forward:
    """To one of the candidates, once it has the adapter."""

    adapter: AdapterName
    pool: Pool
    key: str
    candidates: tuple[Endpoint, ...]  # the first that are not down, in the key's order: the owner first; never empty
    snapshot: Snapshot  # that it was decided on
    subset: tuple[str, ...] | None  # the gateway's hint: only these endpoints
    wait_s: float  # how long it may be held
    plain: bool = False  # the engine must know it by the adapter's own name
    session: str = ""  # what the client says that it belongs to
    blocks: tuple[int, ...] = ()  # the hashes of the prompt's blocks
    prefill: "Forward | None" = None  # the same in the pool that computes the prompt; None: `pool` does, or nobody of that one can


@dataclass(slots=True)
class PassThrough:
    """Nothing to stage. Without a key, any endpoint is as good: they take turns."""

    pool: Pool
    key: str | None
    candidates: tuple[Endpoint, ...]  # that are not down; never empty
    places: tuple[Endpoint, ...] = ()  # those of them among which these two choose
    session: str = ""  # what the client says that it belongs to
    blocks: tuple[int, ...] = ()  # the hashes of the prompt's blocks
    prefill: "PassThrough | None" = None  # as of Forward


@dataclass(frozen=True, slots=True)
class ListModels:
    """Answer with what the whole fleet serves, or with one model's card: any engine would know only what it was asked for."""

    model: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer with this error."""

    error: LoraExtprocError


@dataclass(frozen=True, slots=True)
class NobodyReady:
    """Every endpoint that could serve is down: decide again when that changes, for as long as the request may be held; then answer with the error."""

    error: NoEndpoint
    wait_s: float


Decision = Forward | PassThrough | ListModels | Reject | NobodyReady


def decide(facts: Facts, snapshot: Snapshot, policy: Policy) -> Decision:
    """The whole routing policy. Raises nothing."""
    try:
        return _decide(facts, snapshot, policy)
    except LoraExtprocError as error:
        return Reject(error.bare())


def _decide(facts: Facts, snapshot: Snapshot, policy: Policy) -> Decision:
    if not snapshot.pools:
        raise NoEndpoint("no pool is configured")
    if policy.for_conformance:
        facts = replace(facts, subset=conformance.selected(facts.headers, facts.subset))
        return _pass_through(facts, snapshot, snapshot.pools[0], None, "", 0.0)
    if facts.path.kind is _LISTING and facts.method == "GET" and policy.lists_models:
        return ListModels(facts.path.model)
    wait = wait_s(policy.timeout_header, facts.headers, policy.stage_deadline_s, policy.max_stage_deadline_s)
    model = facts.model
    if model is None:
        return _pass_through(facts, snapshot, *_pool_without_model(facts, snapshot, policy), _session(facts, policy), wait)
    base = snapshot.base_pool(model)
    if base is not None:
        return _pass_through(facts, snapshot, base, policy.hash_on.header_key(model, facts.headers), _session(facts, policy), wait)
    adapter = adapter_name(model)
    pool = snapshot.adapter_pool(adapter)
    if pool is None:
        raise ModelNotFound(f"The model `{adapter}` does not exist: it belongs to no pool")
    key = policy.hash_on.key(adapter, facts.headers)
    usable = snapshot.candidates(pool, key, facts.subset)
    if not usable:
        return _nobody(facts, pool, wait)
    forward = Forward(adapter, pool, key, usable, snapshot, facts.subset, wait, not facts.can_rename, _session(facts, policy), facts.blocks)
    prefill = snapshot.pool(pool.prefill) if pool.prefill else None
    if prefill is not None:
        usable = snapshot.candidates(prefill, key)  # the gateway's hint is of those that it sends requests to
        forward.prefill = replace(forward, pool=prefill, candidates=usable, subset=None) if usable else None
    return forward


def _session(facts: Facts, policy: Policy) -> str:
    return facts.headers.get(policy.session_header, "") if policy.session_header else ""


def _pool_without_model(facts: Facts, snapshot: Snapshot, policy: Policy) -> tuple[Pool, str | None]:
    """The pool and the key of a request whose body names no model: what its headers say, then its path, then the first pool."""
    named = facts.headers.get(policy.model_header) or None
    key = policy.hash_on.header_key(named, facts.headers)
    if named is not None:
        pool = snapshot.base_pool(named) or snapshot.adapter_pool(named)
        if pool is not None:
            return pool, key
    if wanted := facts.headers.get(policy.pool_header):
        pool = snapshot.pool(wanted)
        if pool is None or pool.is_prefill:
            raise NoEndpoint(f"{policy.pool_header}: there is no pool {wanted[:80]!r}")
        return pool, key
    return snapshot.path_pool(facts.path.text) or snapshot.pools[0], key


def _pass_through(facts: Facts, snapshot: Snapshot, pool: Pool, key: str | None, session: str, wait: float) -> Decision:
    through = _through(facts, snapshot, pool, key, session, facts.subset)
    if through is None:
        return _nobody(facts, pool, wait)
    prefill = snapshot.pool(pool.prefill) if pool.prefill and facts.model is not None else None
    if prefill is not None:
        through.prefill = _through(facts, snapshot, prefill, key, session, None)
    return through


def _through(facts: Facts, snapshot: Snapshot, pool: Pool, key: str | None, session: str, subset: Sequence[str] | None) -> PassThrough | None:
    """To this pool; None if nobody in it can serve. The places are all of few candidates, and of many always the same for what begins alike."""
    usable = snapshot.candidates(pool, key, subset) if key else snapshot.usable(pool.table.endpoints, subset)
    if not usable:
        return None
    if key:  # stays where it is while its place drains
        return PassThrough(pool, key, tuple(filter(snapshot.serves, usable)) or usable)
    candidates = snapshot.stageable(usable) or usable
    if not session and len(facts.blocks) < MIN_BLOCKS:
        return PassThrough(pool, key, candidates)
    places = candidates
    if len(candidates) > PLACES:
        places = snapshot.stageable(snapshot.usable(pool.table.first(session or f"{facts.blocks[MIN_BLOCKS - 1]:x}", PLACES), subset))
    return PassThrough(pool, key, candidates, places, session, facts.blocks)


def _nobody(facts: Facts, pool: Pool, wait: float) -> NobodyReady:
    hint = " within the gateway's subset" if facts.subset is not None else ""
    return NobodyReady(NoEndpoint(f"pool {pool.name}: none of {len(pool.table.endpoints)} endpoints is ready{hint}"), wait)
