"""Where endpoints are found, kind by kind of source, and what is made of what the sources show."""

import re
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .values import Address, Group, Seconds

_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class _Source(Group):
    @property
    def looks_every_s(self) -> float:
        """So much later than another process one may see what has changed; 0: it is told."""
        return 0.0


class FileSourceSettings(_Source):
    type: Literal["file"]
    """Endpoints from a file that something else writes: a ConfigMap, a configuration tool, a script."""
    path: str = Field(min_length=1)
    """YAML or JSON: a list of endpoints, or a mapping of pools' names to such lists, of which this pool's counts. An endpoint is `ip:port` or a mapping
    with `address`, `stager`, `node`, `instance`, `zone`, `leaving`. Prefer JSON for a thousand endpoints or more: ten thousand are read in 5 ms, as YAML in a second,
    and of YAML no more than 2 MiB are read."""
    poll_s: Seconds = 1.0
    """How often it is looked at. A look is one `stat`, so that every file system will do; the default is what a person who has saved a file waits for."""

    @property
    def label(self) -> str:
        return f"file {self.path}"

    @property
    def looks_every_s(self) -> float:
        return self.poll_s


class DnsSourceSettings(_Source):
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
    def looks_every_s(self) -> float:
        return self.max_ttl_s

    @property
    def label(self) -> str:
        return f"dns {self.record} {self.name}" + (f":{self.port}" if self.port else "")


class EtcdSourceSettings(_Source):
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


class KubernetesSourceSettings(_Source):
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
