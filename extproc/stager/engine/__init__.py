"""Settings to the engine they mean."""

from ...config.stager import EngineSettings
from .api import Engine
from .sglang import SglangEngine


def build_engine(settings: EngineSettings) -> Engine:
    """A client of the model server beside this stager."""
    return SglangEngine(settings) if settings.kind == "sglang" else Engine(settings)
