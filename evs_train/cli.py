"""The `evs-train` command. Arguments are `key=value`, as in recipes; `USAGE` says what each command takes.

What a command needs of torch is imported once its arguments are known to be right, so mistakes are told at once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from evs_train.disk import full_disk_named
from evs_train.errors import EvsTrainError, RecipeError, leave, report
from evs_train.recipe import load_recipe
from evs_train.redaction import redact


def check(words: Sequence[str]) -> int:
    """Read what a recipe would train on and say what is there: recipe=NAME and overrides, as for training.

    `processes` is the number of processes to plan for. `--json` prints one JSON object, `--strict` makes refused rows
    an error (exit code 2).
    """
    flags = [word for word in words if word.startswith("-")]
    for flag in flags:
        if flag not in ("--json", "--strict"):
            raise RecipeError(f"unknown option '{flag}'", "options: --json, --strict")
    arguments = _pairs([word for word in words if word not in flags])
    processes = arguments.pop("processes", None)
    if processes is not None and not (processes.isdecimal() and int(processes) > 0):
        raise RecipeError(f"processes must be a number of at least 1, got '{processes}'")
    recipe = load_recipe([f"{key}={value}" for key, value in arguments.items()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rows are planned in forked processes
    from rich.console import Console  # noqa: PLC0415 (a bad recipe is answered before torch is imported)

    from evs_train.check import check as check_run  # noqa: PLC0415
    from evs_train.check_console import show_report, watched  # noqa: PLC0415
    from evs_train.inputs import Inputs  # noqa: PLC0415

    with contextlib.redirect_stdout(sys.stderr):  # nothing but the report goes to stdout
        found = check_run(Inputs(recipe, None if processes is None else int(processes), watched))
    if "--json" in flags:
        print(json.dumps(redact(found.as_json())))
    else:
        show_report(found, Console())
    return 2 if found.refused and "--strict" in flags else 0


def export(words: Sequence[str]) -> int:
    """Write the checkpoint of a finished run: run=FOLDER, and optionally rate=Q and out=DIR.

    `rate=recommended` takes the rate that the run's evaluation recommends; eval=DIR names its folder.
    """
    from evs_train.export import export_run  # noqa: PLC0415 (torch is imported only by the commands that need it)

    arguments = _pairs(words)
    _check_keys(arguments, required=("run",), optional=("rate", "out", "eval"))
    if arguments.get("rate") == "recommended":
        from evs_train.evaluate.report import recommended_rate  # noqa: PLC0415

        arguments["rate"] = str(recommended_rate(arguments["run"], arguments.get("eval")))
    try:
        rate = float(arguments["rate"]) if "rate" in arguments else None
    except ValueError as error:
        raise RecipeError(f"rate must be a number in [0, 1), got '{arguments['rate']}'") from error
    with full_disk_named(Path(arguments.get("out", arguments["run"]))):
        done = export_run(arguments["run"], rate, arguments.get("out"))
    print(f"exported {redact(str(done.path))} with video_pruning_rate {done.pruning_rate}")
    for line in done.serving:
        print(f"\n# {line.engine} (reads: {line.reads}). {line.note}\n{redact(line.command)}")
    return 0


def evaluation(words: Sequence[str]) -> int:
    """Ask a model questions at several pruning rates; the keys are those of `evaluate/options.py`."""
    from evs_train.evaluate.options import parse_options  # noqa: PLC0415 (bad options are answered first)

    options = parse_options(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from evs_train.evaluate.command import run  # noqa: PLC0415

    with full_disk_named(options.folder):
        return run(options)


def inspect(words: Sequence[str]) -> int:
    """Draw what a checkpoint keeps of a video: VIDEO model=CHECKPOINT, rates, and keys of the data section."""
    from evs_train.inspection import options  # noqa: PLC0415

    videos = [word for word in words if "=" not in word or os.path.exists(word)]
    arguments = _pairs([word for word in words if word not in videos])
    _check_keys(arguments, options.REQUIRED, options.OPTIONAL)
    asked = options.read_options(videos, arguments)
    from evs_train.inspection.observe import load, observe, rates_of  # noqa: PLC0415 (torch, once all that is right)
    from evs_train.inspection.writers import summary, write  # noqa: PLC0415

    model = load(asked)
    seen = observe(model, asked.video, rates_of(asked, model))
    write(seen, asked.out)
    print(redact("\n".join([f"wrote {asked.out}", *summary(seen)])))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "check": check,
    "inspect": inspect,
    "eval": evaluation,
    "export": export,
}

USAGE = {
    "check": "recipe=NAME [section.key=value ...] [processes=N] [--json] [--strict]\n"
    "    What a recipe would train on, read as training reads it: tokens, refused rows, memory.\n"
    "    docs/recipe.md has the keys.",
    "inspect": "VIDEO model=CHECKPOINT [rate=0.75 or 'rate=[.5,.9]'] [out=FILE.png, .html or .mp4] [key=value ...]\n"
    "    A picture of what a checkpoint keeps of a video. docs/inspect.md has the keys.",
    "eval": "model=CHECKPOINT data=ROWS ['rates=[0,.5,.75]'] [out=DIR] [key=value ...]\n"
    "    Accuracy against pruning rate, and the rate to serve at. docs/eval.md has the keys.",
    "export": "run=FOLDER [rate=0.75 or rate=recommended] [out=DIR] [eval=DIR]\n"
    "    The checkpoint of a finished run, at a rate of your choice. docs/serving.md says who reads it.",
}
"""What `--help` says of each command."""


def usage(words: Sequence[str]) -> str:
    """The help of the commands among `words`, or of all where there is none."""
    named = [name for name in USAGE if name in words]
    return "\n".join(f"evs-train {name} {USAGE[name]}" for name in named or USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `EXIT_CODES`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(usage(words))
        return 0
    try:
        if not words or words[0] not in COMMANDS:
            raise RecipeError(
                f"unknown command {words[0]!r}" if words else "no command",
                f"commands: {', '.join(COMMANDS)}; --help says what they take",
            )
        return COMMANDS[words[0]](words[1:])
    except EvsTrainError as error:
        return report(error)


def program() -> NoReturn:
    """The installed `evs-train`: run one command and end the process with its code."""
    leave(main())


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
    program()
