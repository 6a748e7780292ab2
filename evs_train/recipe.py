"""Recipes from YAML files and dotted `key.sub=value` overrides.

Invariant: all faults of a bad recipe are reported together, each with its key and, for a misspelt key, the nearest
right one (what two keys of a section say together is checked once each of them is right by itself). Loading costs
milliseconds: nothing of torch or transformers is imported here.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from evs_train.config import PARTS, Recipe
from evs_train.errors import RecipeError
from evs_train.strict import check_yaml

RECIPES_DIR = Path(__file__).resolve().parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """Safe YAML with two repairs: `1e-5` is a number (YAML 1.2), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # the parent class merges `<<`, and refuses keys that are lists or mappings
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the project."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Build the recipe from command-line arguments.

    Args:
        arguments: `recipe=NAME` (a shipped recipe or the path of a YAML file), then `key.sub=value` overrides whose
            values are YAML, such as `evs.rate={kind: beta, mode: 0.75}`.

    Raises:
        RecipeError: all faults found, one line each.
    """
    overrides: list[tuple[str, str]] = []
    name: str | None = None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            plain = argument.lstrip("-") + ("" if equals else "=...")
            raise RecipeError(f"there is no option '{argument}'", f"keys have no dashes: {plain}")
        if not equals or not all(key.split(".")):
            raise RecipeError(
                f"'{argument}' is not of the form key=value", "such as recipe=tiny or train.steps=10 (docs/recipe.md)"
            )
        if key == "recipe":
            name = value
        else:
            overrides.append((key, value))
    if name is None:
        raise RecipeError("no recipe is named", f"add recipe=NAME, one of: {', '.join(recipe_names())}, or a YAML file")
    path = _recipe_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a mapping of keys to values")
    raw.setdefault("recipe", path.stem)
    for key, value in overrides:
        _override(raw, key, parse_value(key, value))
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """Check a raw mapping against the schema; `source` names it in errors (`RecipeError`)."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [_describe_fault(fault) for fault in error.errors()]
    raise RecipeError(f"{source} (with overrides) has {len(faults)} fault(s):\n  " + "\n  ".join(faults))


def _recipe_path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES_DIR / f"{name}.yaml"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"there is no recipe '{name}'", f"{hint}shipped recipes: {', '.join(recipe_names())}")


def parse_yaml(text: str, source: str) -> Any:
    """YAML as recipes are written in it; `source` names it in errors (`RecipeError`)."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        check_yaml(value)
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        raise RecipeError(f"{source} is not valid YAML: {error.problem}{place}") from error
    except RecursionError as error:
        raise RecipeError(f"{source} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_value(key: str, text: str) -> Any:
    """The value of `key=text` on a command line, which is YAML (`RecipeError`)."""
    try:
        return parse_yaml(text, f"the value of {key}")
    except RecipeError as error:
        raise RecipeError(
            error.message, f"a text with signs of YAML in it needs quotes of its own: {key}='\"...\"'"
        ) from error


def _override(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = raw
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"{dotted}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


def _describe_fault(fault: Any) -> str:
    """One line for a person: the dotted key, what is wrong, and the nearest key for a misspelt one."""
    location = [str(part) for part in fault["loc"]]
    if location and re.fullmatch(
        r"bool|(?:list|literal)\[.*", location[-1]
    ):  # pydantic's name of one of the types a key may have
        location.pop()
    known: list[str] | None = None
    if fault["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
    elif location[-1:] == ["[key]"]:  # pydantic's mark for a key, as opposed to its value, of a mapping
        location.pop()
        known = list(PARTS) if fault["type"] == "literal_error" else None
    dotted = ".".join(location) or "recipe"
    if known is not None:
        near = difflib.get_close_matches(location[-1], known, n=1)
        return f"{dotted}: unknown key" + (f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else "")
    if fault["type"] == "missing":
        return f"{dotted}: a value is required"
    if fault["type"] == "value_error":  # raised in config.py; it may name a deeper key itself
        message = str(fault["ctx"]["error"])
        return message if message.startswith(dotted) else f"{dotted}: {message}"
    if fault["type"] == "model_type":
        message = "must be a section, that is, keys with values"
    else:
        message = re.sub(r" after validation.*", "", re.sub(r"^\w+ should", "must", str(fault["msg"])))
    return f"{dotted}: {message}, got {reprlib.repr(fault['input'])}"


def _keys_at(location: list[str]) -> list[str]:
    """Keys of the section at `location` in the schema."""
    section: type[BaseModel] = Recipe
    for key in location:
        annotation = section.model_fields[key].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
