"""The stager's HTTP control API: health, metrics, what is on disk. Its OpenAPI page is at /docs."""

from typing import Any

from fastapi import FastAPI
from google.protobuf.json_format import MessageToDict

from ..process import control_app
from .service import list_reply
from .stager import Stager


def stager_app(stager: Stager) -> FastAPI:
    """The application behind `stager.http_listen`. Nothing here changes anything."""
    app = control_app("lora-extproc stager", stager.metrics, lambda: stager.not_ready)

    @app.get("/v1/adapters", summary="What is on disk, least recently used first, and the disk's budget in bytes.")
    async def adapters() -> dict[str, Any]:
        return MessageToDict(list_reply(stager), preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    return app
