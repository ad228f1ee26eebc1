"""A reference that leaves no setting out."""

from typing import Any

import yaml

from extproc.config.documentation import reference, settings_table
from extproc.config.read import parse
from extproc.config.settings import Settings


def leaves(schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> list[str]:
    """The settings by pydantic's own description of them."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        return [leaf for name, inner in schema["properties"].items() for leaf in leaves(inner, definitions, f"{path}.{name}" if path else name)]
    items = schema.get("items", {})
    if "$ref" in items:
        return leaves(items, definitions, f"{path}[]")
    if "oneOf" in items:
        kind_of = {ref: kind for kind, ref in items["discriminator"]["mapping"].items()}
        return [leaf for one in items["oneOf"] for leaf in leaves(one, definitions, f"{path}[{kind_of[one['$ref']]}]")]
    return [path]


def test_the_reference_lists_every_setting_once() -> None:
    """In the order of the file, with a meaning that is a sentence."""
    schema = Settings.model_json_schema()
    rows = list(reference())
    assert [path for path, _, _ in rows] == leaves(schema, schema["$defs"])
    assert [path for path, _, meaning in rows if not meaning.endswith(".")] == []


def test_the_reference_states_the_defaults_as_yaml() -> None:
    """What it says can be pasted into a file, and changes nothing there."""
    raw: dict[str, Any] = {}
    for path, default, _ in reference():
        if "[" not in path:
            *groups, name = path.split(".")
            group = raw
            for part in groups:
                group = group.setdefault(part, {})
            group[name] = yaml.safe_load(default)
    assert parse(raw, source="") == Settings()
    required = [path for path, default, _ in reference() if default == "required"]
    assert [path for path in required if "discovery" not in path] == [
        "pools[].name",
        "pools[].endpoints[].address",
        "router.copies[].match",
        "stager.origins[].type",
    ]


def test_the_table_has_one_row_per_setting() -> None:
    """Three columns in each: nothing in a meaning breaks the Markdown."""
    head, rule, *rows = settings_table().splitlines()
    assert head == "| setting | default | meaning |"
    assert rule == "| --- | --- | --- |"
    assert len(rows) == len(list(reference()))
    assert all(row.count("|") == 4 for row in rows)
