"""Settings: one YAML file for all processes, loaded once and checked once. Each process is handed the group it needs.

Unknown keys are errors. Every complaint names its path and the bad value. The text below a field is its documentation: the README's table is
made of it (`lora-extproc settings`).
"""

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .core.choice import Balance, Rule, Rules
from .core.decision import HashOn, Policy
from .core.endpoint import Endpoint
from .core.maglev import DEFAULT_TABLE_SIZE, MAX_TABLE_SIZE, LookupTable, is_prime
from .core.paths import CLIENT_PATHS, is_administration, is_path
from .core.placement import Pool
from .core.steering import Steering
from .errors import ConfigError


def host_port(value: str) -> str:
    """`value` itself. Raises ValueError where it is not host:port."""
    host, _, port = value.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("is not host:port")
    return value


def _optional_address(value: str) -> str:
    return host_port(value) if value else value


def _prime(value: int) -> int:
    if value > MAX_TABLE_SIZE or not is_prime(value):
        raise ValueError(f"is not a prime up to {MAX_TABLE_SIZE}")
    return value


def _addresses(value: str) -> str:
    for address in value.split(","):
        host_port(address.strip())
    return value


def _path(value: str) -> str:
    if not is_path(value):
        raise ValueError("is no path; `{id}` may stand for a part of one, `{rest}` for all that follows")
    if is_administration(value):
        raise ValueError("is an engine's administration, which clients never reach")
    return value


