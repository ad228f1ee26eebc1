"""The process on each node: its disk, its origins and peers, what it checks, and the engine beside it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .origins import OriginSettings
from .values import Address, Bytes, Group, OptionalAddress, Seconds, Share


class PeerSettings(Group):
    mode: Literal["off", "on", "preferred"] = "on"
    """`on`: what an origin has is first looked for on the other stagers, and theirs is taken while every origin is down. `preferred`: they are
    asked before any origin. `off`: never, and the stager follows no source of endpoints."""
    addresses: tuple[Address, ...] = ()
    """The other stagers; sources of endpoints are then not followed. Empty: those of the endpoints that `pools` name or that `pools[].discovery` finds: in the
    pools where this stager's own address is, or in all where it is in none. With sources of type `kubernetes` the stager's pod needs the rights of
    `deploy/kubernetes/rbac`; without them adapters come from their origins alone."""
    max_asked: Annotated[int, Field(ge=1)] = 32
    """How many of them are asked for one adapter: first those where routers put it, as far as these settings have the same endpoints, `router.table_size` and
    `router.balance` as theirs; then others, in an order of the adapter's own."""
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
