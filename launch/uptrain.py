"""Entry of a training run: `torchrun --nproc_per_node N launch/uptrain.py recipe=NAME key.sub=value ...`.

Leaves with 0 when the run is done and exported, otherwise with another code of `EXIT_CODES`; one line says what.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from evs_train.disk import full_disk_named
from evs_train.errors import ON_ALL_RANKS, EvsTrainError, leave, report
from evs_train.recipe import load_recipe, recipe_names


def main(arguments: list[str]) -> int:
    """Run the recipe that `arguments` name, or say how to name one; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nRecipes: {', '.join(recipe_names())}, or the path of one. Keys: docs/recipe.md.")
        return 0
    return train(arguments)


def train(arguments: list[str]) -> int:
    """Train and export as the recipe says; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader forks; tokenizers would warn at every batch
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = load_recipe(arguments)
        from rich.console import Console  # noqa: PLC0415 (a bad recipe is answered before torch is imported)

        from evs_train import console as show  # noqa: PLC0415
        from evs_train.check_console import watched  # noqa: PLC0415
        from evs_train.export import export_run  # noqa: PLC0415
        from evs_train.uptrain import Run, leave_process_group  # noqa: PLC0415

        run = Run(recipe, watched=watched)
        console = Console(quiet=not first)
        if recipe.dry_run:
            show.show_dry_run(run, console)
            return 0
        _ = run.schedule  # what cannot be planned is told before anything is loaded
    except EvsTrainError as error:  # every process meets the same fault; one of them says it
        return report(error) if first else error.exit_code
    try:
        with full_disk_named(Path(recipe.output_dir)):
            summary = run.train(lambda parts: show.show_parts(run, parts, console))
            leave_process_group()
            if not first:
                return 0
            export = export_run(recipe.output_dir) if recipe.export.enabled else None
            show.show_summary(recipe, summary, export, console)
    except ON_ALL_RANKS as error:
        if "RANK" in os.environ:  # torchrun sends it to the others as soon as one is gone
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if first:
            report(error)
        leave_process_group(together=True)
        return error.exit_code
    except EvsTrainError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