Address = Annotated[str, AfterValidator(host_port)]
Addresses = Annotated[str, AfterValidator(_addresses)]
OptionalAddress = Annotated[str, AfterValidator(_optional_address)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
MAX_BODY_BYTES = 2**30  # a gRPC message, which has a whole body in BUFFERED, states its length in four bytes; Envoy's buffers are the limit before that
Share = Annotated[float, Field(gt=0, le=1)]
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EndpointSettings(Group):
    address: Address
    """`ip:port` of the model server, as Envoy's cluster has it."""
    stager: OptionalAddress = ""
    """`host:port` of the stager that fills this server's directory. Empty: nothing is staged, the server is used for base models only."""
    node: str = ""
    """Name of the machine, for logs and `owner`. Empty: the address."""
    zone: str = ""
    """What fails together with this server: an availability zone, a rack. A copy that is made for the case that another's node dies is made in another zone."""


class FileSourceSettings(Group):
    type: Literal["file"]
    """Endpoints from a file that something else writes: a ConfigMap, a configuration tool, a script."""
    path: str = Field(min_length=1)
    """YAML or JSON: a list of endpoints, or a mapping of pools' names to such lists, of which this pool's counts. An endpoint is `ip:port` or a mapping
    with `address`, `stager`, `node`, `instance`, `zone`, `leaving`. Prefer JSON for a thousand endpoints or more: ten thousand are read in 5 ms, as YAML in a second."""
    poll_s: Seconds = 1.0
    """How often it is looked at. A look is one `stat`, so that every file system will do; the default is what a person who has saved a file waits for."""

    @property
    def label(self) -> str:
        return f"file {self.path}"


class DnsSourceSettings(Group):
    type: Literal["dns"]
    """Endpoints from a name: a headless service, Consul, a zone file."""
    name: str = Field(min_length=1, max_length=253)
    """The name that is looked up. Without a dot at its end the search domains of `/etc/resolv.conf` apply."""
    record: Literal["A", "AAAA", "SRV"] = "A"
    """Which records are read. SRV has names and ports of its own; of several priorities the most preferred one counts, weights do not."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The model servers' port, with A and AAAA. SRV says it itself."""
    stager_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port of the stager at each of the addresses. 0: nothing is staged there."""
    servers: tuple[Address, ...] = ()
    """Name servers, as `ip:port`. Empty: those of `/etc/resolv.conf`."""
    min_ttl_s: Seconds = 1.0
    """A name is looked up again when its TTL is over, but not sooner: many servers state 0."""
    max_ttl_s: Seconds = 30.0
    """And not later: a new endpoint is found within this time whatever the zone states. The default is what CoreDNS states for services."""
    timeout_s: Seconds = 5.0
    """How long one look-up may take, all name servers together."""

    @field_validator("servers")
    @classmethod
    def _check_servers(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            try:
                ip_address(value.rpartition(":")[0].strip("[]"))
            except ValueError:
                raise ValueError(f"{value!r} is no ip:port: a name server's own name would need a name server") from None
        return values

    @model_validator(mode="after")
    def _check(self) -> "DnsSourceSettings":
        if (self.record == "SRV") == bool(self.port):
            raise ValueError(f"record {self.record} needs {'no port: the records say it' if self.record == 'SRV' else 'port'}")
        if self.min_ttl_s > self.max_ttl_s:
            raise ValueError(f"min_ttl_s {self.min_ttl_s:g} is above max_ttl_s ({self.max_ttl_s:g})")
        return self

    @property
    def label(self) -> str:
        return f"dns {self.record} {self.name}" + (f":{self.port}" if self.port else "")


class EtcdSourceSettings(Group):
    type: Literal["etcd"]
    """Endpoints from the keys below a prefix, one endpoint each, as nodes register themselves with a lease."""
    endpoints: tuple[str, ...] = Field(min_length=1)
    """The members' client URLs, `http://host:2379`. The first that answers is used; the next when it fails or hangs."""
    prefix: str = Field(min_length=1)
    """Keys that begin with it belong to this pool. Ends with `/`. A value is JSON: `ip:port` in quotes or the mapping that a file has."""
    username: str = ""
    """The user, where the cluster has authentication on. Empty: none."""
    password_env: str = ""
    """The environment variable that holds the password."""
    password_file: str = ""
    """A file that holds it; read anew for each login, so that it may be rotated."""
    ca_file: str = ""
    """The certificates that `https` members must be signed by, PEM. Empty: the system's."""
    cert_file: str = ""
    """Our certificate for `https` members that want one, PEM."""
    key_file: str = ""
    """Its key, PEM."""
    timeout_s: Seconds = 5.0
    """How long a member may take to answer. While nothing changes it is asked this often whether it still does, since one that hangs keeps its connections."""

    @field_validator("endpoints")
    @classmethod
    def _check_endpoints(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            scheme, _, rest = value.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest.rstrip("/") or "@" in rest:
                raise ValueError(f"{value.rpartition('@')[2]!r} is no URL as http://host:2379")
        return values

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, value: str) -> str:
        if not value.endswith("/"):
            raise ValueError(f"does not end with '/': a key of {value + '2'!r} would belong to it, too")
        return value

    @model_validator(mode="after")
    def _check(self) -> "EtcdSourceSettings":
        if bool(self.username) != bool(self.password_env or self.password_file):
            raise ValueError("username needs password_env or password_file, and they need username")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file need each other")
        return self

    @property
    def label(self) -> str:
        return f"etcd {self.prefix}"


class KubernetesSourceSettings(Group):
    type: Literal["kubernetes"]
    """Endpoints from the Kubernetes API: the ready pods of an InferencePool, of a Service or of a label selector. One of the three is set. A pod that
    terminates is shown as leaving while it is ready."""
    inference_pool: Annotated[str, Field(max_length=253)] = ""
    """The name of an InferencePool (inference.networking.k8s.io/v1). Its selector says the pods, each of its `targetPorts` is an endpoint of each pod, as
    data-parallel ranks are."""
    service: Annotated[str, Field(max_length=63)] = ""
    """The name of a Service, whose EndpointSlices are followed. Where they have both families, the IPv4 addresses count."""
    selector: Annotated[str, Field(max_length=4096)] = ""
    """Labels of pods as kubectl's `-l` takes them, `app=vllm,tier!=test`."""
    namespace: Annotated[str, Field(max_length=63)] = ""
    """Where those are. Empty: the namespace of the pod that asks, or of the kubeconfig's context."""
    ports: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(max_length=8)] = ()
    """With `selector`: the model servers' ports in each pod, several for data-parallel ranks. An InferencePool says them itself."""
    port_names: Annotated[tuple[str, ...], Field(max_length=8)] = ()
    """With `service`: the names of its ports that lead to model servers, several for data-parallel ranks. Empty: its only port."""
    stager_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port of the stager in each pod. Of several data-parallel ranks each has a stager and a directory of its own: the first one's on this port, the next
    one's on the next, since an adapter is loaded into each. A pod's annotation `lora-extproc/stager-port` counts before it; EndpointSlices have none. 0:
    nothing is staged."""
    kubeconfig: str = ""
    """A kubeconfig file, for a process outside the cluster. Empty: the service account of its pod."""
    timeout_s: Seconds = 10.0
    """How long the API server may take to answer, or to begin a watch."""
    watch_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """About how long a watch lasts before it is resumed. A watch whose packets are dropped looks as one where nothing happens, so this is about the longest
    time for which a change can be missed."""

    @field_validator("inference_pool", "service", "namespace")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value and not _KUBERNETES_NAME.fullmatch(value):
            raise ValueError("is no name of Kubernetes: small letters, digits, '-' and '.'")
        return value

    @model_validator(mode="after")
    def _check(self) -> "KubernetesSourceSettings":
        if sum(map(bool, (self.inference_pool, self.service, self.selector))) != 1:
            raise ValueError("one of inference_pool, service and selector is needed, and no second one")
        if bool(self.ports) != bool(self.selector):
            raise ValueError("selector needs ports, the model servers' in each pod; an InferencePool or a Service says its own")
        if self.port_names and not self.service:
            raise ValueError("port_names belongs to service")
        return self

    @property
    def label(self) -> str:
        kind, name = next((kind, name) for kind in ("inference_pool", "service", "selector") if (name := getattr(self, kind)))
        return f"kubernetes {kind} {self.namespace}{'/' if self.namespace else ''}{name}"


SourceSettings = Annotated[FileSourceSettings | DnsSourceSettings | EtcdSourceSettings | KubernetesSourceSettings, Field(discriminator="type")]


class PoolSettings(Group):
    name: str = Field(min_length=1)
    """Name of the pool and of its Envoy cluster."""
    base_models: tuple[str, ...] = ()
    """Model names that are the base model itself: passed through, nothing is staged."""
    adapters: tuple[str, ...] = ("*",)
    """Shell patterns of the adapter names that run on this pool; the first pool that matches wins."""
    paths: tuple[str, ...] = ()
    """Shell patterns of paths whose requests come here where they name no model, as `GET /v1/responses/ID`. Those that match nowhere go to the first pool."""
    endpoints: tuple[EndpointSettings, ...] = ()
    """The model servers of this pool that are always there."""
    discovery: tuple[SourceSettings, ...] = ()
    """Where routers find more of them while they run, and stagers their peers. Several sources are added up by address; what a later one says of an endpoint
    counts before what an earlier one says."""
    role: Literal["both", "decode", "prefill"] = "both"
    """`decode`: before each engine stands a sidecar that has prompts computed elsewhere, as llm-d's and Dynamo's do: by an engine of the pool of role `prefill`
    that has one of the same `base_models`. A request goes on when both engines have its adapter, and names the other in `x-prefiller-host-port` and
    `x-llm-d-prefiller-host-port`; where no engine of that pool can have the adapter, the decoding one computes the prompt itself. A pool of role `prefill` is
    sent nothing else, and is no Envoy cluster."""

    @field_validator("discovery")
    @classmethod
    def _check_discovery(cls, values: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        labels = [source.label for source in values]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"source {repeated[0]!r} appears more than once")
        return values

    def members(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(e.address, e.node or e.address, e.stager, zone=e.zone) for e in self.endpoints)


class DiscoverySettings(Group):
    dir: str = ""
    """A directory of this process's own, a router's or a stager's, where the last good endpoints are kept, so that a start while a source is down has them.
    Empty: in memory only."""
    keep_failed_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 86_400.0
    """How long the last good endpoints of a source count while it fails; a restart included, with `dir`. A day, since an endpoint that has
    gone is noticed without discovery, and one that has not should serve on. 0: not at all."""
    keep_empty_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """The same while it answers that there are none, as a source does that has lost its data or is being filled; then it is believed. Believed at once where
    all were leaving. Five minutes outlast a restart of DNS, etcd or what writes a file. 0: believed at once."""
    debounce_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """A change is taken over after so long without another one, so that a rollout's many changes are few new tables. 0: at once."""
    debounce_max_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """But at the latest after this time, however often something changes."""
    first_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """How long a router's start waits for sources that have not answered and of which nothing is kept; then it serves with the endpoints that are known. A
    stager's start does not wait."""

    @model_validator(mode="after")
    def _check(self) -> "DiscoverySettings":
        if self.debounce_s > self.debounce_max_s:
            raise ValueError(f"debounce_s {self.debounce_s:g} is above debounce_max_s ({self.debounce_max_s:g})")
        return self


