"""All settings, and what has to hold between several groups of them."""

from typing import Literal

from pydantic import model_validator

from ..core.maglev import LookupTable
from ..core.placement import Pool
from .credentials import RpcSettings
from .discovery import DiscoverySettings
from .envoy import EnvoySettings
from .pools import PoolSettings
from .router import RouterSettings
from .stager import StagerSettings
from .values import Group


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
