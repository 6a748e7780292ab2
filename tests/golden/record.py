"""Loss curves of 20 steps, per family: `python -m tests.golden.record` writes them, the test compares.

A change that claims not to touch the numerics must leave `curves.json` as it is. The curves are float32 on a CPU; other
machines round differently, so the test allows for that and the recorder is what shows an identical curve.
`python -m tests.golden.record --nudged` says how far rounding alone carries: it writes nothing, and compares curves
whose weights began a unit in the last place beside the recorded ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from evs_train.data.synthetic import write_dataset
from evs_train.models import FAMILIES
from evs_train.models.tiny import build_tiny
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of

CURVES = Path(__file__).with_name("curves.json")


def curve(family: str, folder: Path, nudge: int | None = None) -> list[float]:
    """Losses of 20 steps of a fixed run; with `nudge`, a seed, each weight is moved up or down by its last place."""
    checkpoint = build_tiny(family, folder / family)
    rows = write_dataset(folder / "world", num_clips=16, seed=0, size=64, num_frames=12)
    words = arguments(
        checkpoint,
        rows,
        folder / f"run_{family}",
        train__steps=20,
        train__batch_size=4,
        evs__rate={"kind": "uniform", "min": 0.0, "max": 0.9},
    )
    run = Run(recipe_of(words))
    model = run.load_model()
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for weight in model.parameters():
                up = torch.rand(weight.shape, generator=generator) < 0.5
                weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)))
    run.load_model = lambda: model  # type: ignore[method-assign]
    run.train()
    return [line["loss"] for line in metrics(folder / f"run_{family}")]


def show_nudged(folder: Path) -> None:
    """The largest relative distances from the recorded curve over eight nudges: in ten steps, and in the other ten."""
    for family, recorded in json.loads(CURVES.read_text()).items():
        far = [0.0] * len(recorded)
        for nudge in range(8):
            found = curve(family, folder / str(nudge), nudge)
            far = [max(worst, abs(new / old - 1)) for worst, new, old in zip(far, found, recorded, strict=True)]
        print(f"{family}: {max(far[:10]):.1e}, {max(far[10:]):.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if sys.argv[1:] == ["--nudged"]:
            show_nudged(Path(temporary))
            sys.exit()
        curves = {family: curve(family, Path(temporary)) for family in FAMILIES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"wrote {CURVES}")
