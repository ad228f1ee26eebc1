"""The ext_proc service: what is hashed, who serves, how long a request is held, and what it may cost."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..core.choice import Balance, Rule, Rules
from ..core.decision import HashOn, Policy
from ..core.maglev import DEFAULT_TABLE_SIZE, MAX_TABLE_SIZE, is_prime
from ..core.paths import CLIENT_PATHS, is_administration, is_path
from ..core.steering import Steering
from .credentials import TlsSettings
from .values import Address, Bytes, Group, OptionalAddress, Seconds

MAX_BODY_BYTES = 2**30  # a gRPC message, which has a whole body in BUFFERED, states its length in four bytes; Envoy's buffers are the limit before that


def _prime(value: int) -> int:
    if value > MAX_TABLE_SIZE or not is_prime(value):
        raise ValueError(f"is not a prime up to {MAX_TABLE_SIZE}")
    return value


def _path(value: str) -> str:
    if not is_path(value):
        raise ValueError("is no path; `{id}` may stand for a part of one, `{rest}` for all that follows")
    if is_administration(value):
        raise ValueError("is an engine's administration, which clients never reach")
    return value


class CopiesSettings(Group):
    match: str = Field(min_length=1)
    """Shell pattern of adapter names; the first that matches wins."""
    min: Annotated[int, Field(ge=1, le=64)] = 1
    """So many copies are kept in engines' memory, whatever the load."""
    max: Annotated[int, Field(ge=0)] = 0
    """No more are made. 0: as many as the load makes."""

    @model_validator(mode="after")
    def _check_order(self) -> "CopiesSettings":
        if 0 < self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class RouterSettings(Group):
    listen: Address = "127.0.0.1:9002"
    """ext_proc and gRPC health, for Envoy."""
    health_listen: OptionalAddress = "127.0.0.1:9003"
    """gRPC health alone, for probes. Empty: off."""
    http_listen: OptionalAddress = "127.0.0.1:9090"
    """Control API, `/metrics`, `/healthz`, `/readyz`. Empty: off."""
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Processes that serve ext_proc behind `listen`. 0: one per core (of the CPU set and the container's limit). 1: one process, which does everything,
    and is enough for about 10,000 requests per second; each further one takes a core, 120 MB and its own copy of what is known of the fleet, and a watch on
    every stager. Gateways' connections are spread over them, and Envoy opens one per thread: of more workers than all Envoys together have threads
    (`--concurrency`) some are idle."""
    hash_on: str = "model"
    """What is hashed: `model`, `tenant`, `tenant/model`, `header:NAME` or `header:NAME/model`. A missing header falls back to the model."""
    tenant_header: str = "x-tenant-id"
    """The header that names the tenant."""
    model_header: str = "x-gateway-model-name"
    """The header that names the model where the processing mode shows no body (NONE); a client sets it freely unless something before Envoy does. In the
    other modes the body decides, and the header only chooses the pool of a request whose body names no model."""
    pool_header: str = "x-lora-extproc-pool"
    """The header by which a request that names no model chooses its pool."""
    lists_models: bool = True
    """Answer `GET /v1/models` here, with what the whole fleet serves. Off: an engine answers, with what it was asked for so far."""
    models: Literal["servable", "staged"] = "servable"
    """Which adapters that list shows. `servable`: also those that no node has yet, as far as origins can be listed (`stager.list_s`), since clients that
    look first would never ask for them. `staged`: those that some node has."""
    shows_paths: bool = False
    """Whether a model's `root` in that list is where its files are on the node, as an engine shows it. Off: the model's name."""
    paths: tuple[Annotated[str, AfterValidator(_path)], ...] = tuple(CLIENT_PATHS)
    """The paths that clients may ask for; others are answered 404, and an engine's administration 403. `{id}` stands for one part of a path, `{rest}` for
    all that follows. The default has what vLLM 0.33 and SGLang 0.5 serve to clients; a path of your own is taken for inference with a `model`."""
    cors_allow_origins: tuple[str, ...] = ("*",)
    """Origins whose pages may read what the router answers itself (errors, the list of models); `*`: all, as SGLang does and vLLM did up to 0.31. Empty:
    none, as vLLM does since. What an engine answers is the engine's to allow."""
    balance: Balance = "bounded"
    """Which endpoint serves a request. `bounded`: the copy with the least in flight below `balance_factor`; where there is none, one is made. The others
    are for comparison, and make one copy of an adapter: `maglev` and `hrw` at the key's owner, `random` at each request's, `least_adapters`, `least_latency`
    and `bin_pack` where those rules would put it."""
    balance_factor: Annotated[float, Field(ge=1, le=10)] = 1.25
    """An endpoint takes no more, while another can, from so many times the mean of requests in flight on. Lower: more copies; higher: more uneven."""
    copies: tuple[CopiesSettings, ...] = ()
    """How many copies adapters have, by name. Without: as many as the load makes, and a second of what is hot where engines have room."""
    prefetch: Literal["off", "disk", "engine"] = "off"
    """Whether adapters are brought to their nodes before they are asked for, by how long each was idle before and by what it did at this time yesterday.
    `disk`: to the node's disk, into room that nobody needs. `engine`: those whose idle times repeat also into the engine's memory, where a slot is free.
    Off by default: of five adapters that are brought about two are not asked for in time, and origins may charge for each."""
    prefetch_per_s: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How many nodes are asked for one per second, all together; each has one of this router's in progress at most. Every replica and worker expects the
    same, and a node brings it once."""
    hold_down_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """An endpoint that its source shows no longer is sent nothing more, and keeps its place and what is warm there for so long, should it come back."""
    join_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    """How long an endpoint that has come is given what it will own, at most, before it is sent requests. 0: it is sent them at once."""
    leave_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """How long what is leased on an endpoint that drains is made warm elsewhere and given back, at most."""
    table_size: Annotated[int, AfterValidator(_prime)] = DEFAULT_TABLE_SIZE
    """Slots of the Maglev table; a prime of at least 100 times the endpoints. Equal on every replica."""
    stage_deadline_s: Seconds = 120.0
    """How long a request is held for its adapter before it is answered 503 `staging`; the fetch goes on."""
    timeout_header: str = "x-request-timeout"
    """The header by which a client sets that time for itself: `30`, `30s`, `500ms`, `2m`, `1h`."""
    max_stage_deadline_s: Seconds = 300.0
    """The longest time that a client can set. At most `envoy.hold_s`."""
    hedge_s: Seconds = 3.0
    """After so long without progress of one candidate (or three times the silence that is usual with it, if that is longer) the next is asked beside it."""
    no_endpoint_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """How long a request is held while no endpoint can serve it, as at a start or while the only node restarts; then it is answered 503 `no_endpoint`."""
    heartbeat_s: Seconds = 0.5
    """How often a stager says something, though nothing happens. Silent for twice that: its engine is asked directly. Six times: the stager is lost.
    With over 200 stagers each router stretches it, so that heartbeats take no more than a few percent of a core."""
    no_space_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """How long of that time a request is held while no candidate has room, in case a lease ends; then it is answered 503 `no_space`."""
    max_waiting: Annotated[int, Field(ge=1)] = 20_000
    """Requests that may wait for adapters at once; more are answered 429 `overloaded`."""
    max_waiting_per_adapter: Annotated[int, Field(ge=1)] = 5_000
    """The same for one adapter, so that one slow fetch does not take everybody's place."""
    max_held_bytes: Bytes = 2 * 2**30
    """What the bodies held at once may take together; over it the oldest that are not complete are answered 429 `overloaded`."""
    max_body_bytes: Annotated[int, Field(gt=0, le=MAX_BODY_BYTES)] = 50 * 2**20
    """Larger bodies are answered 413; decoded ones, too. The default takes audio of 25 MB and an inline image of 32 MB. At most 1 GiB."""
    body_deadline_s: Seconds = 30.0
    """A body of which nothing arrives for so long, or that arrives at less than 16 KiB per second after that time, is answered 408 `body_timeout`."""
    judges: Annotated[int, Field(ge=1, le=64)] = 2
    """Processes that read bodies over 1 MiB, compressed ones and forms, so that the event loop need not. Of the whole router: each of its `workers` has its
    part of them, and at least one."""
    prefix_blocks: Annotated[int, Field(ge=0)] = 1_000_000
    """How many blocks of prompts, of 512 bytes and more, are remembered by their hashes, so that among warm copies the one is chosen that computed the
    longest beginning of a prompt before. 50 to 120 bytes each, and 85 MB for 1,000 endpoints; at most 9,600 of one endpoint, which is more than its KV cache
    holds. 0: off, which saves about 8 us of a request with a prompt of 4 KB."""
    session_header: str = "x-session-id"
    """The header that names a client's session, whose requests go to one of the warm copies whatever their prompts are. Empty: off."""
    max_retry_endpoints: Annotated[int, Field(ge=1, le=16)] = 3
    """At most so many endpoints are named in the destination list. For an adapter, only those known to have it."""
    steering: Literal["endpoint", "cluster"] = "endpoint"
    """`endpoint`: the destination header and metadata. `cluster`: also the header below with the pool's name, and the route is chosen anew."""
    cluster_header: str = "x-lora-extproc-cluster"
    """The header that Envoy's `cluster_header` route reads, with steering by cluster."""
    max_streams: Annotated[int, Field(ge=1)] = 10_000
    """Concurrent ext_proc streams per connection; every held request is one."""
    tracing: bool = False
    """Export spans for scan, decide and stage by OTLP/gRPC to `OTEL_EXPORTER_OTLP_ENDPOINT`, below the request's `traceparent`. Needs the extra `otel`."""
    tls: TlsSettings = TlsSettings()
    """TLS on `listen`. The health port is plaintext always."""
    lameduck_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    """After SIGTERM, how long new requests are still taken while health says NOT_SERVING: longer than the gateways' health interval."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    """After that, how long running exchanges may take to finish."""

    conformance: bool = False
    """Pick as the conformance suite of the Gateway API Inference Extension wants its Endpoint Picker to: the client's header `test-epp-endpoint-selection` says
    which endpoints of the first pool may serve, on any path, no body is read, and the answer says who served. Only before the suite's echo servers: not
    allowed beside `base_models`. Off by default, and a client cannot switch it on."""

    @field_validator("hash_on")
    @classmethod
    def _check_hash_on(cls, value: str) -> str:
        try:
            HashOn.parse(value, "")
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{value!r} ")) from None
        return value

    def rules(self, draw: Callable[[int], int]) -> Rules:
        """How endpoints are chosen. `draw`: a number below the one it is given."""
        return Rules(Rule(draw, self.balance, self.balance_factor), [(c.match, c.min, c.max) for c in self.copies])

    def policy(self) -> Policy:
        """What decisions depend on."""
        return Policy(
            hash_on=HashOn.parse(self.hash_on, self.tenant_header),
            model_header=self.model_header.lower(),
            pool_header=self.pool_header.lower(),
            timeout_header=self.timeout_header.lower(),
            session_header=self.session_header.lower(),
            stage_deadline_s=self.stage_deadline_s,
            max_stage_deadline_s=self.max_stage_deadline_s,
            lists_models=self.lists_models,
            for_conformance=self.conformance,
        )

    def steers(self) -> Steering:
        """How gateways are told what was chosen."""
        return Steering(self.cluster_header if self.steering == "cluster" else None, self.max_retry_endpoints, self.conformance)
