"""Writes docs/recipe.md, the table of recipe keys, from the schema in `evs_train/config.py`.

`python docs/recipe_keys.py > docs/recipe.md`. A test says when the page is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from evs_train.config import Recipe

HEAD = """\
# Recipe keys

Written by `python docs/recipe_keys.py > docs/recipe.md` from `evs_train/config.py`. A recipe is a YAML file of these
keys; on the command line each is `section.key=value`, where the value is YAML: `optim.lr=1e-4`, `deepspeed=null`,
`evs.rate='{kind: beta, mode: 0.75}'`. An unknown key, or a value of a wrong type or range, is an error; all errors of a
recipe are reported together.
"""
TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "null": "null"}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

Schema = dict[str, Any]


def page() -> str:
    """The whole page, as Markdown."""
    schema = Recipe.model_json_schema()
    sections = {name: key for name, key in schema["properties"].items() if _section(key)}
    plain = {name: key for name, key in schema["properties"].items() if name not in sections}
    parts = [HEAD, *_table("Top level", schema, plain, "")]
    for name, key in sections.items():
        section = schema["$defs"][_section(key)]
        nested = {inner: value for inner, value in section["properties"].items() if _section(value)}
        keys = {inner: value for inner, value in section["properties"].items() if inner not in nested}
        parts += _table(f"`{name}`", section, keys, f"{name}.")
        for inner, value in nested.items():
            deeper = schema["$defs"][_section(value)]
            parts += _table(f"`{name}.{inner}`", deeper, deeper["properties"], f"{name}.{inner}.")
    return "\n".join(parts)


def _section(key: Schema) -> str:
    """Name of the section that a key holds; empty for a value."""
    choices = [key, *key.get("anyOf", ())]
    return next((choice["$ref"].rsplit("/", 1)[-1] for choice in choices if "$ref" in choice), "")


def _table(title: str, section: Schema, keys: Schema, prefix: str) -> Iterator[str]:
    yield f"## {title}\n\n{section['description']}\n"
    yield "| key | value | default | |\n|---|---|---|---|"
    for name, key in keys.items():
        default = "required" if name in section.get("required", ()) else f"`{json.dumps(key.get('default'))}`"
        if "default" not in key and default != "required":
            default = "empty"
        yield f"| `{prefix}{name}` | {_value(key)} | {default} | {key.get('description', '')} |"
    yield ""


def _value(key: Schema) -> str:
    if "anyOf" in key:
        return " or ".join(_value(choice) for choice in key["anyOf"])
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        return f"list of {_value(key['items'])}"
    if key.get("type") == "object":
        return "mapping"
    if "type" not in key:
        return "YAML"  # judged by code of its own
    limits = [f"{sign} {key[name]:.12g}" for name, sign in LIMITS.items() if name in key]
    return " ".join([TYPES[key["type"]], *limits])


if __name__ == "__main__":
    sys.stdout.write(page())
