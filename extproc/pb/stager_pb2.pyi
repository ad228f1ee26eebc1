from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnsureRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class EnsureReply(_message.Message):
    __slots__ = ("digest", "staged", "origin", "lease_seconds", "waited_seconds", "bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    staged: bool
    origin: str
    lease_seconds: float
    waited_seconds: float
    bytes: int
    def __init__(self, digest: _Optional[str] = ..., staged: _Optional[bool] = ..., origin: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., waited_seconds: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "bytes", "origin", "revision", "idle_seconds", "leased_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    bytes: int
    origin: str
    revision: str
    idle_seconds: float
    leased_seconds: float
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., origin: _Optional[str] = ..., revision: _Optional[str] = ..., idle_seconds: _Optional[float] = ..., leased_seconds: _Optional[float] = ...) -> None: ...

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

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeState(_message.Message):
    __slots__ = ("ready", "why", "instance")
    READY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    why: str
    instance: str
    def __init__(self, ready: _Optional[bool] = ..., why: _Optional[str] = ..., instance: _Optional[str] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("node", "published", "evicted")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    node: NodeState
    published: str
    evicted: str
    def __init__(self, node: _Optional[_Union[NodeState, _Mapping]] = ..., published: _Optional[str] = ..., evicted: _Optional[str] = ...) -> None: ...
