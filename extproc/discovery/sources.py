"""The sources that the settings name. Each module is imported when a pool has a source of its kind: none of them is needed without."""

from collections.abc import Iterable

from ..config.discovery import DnsSourceSettings, EtcdSourceSettings, FileSourceSettings, KubernetesSourceSettings, SourceSettings
from ..config.pools import PoolSettings
from .source import Source
from .static import StaticSource


def build_sources(pools: Iterable[PoolSettings]) -> dict[str, tuple[Source, ...]]:
    """Each pool's sources, by its name. The settings' own endpoints come first, so that what is found adds to them."""
    built: dict[str, tuple[Source, ...]] = {}
    for pool in pools:
        found = tuple(_build(settings, pool.name) for settings in pool.discovery)
        built[pool.name] = (StaticSource(pool.endpoints), *found) if pool.endpoints or not found else found
    return built


def _build(settings: SourceSettings, pool: str) -> Source:
    match settings:
        case FileSourceSettings():
            from .file import FileSource

            return FileSource(settings, pool)
        case DnsSourceSettings():
            from .dns import DnsSource

            return DnsSource(settings)
        case EtcdSourceSettings():
            from .etcd import EtcdSource

            return EtcdSource(settings)
        case KubernetesSourceSettings():
            from .kubernetes import KubernetesSource

            return KubernetesSource(settings)