class TlsSettings(Group):
    mode: Literal["off", "files", "self-signed"] = "off"
    """`off`: plaintext HTTP/2. `files`: the pair below. `self-signed`: made at start, for gateways that encrypt without verifying."""
    cert_file: str = ""
    """PEM chain, with `files`. Read again when it changes."""
    key_file: str = ""
    """PEM key, with `files`."""
    client_ca_file: str = ""
    """PEM certificates that clients must be signed by. Empty: clients show none."""

    @model_validator(mode="after")
    def _check_files(self) -> "TlsSettings":
        if self.mode == "files" and not (self.cert_file and self.key_file):
            raise ValueError("mode files needs cert_file and key_file")
        return self


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


class OriginSettings(Group):
    """Where artifacts come from. `type` decides which of the others count."""

    type: Literal["file", "huggingface", "s3", "http"]
    """`file`, `huggingface`, `s3` or `http`. Origins are asked in the configured order, and the files of two are never mixed."""
    name: str = ""
    """What logs and metrics call it. Empty: its type. Needed where two origins have the same type."""
    path: str = ""
    """file: the directory that holds one directory per adapter."""
    in_place: bool = False
    """file: read where they are instead of copied: for a file system as fast as the node's own. They take nothing of `stager.max_bytes`."""
    url: str = ""
    """http: the base address, `URL/<adapter>/<file>`. huggingface: the hub's address; empty = `HF_ENDPOINT` or the public hub."""
    bucket: str = ""
    """s3: the bucket."""
    prefix: str = ""
    """s3: what stands before `<adapter>/<file>` in the keys."""
    endpoint: str = ""
    """s3: the server's address, for S3-compatible stores. Empty: AWS."""
    region: str = ""
    """s3: the region. Empty: from the environment."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """s3: the bucket in the path or in the host name. `auto`: path with an `endpoint`, as AWS wants it without."""
    anonymous: bool = False
    """s3: send no credentials. Otherwise the usual chain of environment, files and instance role, refreshed before they end."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    """s3, http, huggingface: how many ranges of a large file are read at once."""
    parallel_above_bytes: Bytes = 256 * 2**20
    """Smaller files are read by one request."""
    token_env: str = ""
    """huggingface, http: the environment variable that holds the bearer token. Empty: `HF_TOKEN` for huggingface, none for http."""
    token_file: str = ""
    """huggingface, http: a file that holds the token; read anew for each adapter, so that it may be rotated."""
    adapter_token_env: dict[str, str] = {}
    """huggingface, http: shell pattern of adapter names -> the environment variable with the token for those. The first that matches wins."""
    username: str = ""
    """http: the user of basic authentication; its password is the token."""
    allow_private: bool = False
    """http: whether addresses that are private, loopback or link-local may be asked. Refused by default, redirects included."""
    archives: bool = True
    """Where there is no `<adapter>/` directory, look for `<adapter>.tar`, `.tar.gz`, `.tgz` and `.zip`, and unpack it."""
    listed: bool = True
    """file, s3: whether `GET /v1/models` may show what it has and no node has yet. Off where its names are not for every client; they are served all the
    same. A hub and a plain web server cannot be listed: of what they have, that list shows only what is staged."""
    max_fetches: Annotated[int, Field(ge=1)] = 8
    """How many files are fetched from it at once; requests go before refreshes, those before prefetches."""
    max_bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """What may be fetched from it per second, in bytes; the hub's Xet transfers are not slowed. 0: no limit."""
    timeout_s: Seconds = 30.0
    """How long a connection, a silent transfer or a look into a directory is waited for."""
    min_bytes_per_s: Annotated[int, Field(ge=0)] = 8192
    """A transfer that brings less, measured over 30 s of waiting for it, is broken off, and given up after three attempts: it would hold one of
    `max_fetches` for as long as it trickles. At 8 KiB/s not even a small adapter of 16 MiB arrives within `fetch_timeout_s`. 0: however slow."""
    mirror_of: str = ""
    """The name of an earlier origin that has the same adapters under the same names: while that one fails or refuses, this one is asked in its place.
    Empty: none. A name belongs to the first origin that has it or, being down, could have it; what a later one has under that name is somebody else's."""
    missing_is_403: bool = False
    """http, s3: the store answers 403 for what it has not got, as S3 and CloudFront do where listing is not permitted. Then 403 for a name means that
    it is not there; wrong credentials look the same, which is why this is off by default."""
    links_outside: bool = False
    """file: whether links below `path` may lead out of it. Refused by default: who may write one adapter could have any file of this machine read."""

    @model_validator(mode="after")
    def _check_needed(self) -> "OriginSettings":
        needed = {"file": "path", "s3": "bucket", "http": "url"}.get(self.type)
        if needed and not getattr(self, needed):
            raise ValueError(f"an origin of type {self.type} needs {needed}")
        return self

    @property
    def label(self) -> str:
        return self.name or self.type


