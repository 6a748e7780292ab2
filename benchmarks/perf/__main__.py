"""`python -m benchmarks.perf`: measure, print tables, write JSON and a figure.

`--size toy` takes seconds and says nothing about speed, `cpu` has small shapes, `gpu` those of real models. The groups
and their figures are explained in docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
GROUPS = ("step", "overhead", "scale", "pruning", "alternatives", "packing", "loader")
"""Names of modules of this package, each with a `GROUP`."""
PACKAGES = ("evs-train", "torch", "transformers", "peft", "accelerate")


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perf", description=__doc__)
    parser.add_argument("--size", choices=("toy", "cpu", "gpu"), default="cpu", help="shapes (default: cpu)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="what is measured (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/perf_SIZE.json)")
    args = parser.parse_args(argv)
    path = args.out or RESULTS / f"perf_{args.size}.json"
    result = measure(args.size, args.groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, path.with_suffix(".png"))
    print(path)
    return 0


def measure(size: Any, groups: Sequence[str]) -> dict[str, Any]:
    """Environment and rows of each group, as JSON values; prints a table after each."""
    import torch  # noqa: PLC0415 (imported late: --help is quick)

    from benchmarks.environment import environment  # noqa: PLC0415
    from benchmarks.perf.harness import Bench, Group, as_table  # noqa: PLC0415

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"environment": environment(PACKAGES, size=size, device=device.type), "groups": {}}
    for name in groups:
        group: Group = importlib.import_module(f"benchmarks.perf.{name}").GROUP
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = group.run(Bench(size, device, Path(folder), _say))
        seconds = round(time.perf_counter() - begun, 1)
        print(f"\n{name}: {group.title} ({seconds:.0f} s)\n{as_table(group.columns, rows)}", flush=True)
        result["groups"][name] = {"title": group.title, "seconds": seconds, "rows": [_plain(row) for row in rows]}
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel for each group that draws; no file if none does."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (imported late: --help is quick)

    groups = {name: importlib.import_module(f"benchmarks.perf.{name}").GROUP for name in result["groups"]}
    drawn = {name: group for name, group in groups.items() if group.draw is not None}
    if not drawn:
        return
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (name, group) in zip(axes, drawn.items(), strict=False):
        panel.set_title(group.title, fontsize=10)
        group.draw(panel, result["groups"][name]["rows"])
    for panel in axes[len(drawn) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.perf.harness import Spread  # noqa: PLC0415

    return {key: dataclasses.asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
