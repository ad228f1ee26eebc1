from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST: _ClassVar[Priority]
    REFRESH: _ClassVar[Priority]
    PREFETCH: _ClassVar[Priority]

class Loading(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_LOADING: _ClassVar[Loading]
    VERSIONED: _ClassVar[Loading]
    PLAIN: _ClassVar[Loading]
REQUEST: Priority
REFRESH: Priority
PREFETCH: Priority
NO_LOADING: Loading
VERSIONED: Loading
PLAIN: Loading

class EnsureRequest(_message.Message):
    __slots__ = ("adapter", "priority", "holder", "sha256", "loading", "keep_seconds")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    priority: Priority
    holder: str
    sha256: str
    loading: Loading
    keep_seconds: float
    def __init__(self, adapter: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ..., holder: _Optional[str] = ..., sha256: _Optional[str] = ..., loading: _Optional[_Union[Loading, str]] = ..., keep_seconds: _Optional[float] = ...) -> None: ...

class EnsureReply(_message.Message):
    __slots__ = ("digest", "staged", "origin", "lease_seconds", "waited_seconds", "bytes", "model", "loaded")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    staged: bool
    origin: str
    lease_seconds: float
    waited_seconds: float
    bytes: int
    model: str
    loaded: bool
    def __init__(self, digest: _Optional[str] = ..., staged: _Optional[bool] = ..., origin: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., waited_seconds: _Optional[float] = ..., bytes: _Optional[int] = ..., model: _Optional[str] = ..., loaded: _Optional[bool] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("phase", "origin", "done_bytes", "total_bytes", "reply")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    phase: str
    origin: str
    done_bytes: int
    total_bytes: int
    reply: EnsureReply
    def __init__(self, phase: _Optional[str] = ..., origin: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., reply: _Optional[_Union[EnsureReply, _Mapping]] = ...) -> None: ...

class ClaimedLease(_message.Message):
    __slots__ = ("adapter", "digest", "loading", "model", "remaining_seconds")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REMAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    digest: str
    loading: Loading
    model: str
    remaining_seconds: float
    def __init__(self, adapter: _Optional[str] = ..., digest: _Optional[str] = ..., loading: _Optional[_Union[Loading, str]] = ..., model: _Optional[str] = ..., remaining_seconds: _Optional[float] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("holder", "leases")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    holder: str
    leases: _containers.RepeatedCompositeFieldContainer[ClaimedLease]
    def __init__(self, holder: _Optional[str] = ..., leases: _Optional[_Iterable[_Union[ClaimedLease, _Mapping]]] = ...) -> None: ...

class ClaimReply(_message.Message):
    __slots__ = ("lease_seconds",)
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, lease_seconds: _Optional[_Iterable[float]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("holder", "adapter", "digest")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    holder: str
    adapter: str
    digest: str
    def __init__(self, holder: _Optional[str] = ..., adapter: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "bytes", "origin", "revision", "idle_seconds", "leased_seconds", "pinned", "checked_seconds", "refresh_error", "adopted", "loaded")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CHECKED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_ERROR_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    bytes: int
    origin: str
    revision: str
    idle_seconds: float
    leased_seconds: float
    pinned: bool
    checked_seconds: float
    refresh_error: str
    adopted: bool
    loaded: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., origin: _Optional[str] = ..., revision: _Optional[str] = ..., idle_seconds: _Optional[float] = ..., leased_seconds: _Optional[float] = ..., pinned: _Optional[bool] = ..., checked_seconds: _Optional[float] = ..., refresh_error: _Optional[str] = ..., adopted: _Optional[bool] = ..., loaded: _Optional[bool] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("adapters", "used_bytes", "reserved_bytes", "max_bytes")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    used_bytes: int
    reserved_bytes: int
    max_bytes: int
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., used_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("adapter", "pinned", "sha256")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    pinned: bool
    sha256: str
    def __init__(self, adapter: _Optional[str] = ..., pinned: _Optional[bool] = ..., sha256: _Optional[str] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class RefreshRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class RefreshReply(_message.Message):
    __slots__ = ("changed", "digest", "revision")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    digest: str
    revision: str
    def __init__(self, changed: _Optional[bool] = ..., digest: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class VerifyResult(_message.Message):
    __slots__ = ("adapter", "digest", "ok", "why", "removed", "bytes")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    digest: str
    ok: bool
    why: str
    removed: bool
    bytes: int
    def __init__(self, adapter: _Optional[str] = ..., digest: _Optional[str] = ..., ok: _Optional[bool] = ..., why: _Optional[str] = ..., removed: _Optional[bool] = ..., bytes: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("instance", "after", "heartbeat_seconds", "copies", "load", "wakes", "holder")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WAKES_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    instance: str
    after: int
    heartbeat_seconds: float
    copies: bool
    load: bool
    wakes: bool
    holder: str
    def __init__(self, instance: _Optional[str] = ..., after: _Optional[int] = ..., heartbeat_seconds: _Optional[float] = ..., copies: _Optional[bool] = ..., load: _Optional[bool] = ..., wakes: _Optional[bool] = ..., holder: _Optional[str] = ...) -> None: ...

class NodeState(_message.Message):
    __slots__ = ("ready", "why", "instance", "resumed", "draining", "heartbeat_seconds", "empty")
    READY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EMPTY_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    why: str
    instance: str
    resumed: bool
    draining: bool
    heartbeat_seconds: float
    empty: bool
    def __init__(self, ready: _Optional[bool] = ..., why: _Optional[str] = ..., instance: _Optional[str] = ..., resumed: _Optional[bool] = ..., draining: _Optional[bool] = ..., heartbeat_seconds: _Optional[float] = ..., empty: _Optional[bool] = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("cold", "warm", "more")
    COLD_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    cold: _containers.RepeatedScalarFieldContainer[str]
    warm: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, cold: _Optional[_Iterable[str]] = ..., warm: _Optional[_Iterable[str]] = ..., more: _Optional[bool] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("running", "waiting", "kv_usage", "slots", "cpu_slots", "age_seconds", "known", "every_seconds", "routers", "others_held")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CPU_SLOTS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    EVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_HELD_FIELD_NUMBER: _ClassVar[int]
    running: float
    waiting: float
    kv_usage: float
    slots: int
    cpu_slots: int
    age_seconds: float
    known: bool
    every_seconds: float
    routers: int
    others_held: int
    def __init__(self, running: _Optional[float] = ..., waiting: _Optional[float] = ..., kv_usage: _Optional[float] = ..., slots: _Optional[int] = ..., cpu_slots: _Optional[int] = ..., age_seconds: _Optional[float] = ..., known: _Optional[bool] = ..., every_seconds: _Optional[float] = ..., routers: _Optional[int] = ..., others_held: _Optional[int] = ...) -> None: ...

class Space(_message.Message):
    __slots__ = ("used_bytes", "reserved_bytes", "max_bytes")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    reserved_bytes: int
    max_bytes: int
    def __init__(self, used_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("adapters", "cpu_slots")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CPU_SLOTS_FIELD_NUMBER: _ClassVar[int]
    adapters: int
    cpu_slots: int
    def __init__(self, adapters: _Optional[int] = ..., cpu_slots: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("node", "published", "evicted", "refreshed", "space", "demand", "heartbeat", "refused", "inventory", "loaded", "unloaded", "load", "woken", "sequence")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REFRESHED_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    UNLOADED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WOKEN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    node: NodeState
    published: str
    evicted: str
    refreshed: str
    space: Space
    demand: Demand
    heartbeat: Heartbeat
    refused: str
    inventory: Inventory
    loaded: str
    unloaded: str
    load: EngineLoad
    woken: str
    sequence: int
    def __init__(self, node: _Optional[_Union[NodeState, _Mapping]] = ..., published: _Optional[str] = ..., evicted: _Optional[str] = ..., refreshed: _Optional[str] = ..., space: _Optional[_Union[Space, _Mapping]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., refused: _Optional[str] = ..., inventory: _Optional[_Union[Inventory, _Mapping]] = ..., loaded: _Optional[str] = ..., unloaded: _Optional[str] = ..., load: _Optional[_Union[EngineLoad, _Mapping]] = ..., woken: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("drain", "why")
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    drain: bool
    why: str
    def __init__(self, drain: _Optional[bool] = ..., why: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("draining", "empty", "leased", "requests")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    EMPTY_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    empty: bool
    leased: int
    requests: float
    def __init__(self, draining: _Optional[bool] = ..., empty: _Optional[bool] = ..., leased: _Optional[int] = ..., requests: _Optional[float] = ...) -> None: ...

class ModelsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "root", "max_model_len")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    root: str
    max_model_len: int
    def __init__(self, id: _Optional[str] = ..., root: _Optional[str] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class ModelsReply(_message.Message):
    __slots__ = ("bases", "adapters", "more", "refused")
    BASES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    bases: _containers.RepeatedCompositeFieldContainer[Model]
    adapters: _containers.RepeatedCompositeFieldContainer[Model]
    more: bool
    refused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bases: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., adapters: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., more: _Optional[bool] = ..., refused: _Optional[_Iterable[str]] = ...) -> None: ...

class CatalogueRequest(_message.Message):
    __slots__ = ("version", "after", "limit")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    version: str
    after: str
    limit: int
    def __init__(self, version: _Optional[str] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class CatalogueReply(_message.Message):
    __slots__ = ("version", "names", "more")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    version: str
    names: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, version: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., more: _Optional[bool] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class ResolveReply(_message.Message):
    __slots__ = ("origin",)
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    origin: str
    def __init__(self, origin: _Optional[str] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("adapter", "revision", "instance")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    revision: str
    instance: str
    def __init__(self, adapter: _Optional[str] = ..., revision: _Optional[str] = ..., instance: _Optional[str] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path", "size", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class FindReply(_message.Message):
    __slots__ = ("instance", "digest", "revision", "origin", "files")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    instance: str
    digest: str
    revision: str
    origin: str
    files: _containers.RepeatedCompositeFieldContainer[File]
    def __init__(self, instance: _Optional[str] = ..., digest: _Optional[str] = ..., revision: _Optional[str] = ..., origin: _Optional[str] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("digest", "path", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    path: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ReadChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