class PeerSettings(Group):
    mode: Literal["off", "on", "preferred"] = "on"
    """`on`: what an origin has is first looked for on the other stagers, and theirs is taken while every origin is down. `preferred`: they are
    asked before any origin. `off`: never, and the stager follows no source of endpoints."""
    addresses: tuple[Address, ...] = ()
    """The other stagers; sources of endpoints are then not followed. Empty: those of the endpoints that `pools` name or that `pools[].discovery` finds: in the
    pools where this stager's own address is, or in all where it is in none. With sources of type `kubernetes` the stager's pod needs the rights of
    `deploy/kubernetes/rbac`; without them adapters come from their origins alone."""
    max_asked: Annotated[int, Field(ge=1)] = 32
    """How many of them are asked for one adapter."""
    ask_timeout_s: Seconds = 1.0
    """Who has not answered by then has not got it."""
    max_bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """What this node sends to others per second, in bytes. 0: no limit."""
    max_reads: Annotated[int, Field(ge=1)] = 4
    """How many files it sends at once; who asks for more takes another peer or the origin."""


class EngineSettings(Group):
    url: str = "http://127.0.0.1:8000"
    """The local model server. It is asked to forget an adapter before its files go; while it cannot be asked, nothing is evicted. Empty: no
    engine reads this directory."""
    kind: Literal["vllm", "sglang"] = "vllm"
    """Whose HTTP API it speaks."""
    mode: Literal["api", "resolver"] = "api"
    """`api`: adapters are loaded into the engine before a request is released, so that one which it refuses is a 422. `resolver`: vLLM's
    filesystem resolver loads them when a request has come. SGLang knows only `api`."""
    base_model: str = ""
    """The engine's `--model`, which adapters must name in `base_model_name_or_path`. Empty: not checked."""
    base_names: tuple[str, ...] = ()
    """Other names of the same base model that adapters may use; shell patterns. With `resolver`, such an adapter is changed in a copy to name
    `base_model`, since vLLM compares byte for byte."""
    base_config: str = ""
    """The base model's `config.json`, whose sizes the adapters' tensors are compared with. Empty: that in the directory which the engine names as
    its model's root, if this process can read it."""
    max_loras: Annotated[int, Field(ge=0)] = 0
    """The engine's `--max-loras`. 0: what it says itself, once an adapter has run."""
    max_cpu_loras: Annotated[int, Field(ge=0)] = 0
    """The engine's `--max-cpu-loras`: routers send a node no more distinct adapters than that, while another candidate has room. 0: as `max_loras`
    in the settings; if that is 0 too, no limit."""
    max_lora_rank: Annotated[int, Field(ge=0)] = 0
    """The engine's `--max-lora-rank`: adapters of a higher rank are refused before their weights are fetched. 0: what it says itself, if it does."""
    max_loads: Annotated[int, Field(ge=1)] = 1
    """How many adapters are loaded into it at once: a load stalls what it generates."""
    api_key_env: str = ""
    """The environment variable that holds the engine's API key."""
    api_key_file: str = ""
    """A file that holds it; read anew for each call, so that it may be rotated."""
    timeout_s: Seconds = 10.0
    """How long one call to the engine may take."""
    health_timeout_s: Seconds = 1.0
    """How long its `/health` may take, which is asked every second. After that the node is not ready: one that hangs would hold all its requests."""
    load_timeout_s: Seconds = 60.0
    """How long one load may take."""
    quiet_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """How long a flight that needs room waits for the engine to be done with an adapter that could go. 0: not at all."""

    @model_validator(mode="after")
    def _check_mode(self) -> "EngineSettings":
        if self.kind == "sglang" and self.mode == "resolver":
            raise ValueError("mode resolver is vLLM's; kind sglang needs mode api")
        if self.base_names and not self.base_model:
            raise ValueError("base_names are other names of base_model, which is empty")
        return self


