"""Mixture of experts under ZeRO-3: an expert that gets no token on one process leaves nobody waiting.

transformers holds a layer's experts in whole tensors of one module, so every process gathers them whatever its tokens
choose. Were an expert a module of its own, a process that skips it would never join its gather.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from evs_train.models import FAMILIES
from evs_train.models.tiny import FINISHES
from evs_train.uptrain import Run
from tests.parity.rig import Rig
from tests.plain import plain_config, plain_processor
from tests.runs import arguments, metrics, recipe_of, torchrun

NUM_EXPERTS = 64
EXPERTS_KEY = {"qwen3_vl_moe": "num_experts", "nemotron_h_omni": "n_routed_experts"}


def test_every_family_with_routed_experts_is_here() -> None:
    assert {name for name, family in FAMILIES.items() if family.lora_note} == EXPERTS_KEY.keys()


@pytest.fixture(scope="module")
def rows(mixed_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row of text and a row with video: in every step one process has each."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    chosen = [row for row in json.loads(mixed_rows.read_text()) if row["id"] in ("two", "text")]
    path.write_text(json.dumps(chosen))
    return path


@pytest.fixture(params=sorted(EXPERTS_KEY))
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny checkpoint with so many experts that a short row leaves some without a token."""
    family = str(request.param)
    path = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / family))
    config = plain_config(path)
    setattr(config.text_config, EXPERTS_KEY[family], NUM_EXPERTS)
    torch.manual_seed(0)
    processor = plain_processor(path)
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    processor.save_pretrained(path)
    if family in FINISHES:
        FINISHES[family](path)
    return path


def chosen_experts(rig: Rig, name: str) -> list[set[int]]:
    """Experts of each layer that the router sends a token of this row to."""
    chosen: list[set[int]] = []

    def note(module: object, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(set(output[2].flatten().tolist()))

    gates = [module for path, module in rig.model.named_modules() if path.endswith(".gate")]
    handles = [gate.register_forward_hook(note) for gate in gates]
    with torch.no_grad():
        rig.forward(rig.batch((name,), 0.5))
    for handle in handles:
        handle.remove()
    assert len(chosen) == len(gates) > 0
    return chosen


def test_experts_without_a_token_on_one_process(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    rig = Rig(checkpoint, rows)
    of_text, of_video = chosen_experts(rig, "text"), chosen_experts(rig, "two")
    assert all(text < set(range(NUM_EXPERTS)) for text in of_text)
    assert all(video - text for text, video in zip(of_text, of_video, strict=True))

    options = {"train__steps": 2, "evs__rate": 0.5}
    Run(recipe_of(arguments(checkpoint, rows, tmp_path / "one", train__batch_size=2, **options))).train()
    words = arguments(checkpoint, rows, tmp_path / "two", train__batch_size=1, deepspeed="zero3", **options)
    done = torchrun(words, 2, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(expected) == len(found) == 2
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
