"""All settings together: the pools that they describe, and what has to hold between groups."""

from typing import Any

import pytest

from extproc.config.pools import EndpointSettings, PoolSettings
from extproc.config.read import parse
from extproc.config.settings import Settings, build_pools
from extproc.core.endpoint import Endpoint

from .test_read import complaint, pool


def test_settings_cannot_be_changed() -> None:
    """They are loaded once and checked once."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().log.level = "debug"


def test_pools_are_built_with_their_tables() -> None:
    """In the configured order, each with the configured size."""
    settings = Settings(
        pools=(
            PoolSettings(name="a", base_models=("base",), adapters=("a/*",), endpoints=(EndpointSettings(address="10.0.0.1:8000"),)),
            PoolSettings(name="b"),
        )
    )
    first, second = build_pools(settings)
    assert (first.name, first.base_models, first.adapters) == ("a", frozenset({"base"}), ("a/*",))
    assert first.table.endpoints == (Endpoint("10.0.0.1:8000"),)
    assert first.table.size == settings.router.table_size
    assert (second.name, second.table.endpoints) == ("b", ())


def of_roles(*roles: str) -> list[dict[str, Any]]:
    """Pools of these roles, in this order, that all have one base model."""
    return [pool(f"{role}-{number}", role=role, base_models=["llama"]) for number, role in enumerate(roles)]


def test_a_decoding_pool_finds_the_one_that_computes_its_prompts() -> None:
    """By the base model. Of the latter no request can be: it has no models, no paths, and does not stand first."""
    settings = parse({"pools": [*of_roles("prefill", "decode"), pool("other")]}, source="it.yaml")
    decode, other, prefill = build_pools(settings)
    assert (decode.prefill, decode.base_models, other.prefill) == ("prefill-0", frozenset({"llama"}), "")
    assert (prefill.name, prefill.is_prefill, prefill.base_models, prefill.adapters, prefill.paths) == ("prefill-0", True, frozenset(), (), ())
    assert [p.name for p in settings.clusters()] == ["decode-1", "other"]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("decode",), "pools: 'decode-0' has role decode, and no pool of role prefill with one of its base_models; exactly one is needed"),
        (("decode", "prefill", "prefill"), "pools: 'decode-0' has role decode, and 2 pools of role prefill with one of its base_models; exactly one is needed"),
        (("decode", "both", "prefill"), "pools: base model 'llama' appears more than once"),
    ],
)
def test_a_decoding_pool_without_exactly_one_that_computes_its_prompts_is_refused(roles: tuple[str, ...], expected: str) -> None:
    """At the start, and not with the first request."""
    assert complaint({"pools": of_roles(*roles)}) == expected


def test_addresses_are_spelled_as_envoy_does() -> None:
    """By which all that is told of them is compared. A host's name stays as it is."""
    spelled = {
        "[FD00:0:0::1]:8000": "[fd00::1]:8000",
        "10.0.0.1:08000": "10.0.0.1:8000",
        "[::ffff:10.0.0.1]:80": "10.0.0.1:80",
        "engine-1:8000": "engine-1:8000",
    }
    pool = PoolSettings(name="a", endpoints=tuple(EndpointSettings(address=address) for address in spelled))
    assert [endpoint.address for endpoint in pool.members()] == list(spelled.values())
