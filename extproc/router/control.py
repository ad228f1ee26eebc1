"""The router's HTTP control API: health, metrics, who owns a key, who is down. Its OpenAPI page is at /docs."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query

from ..core.decision import Facts, Forward, ListModels, NobodyReady, PassThrough, Reject, decide
from ..core.paths import Kind, Path
from ..core.standing import Standing
from ..process.http import control_app
from .processor import Services

INFERENCE = Path(Kind.INFERENCE, "/v1/chat/completions")


def router_app(services: Services, why_not_ready: Callable[[], str | None]) -> FastAPI:
    """The application behind `router.http_listen`."""
    app = control_app("lora-extproc router", services.metrics, why_not_ready)

    @app.get("/v1/owner/{model:path}", summary="The candidates of a model, in order, as this router would choose now for a request with these headers.")
    async def owner(model: str, header: Annotated[list[str] | None, Query(description="`name: value`, may be repeated")] = None) -> dict[str, Any]:
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in header or ())}
        decision = decide(Facts("POST", INFERENCE, headers, model), services.membership.snapshot, services.policy)
        match decision:
            case Reject(error) | NobodyReady(error):
                return {"model": model, "error": error.reason, "message": error.message}
            case ListModels():
                raise AssertionError("a POST lists nothing")
            case Forward(pool=pool, key=key, candidates=candidates) | PassThrough(pool=pool, key=key, candidates=candidates):
                return {
                    "model": model,
                    "pool": pool.name,
                    "key": key,
                    "candidates": [{"address": e.address, "node": e.node, "stager": e.stager, "zone": e.zone} for e in candidates],
                }

    @app.get("/v1/endpoints", summary="Every endpoint, how it stands (joining, ready, draining, down), why, and how many requests are in flight there.")
    async def endpoints() -> list[dict[str, Any]]:
        snapshot = services.membership.snapshot
        return [
            {
                "pool": pool.name,
                "address": e.address,
                "node": e.node,
                "stager": e.stager,
                "zone": e.zone,
                "standing": standing.name.lower(),
                "why": why,
                "down": why if standing is Standing.DOWN else None,
                "in_flight": services.membership.loads[pool.name][e.address].in_flight,
            }
            for pool in snapshot.pools
            for e in pool.table.endpoints
            for standing, why in [snapshot.standings.get(e.address, (Standing.READY, ""))]
        ]

    return app
