"""The `evs-train` command. Arguments are `key=value`, as in recipes.

`evs-train export run=runs/tiny [rate=0.75] [out=DIR]`
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from evs_train.errors import EvsTrainError, RecipeError, report


def export(arguments: dict[str, str]) -> None:
    """Write the checkpoint of a finished run: run=FOLDER, and optionally rate=Q and out=DIR."""
    from evs_train.export import export_run  # noqa: PLC0415 (torch is imported only by the commands that need it)

    _check_keys(arguments, required=("run",), optional=("rate", "out"))
    try:
        rate = float(arguments["rate"]) if "rate" in arguments else None
    except ValueError as error:
        raise RecipeError(f"rate must be a number in [0, 1), got '{arguments['rate']}'") from error
    done = export_run(arguments["run"], rate, arguments.get("out"))
    print(f"exported {done.path} with video_pruning_rate {done.pruning_rate}")
    for line in done.serving:
        print(f"\n# {line.engine} (reads: {line.reads}). {line.note}\n{line.command}")


COMMANDS: dict[str, Callable[[dict[str, str]], None]] = {"export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 when something the user gave is wrong)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] not in COMMANDS:
            raise RecipeError(
                f"unknown command {words[0]!r}" if words else "no command", f"commands: {', '.join(COMMANDS)}"
            )
        COMMANDS[words[0]](_pairs(words[1:]))
    except EvsTrainError as error:
        return report(error)
    return 0


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"'{word}' is not of the form key=value")
        pairs[key] = value
    return pairs


def _check_keys(arguments: dict[str, str], required: Sequence[str], optional: Sequence[str]) -> None:
    known = [*required, *optional]
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"unknown key '{key}'", f"did you mean {near[0]}?" if near else f"keys: {', '.join(known)}"
            )
    for key in required:
        if key not in arguments:
            raise RecipeError(f"{key}=... is missing", f"keys: {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
