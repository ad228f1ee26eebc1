"""What all origins share: the settings that build them."""

import pytest

from extproc.config.origins import OriginSettings
from extproc.stager.supply.origins import build_origin


@pytest.mark.parametrize("kind", ["file", "http", "s3", "huggingface"])
async def test_every_type_of_the_settings_builds_its_origin(kind: str) -> None:
    """The label is the type: metrics and settings use one word. Building asks nothing of the network."""
    settings = OriginSettings.model_validate({"type": kind, "path": "/nowhere", "url": "http://127.0.0.1:1", "bucket": "b"})
    origin = build_origin(settings)
    assert origin.label == kind
    await origin.close()
