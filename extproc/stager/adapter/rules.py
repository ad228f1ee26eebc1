"""What an adapter is held to on one node, as one value: for what is fetched, what others put there, and what is kept."""

from dataclasses import dataclass, replace

from ...config.stager import StagerSettings
from ...core.features import VLLM


@dataclass(frozen=True, slots=True)
class Rules:
    """Empty and 0 switch a rule off."""

    base_model: str = ""
    base_names: tuple[str, ...] = ()  # its other names; shell patterns
    max_rank: int = 0
    width: int = 0  # the base model's hidden size
    engine: str = VLLM
    version: str = ""  # of the engine; "": the newest that core/features.py knows
    by_resolver: bool = False  # vLLM's own filesystem resolver reads the configuration first, and needs more of it
    allow_pickle: bool = False
    finite: bool = True
    max_bytes: int = 0  # of the whole adapter
    max_file_bytes: int = 0

    @classmethod
    def of(cls, settings: StagerSettings, *, max_rank: int = 0, width: int = 0, version: str = "", adopted: bool = False) -> "Rules":
        """As the settings say. `max_rank` 0: the settings' own. What is adopted is not changed, so vLLM's resolver must find the exact name in it."""
        engine = settings.engine
        by_resolver = engine.mode == "resolver"
        rules = cls(
            engine.base_model,
            engine.base_names,
            max_rank or engine.max_lora_rank,
            width,
            engine.kind,
            version,
            by_resolver=by_resolver,
            allow_pickle=settings.allow_pickle,
            finite=settings.verify.finite,
            max_bytes=settings.max_adapter_bytes,
            max_file_bytes=settings.max_file_bytes,
        )
        return replace(rules, base_names=()) if adopted and by_resolver else rules
