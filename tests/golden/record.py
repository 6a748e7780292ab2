"""Loss curves of 20 steps, per family: `python -m tests.golden.record` writes them, the test compares.

A change that claims not to touch the numerics must leave `curves.json` as it is. The curves are float32 on a CPU; other
machines round differently, so the test allows for that and the recorder is what shows an identical curve.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from evs_train.data.synthetic import write_dataset
from evs_train.models import FAMILIES
from evs_train.models.tiny import build_tiny
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of

CURVES = Path(__file__).with_name("curves.json")


def curve(family: str, folder: Path) -> list[float]:
    """Losses of 20 steps of a fixed run."""
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
    Run(recipe_of(words)).train()
    return [line["loss"] for line in metrics(folder / f"run_{family}")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        curves = {family: curve(family, Path(temporary)) for family in FAMILIES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"wrote {CURVES}")