class VerifySettings(Group):
    finite: bool = True
    """Refuse weights that hold infinities or NaNs: every byte is read once more, beside the transfer. One such adapter can spoil the answers of others that
    the engine runs next. false: not looked at, for adapters of a trusted pipeline on a node whose processor is the limit."""


class StagerPrefetchSettings(Group):
    at_once: Annotated[int, Field(ge=1, le=64)] = 1
    """How many adapters are brought at the same time that nobody has asked for yet (`router.prefetch`). None is while a request's flight is in progress."""
    max_bytes_per_s: Annotated[int, Field(ge=0)] = 64 * 2**20
    """How many bytes of them are brought per second, on average: after each one the next waits until that is true. The default is half of a 1 GbE link, which
    other nodes and other users of the origin need as well. 0: no limit."""


class StagerSettings(Group):
    listen: Address = "127.0.0.1:9102"
    """gRPC for routers and the command line."""
    http_listen: OptionalAddress = "127.0.0.1:9190"
    """Control API, `/metrics`, `/healthz`, `/readyz`. Empty: off."""
    dir: str = "/var/lib/lora-extproc"
    """The node's NVMe directory; the engine's `VLLM_LORA_RESOLVER_CACHE_DIR`."""
    max_bytes: Bytes = 100 * 2**30
    """What the artifacts may take on disk. Least recently used ones that nobody holds go first."""
    high_watermark: Share = 0.95
    """Over this part of `max_bytes`, eviction starts in the background, so that the next request need not wait for it. 1: only when needed."""
    low_watermark: Share = 0.9
    """And ends at this part."""
    free_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """This part of the file system is left free: where others fill it, or it is smaller than `max_bytes`, eviction counts what is really there. The default
    is 10 GB of a terabyte, which others need some seconds to write, and the file system is looked at every second. 0: nothing is left free."""
    max_adapter_bytes: Bytes = 8 * 2**30
    """A larger adapter is refused; so is an archive that unpacks to more."""
    max_file_bytes: Bytes = 8 * 2**30
    """A larger file is refused."""
    unknown_size_bytes: Bytes = 512 * 2**20
    """Reserved for a file whose origin does not say its size, and the most that it may then have."""
    lease_s: Seconds = 300.0
    """How long a router may rely on an answer without asking again. Within it the adapter is not evicted."""
    claim_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """After its start nothing that was on disk before is removed or unloaded for so long: routers say meanwhile what they rely on. 0: not at all."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    """After SIGTERM, how long the node is drained before the stager stops: it ends sooner once nobody leases anything and the engine works on nothing, or is
    gone. Below Kubernetes' default grace of 30 s. 0: it stops at once, for a stager that is replaced while its engine goes on: what is leased stays."""
    negative_ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """How long \"no origin has it\", \"its origin forbids it\" and \"it is no valid adapter\" are answered without asking an origin again. 0: not at all."""
    refusal_ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3600.0
    """How long an invalid adapter is not fetched again while its origin states the same revision. An hour, since the same bytes are refused the same
    way; a new revision, another engine or a purge is looked at without waiting. 0: not at all."""
    list_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    """How old a listing of the origins may be when a router asks what could be served; an older one is made anew, in the background. At most 100,000
    names of each origin are kept. 0: origins are not listed. The default costs one S3 listing a minute while lists are asked for, and one when
    a router starts."""
    revalidate_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """An adapter in use is compared with its origin after this time, in the background; a new version replaces it. 0: never by itself."""
    adopt: bool = True
    """Whether complete adapters that others put into `dir` (`<dir>/<adapter>/adapter_config.json` and weights) are served, and those elsewhere that a
    link of theirs leads to. The engine must see these under the same path."""
    evict_adopted: bool = False
    """Whether those may be deleted for room, too. Otherwise they count as used, and stay."""
    scan_s: Seconds = 10.0
    """How often `dir` is looked through for them; less often where a look takes over a hundredth of that time. Files must have rested that long before they
    count as complete."""
    digests: dict[str, str] = {}
    """Adapter name -> SHA-256 of its weights file, in hex. Anything else under that name is refused."""
    fetch_timeout_s: Seconds = 1800.0
    """A flight that takes longer is given up."""
    allow_pickle: bool = False
    """Accept `.bin` weights. They can run code in the engine when loaded."""
    verify: VerifySettings = VerifySettings()
    """What is checked of an adapter beyond what its engine would refuse."""
    origins: tuple[OriginSettings, ...] = ()
    """Where adapters are looked for, in this order. The first that has a name has it for good; one that fails is passed over for its mirrors only."""
    peers: PeerSettings = PeerSettings()
    """Copies from other nodes."""
    prefetch: StagerPrefetchSettings = StagerPrefetchSettings()
    """What routers have brought before it is asked for."""
    engine: EngineSettings = EngineSettings()
    """The model server on this node."""

    @model_validator(mode="after")
    def _check(self) -> "StagerSettings":
        if self.low_watermark > self.high_watermark:
            raise ValueError(f"low_watermark {self.low_watermark:g} is above high_watermark ({self.high_watermark:g})")
        labels = [origin.label for origin in self.origins]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"origins: two are called {repeated[0]!r}; give them names")
        for number, origin in enumerate(self.origins):
            if origin.mirror_of and origin.mirror_of not in labels[:number]:
                raise ValueError(f"origins.{number}.mirror_of: {origin.mirror_of!r} is no earlier origin")
        for name, digest in self.digests.items():
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise ValueError(f"digests.{name}: {digest!r} is no SHA-256 in lower-case hex")
        return self


