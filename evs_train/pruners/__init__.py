"""Pruners by the name that `evs.method` gives them. A new one is one file and one line here (docs/adding-a-pruner.md).

The table holds names of modules, each with one `PRUNER`, so that recipes are checked without importing torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evs_train.errors import RecipeError

Method = str | Mapping[str, Any]
"""A pruner's name, or a mapping with that as `kind` and its options."""

if TYPE_CHECKING:
    from evs_train.pruners.base import Pruner

PRUNERS: dict[str, str] = {
    "evs": "evs",
    "evs-threshold": "evs_threshold",
    "vidcom2": "vidcom2",
    "nvidia": "nvidia",
    "random": "random_tokens",
    "frames": "whole_units",
    "prunevid": "prunevid",
}


def method_name(spec: Method, key: str = "evs.method") -> str:
    """The name in what `build_pruner` takes. Raises RecipeError where there is none, or an unknown one."""
    name = spec if isinstance(spec, str) else spec.get("kind")
    if not isinstance(name, str) or name not in PRUNERS:
        where = key if isinstance(spec, str) else f"{key}.kind"
        raise RecipeError(f"{where}: unknown pruner {name!r}", _did_you_mean(str(name), list(PRUNERS)))
    return name


def build_pruner(spec: Method, key: str = "evs.method") -> Pruner:
    """The pruner that a recipe describes.

    Args:
        spec: such as `evs`, or `{kind: evs-threshold, similarity: 0.9}`; names are the keys of `PRUNERS`.
        key: where `spec` stands in the recipe, for messages.

    Raises:
        RecipeError: unknown name or option, or a value out of range; names the key.
    """
    name = method_name(spec, key)
    of_name: type[Pruner] = importlib.import_module(f"{__name__}.{PRUNERS[name]}").PRUNER
    options = {} if isinstance(spec, str) else {option: value for option, value in spec.items() if option != "kind"}
    known = list(inspect.signature(of_name).parameters)
    for option in options:
        if option not in known:
            raise RecipeError(f"{key}.{option}: unknown key of {name}", _did_you_mean(str(option), known))
    try:
        return of_name(**options)
    except ValueError as error:  # raised by __post_init__, its message starts with the name of the option
        raise RecipeError(f"{key}.{error}") from error


def _did_you_mean(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}" if known else "it has no options"
