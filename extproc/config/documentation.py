"""Every setting with its default and its meaning, as its group states them."""

from collections.abc import Iterator
from typing import Any, get_args

import yaml

from .settings import Settings
from .values import Group


def settings_table() -> str:
    """Every setting as a Markdown table."""
    rows = [f"| `{path}` | `{default}` | {meaning} |" for path, default, meaning in reference()]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def reference(group: type[Group] = Settings, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Every setting as (path, default, meaning), in the order of the file."""
    for name, field in group.model_fields.items():
        annotation = field.annotation
        here = f"{path}.{name}" if path else name
        if isinstance(annotation, type) and issubclass(annotation, Group):
            yield from reference(annotation, here)
        elif inner := [a for a in _parts(annotation) if isinstance(a, type) and issubclass(a, Group)]:
            for one in inner:
                yield from reference(one, f"{here}[]" if len(inner) == 1 else f"{here}[{get_args(one.model_fields['type'].annotation)[0]}]")
        else:
            default = "required" if field.is_required() else yaml.safe_dump(_plain(field.default), default_flow_style=True, width=10_000).split("\n")[0]
            yield here, default, " ".join((field.description or "").split())


def _parts(annotation: Any) -> Iterator[Any]:
    """What a type is made of, to the innermost: a tuple's members, a union's alternatives."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _parts(part)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