class RpcSettings(Group):
    """What router, stagers and command line show each other. Without any of it, nothing destructive is done for callers beyond loopback."""

    token_env: str = ""
    """The environment variable that holds the token all of them share."""
    token_file: str = ""
    """A file that holds it; read again when it changes."""
    token_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """How long after a change of `token_file` stagers still accept the token before."""
    cert_file: str = ""
    """Mutual TLS: this process's certificate chain, PEM. All three files are read again when they change."""
    key_file: str = ""
    """Mutual TLS: its key, PEM."""
    ca_file: str = ""
    """Mutual TLS: the certificates that the other side's must be signed by, PEM."""
    server_name: str = ""
    """Mutual TLS: the name in the stagers' certificates, where it is not the one they are called by."""

    @model_validator(mode="after")
    def _check_files(self) -> "RpcSettings":
        given = [bool(value) for value in (self.cert_file, self.key_file, self.ca_file)]
        if any(given) and not all(given):
            raise ValueError("mutual TLS needs cert_file, key_file and ca_file")
        return self


class EnvoySettings(Group):
    listen: Address = "127.0.0.1:10000"
    """Where clients come in."""
    admin: OptionalAddress = "127.0.0.1:9901"
    """Envoy's own administration. Empty: off."""
    router: Addresses = "127.0.0.1:9002"
    """The router, as Envoy reaches it; several replicas separated by commas, or a name that has all their addresses."""
    endpoints: Literal["xds", "static"] = "xds"
    """How Envoy learns of pools and their endpoints. `xds`: from the router, which serves CDS and EDS on `router.listen`; Envoy follows the fleet without a
    restart, and goes on with what it has while no router answers. `static`: they are written into its configuration, and the router serves no xDS. The
    default suits a fleet that moves, and one that does not loses nothing: without a router Envoy sends nothing anywhere in either case."""
    router_ca_file: str = ""
    """With `router.tls`: the certificates that Envoy verifies the router's by. Empty: it encrypts without verifying."""
    router_health_interval_s: Seconds = 1.0
    """How often Envoy asks each router replica's gRPC health. Below `router.lameduck_s`, so that a replica can leave without losing a request."""
    processing_mode: Literal["FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"] = "FULL_DUPLEX_STREAMED"
    """How Envoy shows bodies. FULL_DUPLEX_STREAMED holds without a timer and without a limit of Envoy's own; BUFFERED and NONE have both."""
    hold_s: Seconds = 300.0
    """The longest a request may be held; Envoy's timers are set above it. At least `router.max_stage_deadline_s`."""
    silence_s: Seconds = 900.0
    """The longest that an engine may say nothing while it generates: the whole of an answer that is not streamed. Then Envoy answers 504."""
    health_interval_s: Seconds = 2.0
    """How often Envoy asks each model server's `/health`."""
    connect_timeout_s: Seconds = 1.0
    """After this, the next endpoint of the list is tried."""


