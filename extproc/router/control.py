"""The router's HTTP control API: health, metrics, who owns a key, who is down. Its OpenAPI page is at /docs."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from ..core.decision import Facts, Forward, ListModels, PassThrough, Policy, Reject, decide
from ..metrics import RouterMetrics
from ..process import control_app
from .membership import Membership


def router_app(metrics: RouterMetrics, membership: Membership, policy: Policy, why_not_ready: Callable[[], str | None]) -> FastAPI:
    """The application behind `router.http_listen`."""
    app = control_app("lora-extproc router", metrics, why_not_ready)

    @app.get("/v1/owner/{model:path}", summary="The candidates of a model, in order, as this router would choose now.")
    async def owner(model: str) -> dict[str, Any]:
        decision = decide(Facts("POST", "/v1/chat/completions", {}, model), membership.snapshot, policy)
        match decision:
            case Reject(error):
                return {"model": model, "error": error.reason, "message": error.message}
            case ListModels():
                raise AssertionError("a POST lists nothing")
            case Forward(pool=pool, key=key, candidates=candidates) | PassThrough(pool=pool, key=key, candidates=candidates):
                return {
                    "model": model,
                    "pool": pool.name,
                    "key": key,
                    "candidates": [{"address": e.address, "node": e.node, "stager": e.stager} for e in candidates],
                }

    @app.get("/v1/endpoints", summary="Every endpoint, and why it is down if it is.")
    async def endpoints() -> list[dict[str, Any]]:
        snapshot = membership.snapshot
        return [
            {"pool": pool.name, "address": e.address, "node": e.node, "stager": e.stager, "down": snapshot.down.get(e.address)}
            for pool in snapshot.pools
            for e in pool.table.endpoints
        ]

    return app
