"""Writes the reference in `docs/configuration.md` anew, from the schema that checks configurations.

    python docs/make_reference.py

A test fails while the two differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aetheria.config import TrainingConfig

PAGE = Path(__file__).parent / "configuration.md"
BEGIN, END = "<!-- from here on written by docs/make_reference.py -->", "<!-- to here -->"


def reference() -> str:
    """Returns the tables of all keys, in Markdown."""
    schema = TrainingConfig.json_schema()
    sections = [("Top level", schema["properties"], schema)]
    for key, owner in (("snapshots", "SnapshotsConfig"), ("snapshots.keep_best", "KeepBestConfig")):
        sections.append((f"`{key}`", schema["$defs"][owner]["properties"], schema["$defs"][owner]))
    compiling = schema["$defs"]["CompileConfig"]
    sections.append(("`compile`, where it is not just true or false", compiling["properties"], compiling))
    parts = []
    for title, properties, owner in sections:
        rows = [_row(key, value, schema, key in owner.get("required", ())) for key, value in properties.items()]
        parts += [f"### {title}", "", "| key | value | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _row(key: str, value: dict[str, Any], schema: dict[str, Any], required: bool) -> str:
    default = "must be given" if required else _default(value.get("default"))
    return f"| `{key}` | {_kind(value, schema)} | {default} | {value.get('description', '')} |"


def _default(value: Any) -> str:
    return "" if isinstance(value, dict) and value else f"`{json.dumps(value)}`"  # a section tells its own defaults


def _kind(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """Returns in words what a value may be."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return {"PluginSpec": "a registered name, with its parameters", "JsonValue": "any value"}.get(
            name, "a section, see below"
        )
    if "anyOf" in value:
        return " or ".join(_kind(option, schema) for option in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{json.dumps(choice).strip(chr(34))}`" for choice in value["enum"])
    match value.get("type"):
        case "integer" | "number" as kind:
            words = "whole number" if kind == "integer" else "number"
            if "minimum" in value:
                words += f" ≥ {value['minimum']}"
            if "exclusiveMinimum" in value:
                words += f" > {value['exclusiveMinimum']:g}"
            return words
        case "boolean":
            return "`true`, `false`"
        case "null":
            return "`null`"
        case "array":
            return f"list: each {_kind(value['items'], schema)}"
        case "object":
            return "values by name"
        case _:
            return "path" if value.get("format") == "path" else "text"


def page_with(text: str) -> str:
    """Returns the page with a reference in the place of its old one."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(reference()), encoding="utf-8")
    print(f"wrote {PAGE}")