class LogSettings(Group):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """One line per exchange at debug, one per stage at info."""
    format: Literal["text", "json"] = "text"
    """`json`: one object per line, with `request_id`, `adapter`, `owner`, `outcome` and `reason` of their own."""


class Settings(Group):
    pools: tuple[PoolSettings, ...] = ()
    """The pools, in the order in which an adapter's name is matched."""
    discovery: DiscoverySettings = DiscoverySettings()
    """What is made of the endpoints that `pools[].discovery` finds."""
    router: RouterSettings = RouterSettings()
    """The ext_proc service."""
    stager: StagerSettings = StagerSettings()
    """The process on each node."""
    envoy: EnvoySettings = EnvoySettings()
    """What `lora-extproc envoy-config` renders."""
    rpc: RpcSettings = RpcSettings()
    """Credentials between router, stagers and command line."""
    log: LogSettings = LogSettings()
    """Logging of every process."""

    def clusters(self) -> tuple[PoolSettings, ...]:
        """The pools that Envoy sends requests to."""
        return tuple(pool for pool in self.pools if pool.role != "prefill")

    def prefill_of(self, pool: PoolSettings) -> PoolSettings:
        """The pool that computes the prompts of one of role `decode`. Raises ValueError if there is not exactly one."""
        found = [p for p in self.pools if p.role == "prefill" and not set(p.base_models).isdisjoint(pool.base_models)]
        if len(found) != 1:
            many = f"{len(found)} pools" if found else "no pool"
            raise ValueError(f"pools: {pool.name!r} has role decode, and {many} of role prefill with one of its base_models; exactly one is needed")
        return found[0]

    @model_validator(mode="after")
    def _check_pools(self) -> "Settings":
        for what, values in (
            ("name", [p.name for p in self.pools]),
            ("endpoint", [e.address for p in self.pools for e in p.endpoints]),
            ("base model", [b for p in self.clusters() for b in p.base_models]),
        ):
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"pools: {what} {repeated[0]!r} appears more than once")
        for name in ("stage_deadline_s", "max_stage_deadline_s"):
            longest = getattr(self.router, name)
            if self.envoy.hold_s < longest:
                raise ValueError(f"envoy.hold_s: {self.envoy.hold_s:g} is below router.{name} ({longest:g})")
        for pool in self.pools:
            if pool.role == "decode":
                self.prefill_of(pool)
            if pool.base_models and self.router.conformance:
                raise ValueError(f"router.conformance: pool {pool.name!r} serves {pool.base_models[0]!r}, and clients would say who answers; switch one off")
        return self


