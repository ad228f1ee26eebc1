"""From a file, or from plain values, to settings: they are right as a whole, or each complaint is one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import ConfigError
from .settings import Settings


def load(path: Path) -> Settings:
    """Read and check a settings file. Raises ConfigError with one line per complaint."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return parse({} if raw is None else raw, source=str(path))


def parse(raw: Any, *, source: str) -> Settings:
    """Check settings given as plain values. Raises ConfigError with one line per complaint."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: the settings are not a mapping")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(e, source) for e in error.errors())) from None


def _complaint(error: Any, source: str) -> str:
    path = ".".join(str(part) for part in _written(error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{source}: {path}: no such setting"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error["input"]
    shown = f" {value!r}" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{source}: {path + ':' if path else ''}{shown} {message}".replace("  ", " ")


def _written(loc: tuple[str | int, ...]) -> Iterator[str | int]:
    """The path as the file has it: pydantic adds the type of a source behind its number."""
    for at, part in enumerate(loc):
        if not (at >= 2 and loc[at - 2] == "discovery" and isinstance(loc[at - 1], int)):
            yield part
