"""`python -m benchmarks.perf`: measure, print a table for each group, write JSON and a figure beside it.

`--size toy` takes seconds and says nothing about speed, `cpu` has small shapes, `gpu` those of real models. The groups
and their figures are explained in docs/performance.md. The file is written after each group; groups that are not
measured now stay in it as they are, each with the environment that it was measured in.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report on stderr each time it starts

import torch

from benchmarks.environment import environment
from benchmarks.perf.harness import SIZES, Bench, Group, Row, Size, Spread, as_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
GROUPS = ("step", "overhead", "scale", "pruning", "alternatives", "packing", "loader", "savings")
"""Names of modules of this package, each with a `GROUP`."""
PACKAGES = ("evs-train", "torch", "transformers", "peft", "accelerate")


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perf", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="shapes (default: cpu)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="what is measured (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/perf_SIZE.json)")
    args = parser.parse_args(argv)
    if args.size == "gpu" and not torch.cuda.is_available():
        parser.error("--size gpu needs a GPU; --size toy runs the same code anywhere")
    if torch.cuda.device_count() > 1:
        parser.error("one GPU is measured: CUDA_VISIBLE_DEVICES=0 before it, or the Trainer would share batches out")
    if args.size == "cpu" and torch.cuda.is_available():
        parser.error("--size cpu needs CUDA_VISIBLE_DEVICES= before it, or the Trainer would take the GPU")
    path = args.out or RESULTS / f"perf_{args.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.is_file() else {}
    for name in args.groups:
        groups[name] = measure(args.size, name)
        path.write_text(json.dumps({"size": args.size, "groups": groups}, indent=1) + "\n", encoding="utf-8")
        draw(groups, path.with_suffix(".png"))
    print(f"\n{path}")
    return 0


def measure(size: Size, name: str) -> dict[str, Any]:
    """Environment and rows of a group, as JSON values; prints its table."""
    group = group_of(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    around = environment(PACKAGES, device=device.type)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = group.run(Bench(size, device, Path(folder), _say))
    seconds = round(time.perf_counter() - begun, 1)
    print(f"\n{name}: {group.title} ({seconds:.0f} s)\n{as_table(group.columns, rows)}", flush=True)
    return {"title": group.title, "seconds": seconds, "environment": around, "rows": [_plain(row) for row in rows]}


def group_of(name: str) -> Group:
    """The group that the module of this name is."""
    group: Group = importlib.import_module(f"benchmarks.perf.{name}").GROUP
    return group


def draw(groups: dict[str, Any], path: Path) -> None:
    """One panel for each group that draws; no file if none does."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (imported late: it is slow)

    drawn = {name: group for name, group in ((name, group_of(name)) for name in groups) if group.draw is not None}
    if not drawn:
        return
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (name, group) in zip(panels, drawn.items(), strict=False):
        panel.set_title(group.title, fontsize=10)
        assert group.draw is not None
        group.draw(panel, groups[name]["rows"])
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)


def _plain(row: Row) -> Row:
    return {key: dataclasses.asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