def load(path: Path) -> Settings:
    """Read and check a settings file. Raises ConfigError with one line per complaint."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return parse({} if raw is None else raw, source=str(path))


def parse(raw: Any, *, source: str) -> Settings:
    """Check settings given as plain values. Raises ConfigError with one line per complaint."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: the settings are not a mapping")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(e, source) for e in error.errors())) from None


def _complaint(error: Any, source: str) -> str:
    path = ".".join(str(part) for part in _written(error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{source}: {path}: no such setting"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error["input"]
    shown = f" {value!r}" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{source}: {path + ':' if path else ''}{shown} {message}".replace("  ", " ")


def _written(loc: tuple[str | int, ...]) -> Iterator[str | int]:
    """The path as the file has it: pydantic adds the type of a source behind its number."""
    for at, part in enumerate(loc):
        if not (at >= 2 and loc[at - 2] == "discovery" and isinstance(loc[at - 1], int)):
            yield part


def build_pools(settings: Settings) -> tuple[Pool, ...]:
    """The pools with their tables filled."""
    size, by_weight = settings.router.table_size, settings.router.balance == "hrw"
    pools = []
    for p in sorted(settings.pools, key=lambda p: p.role == "prefill"):  # requests that nothing assigns to a pool go to the first
        table = LookupTable(p.members(), size)
        if p.role == "prefill":
            pools.append(Pool(p.name, frozenset(), (), table, (), by_weight, is_prefill=True))
        else:
            prefill = settings.prefill_of(p).name if p.role == "decode" else ""
            pools.append(Pool(p.name, frozenset(p.base_models), p.adapters, table, p.paths, by_weight, prefill))
    return tuple(pools)


def settings_table() -> str:
    """Every setting as a Markdown table."""
    rows = [f"| `{path}` | `{default}` | {meaning} |" for path, default, meaning in reference()]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def reference(group: type[Group] = Settings, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Every setting as (path, default, meaning), in the order of the file."""
    for name, field in group.model_fields.items():
        annotation = field.annotation
        here = f"{path}.{name}" if path else name
        if isinstance(annotation, type) and issubclass(annotation, Group):
            yield from reference(annotation, here)
        elif inner := [a for a in _parts(annotation) if isinstance(a, type) and issubclass(a, Group)]:
            for one in inner:
                yield from reference(one, f"{here}[]" if len(inner) == 1 else f"{here}[{get_args(one.model_fields['type'].annotation)[0]}]")
        else:
            default = "required" if field.is_required() else yaml.safe_dump(_plain(field.default), default_flow_style=True, width=10_000).split("\n")[0]
            yield here, default, " ".join((field.description or "").split())


def _parts(annotation: Any) -> Iterator[Any]:
    """What a type is made of, to the innermost: a tuple's members, a union's alternatives."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _parts(part)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
