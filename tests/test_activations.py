"""What autograd keeps, as counted from shapes, against what the hooks on its saved tensors are handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evs_train.activations import layers_of, pixels_of_patch
from evs_train.config import Part
from evs_train.models import FAMILIES
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of

RECURRENT = ("nemotron_h_omni", "qwen3_5")
FULL: dict[str, Any] = {"tuning__freeze": []}
ADAPTERS = {"tuning__method": "lora", "model__dtype": "bfloat16"}
CASES = [(family, way) for family in sorted(FAMILIES) for way in (FULL, ADAPTERS)]
CASES += [("qwen3_vl", FULL | {"model__dtype": "bfloat16"}), ("qwen3_vl", {"tuning__method": "lora"})]


@pytest.fixture
def run_of(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(family: str, **options: Any) -> Run:
        return Run(recipe_of(arguments(tiny_checkpoint(family), mixed_rows, tmp_path / "run", **options)))

    return make


class Saved:
    """Bytes of what autograd keeps, by the part that is running. Parameters are not counted."""

    def __init__(self, plain: Any, run: Run) -> None:
        self.of_part: Counter[Part | None] = Counter()
        self._seen = {one.untyped_storage().data_ptr() for one in (*plain.parameters(), *plain.buffers())}
        self._kept: list[Tensor] = []  # or their places would be taken by others
        self._running: list[Part | None] = [None]
        roots = {prefix.rstrip("."): part for part, prefixes in run.family.parts.items() for prefix in prefixes}
        for name, module in plain.named_modules():
            part = roots.get(name) or (roots.get(name.rpartition(".")[0]) if name.endswith(("0", "1")) else None)
            if part is not None and not isinstance(module, nn.ModuleList):
                self._follow(module, part)

    def _follow(self, module: nn.Module, part: Part) -> None:
        module.register_forward_pre_hook(lambda *_: self._running.append(part))
        module.register_forward_hook(lambda *_: self._running.pop() and None)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)
            self.of_part[self._running[-1]] += storage.nbytes()
        return tensor


@pytest.mark.parametrize(("family", "way"), CASES)
def test_what_autograd_keeps(family: str, way: dict[str, Any], run_of: Callable[..., Run]) -> None:
    """Of a row of an image and a video; of each part that keeps anything, but for recurrences in plain PyTorch."""
    run = run_of(family, train__batch_size=1, evs__rate=0.5, **way)
    trainer = run.build_trainer()
    trainer.hook.attach(trainer.model)
    trainer.model.train()
    (number,) = (number for number, sample in enumerate(run.samples) if sample.images and sample.videos)
    draw = next(draw for draw in range(100) if run.order.row(draw) == number)
    batch = run.collator([run.stream[draw]])
    saved = Saved(trainer.hook.model, run)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))

    items = [planned.item for planned in batch["plan"].items]
    patches = sum(item.num_tokens * run.family.patches_per_token(item.kind) for item in items)
    tokens: dict[Part, float] = {
        "vision": patches,
        "projector": sum(item.num_tokens for item in items),
        "language_model": batch["plan"].shape[1],
    }
    layers = layers_of(run.planned_model(), run.family, run.recipe)
    counted: Counter[Part] = Counter()
    for place, layer in enumerate(layers):
        if any(one.trained for one in layers[: place + 1]):
            counted[layer.part] += tokens[layer.part] * layer.kept + layer.casts
    saw = saved.of_part["vision"] + saved.of_part["projector"]
    assert counted["vision"] + counted["projector"] == pytest.approx(saw, rel=0.14)
    if family in RECURRENT:
        assert 0.3 * saved.of_part["language_model"] < counted["language_model"] < saved.of_part["language_model"]
    else:
        assert counted["language_model"] == pytest.approx(saved.of_part["language_model"], rel=0.08)
    pixels = [one for name, value in batch["media"].items() if "pixel" in name for one in listed(value)]
    all_pixels = patches * pixels_of_patch(trainer.model, run.family)
    assert all_pixels == pytest.approx(sum(one.numel() for one in pixels), rel=0.2)


def listed(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def test_dropout_keeps_a_mask_of_what_each_adapter_reads(run_of: Callable[..., Run]) -> None:
    """A byte each, as CUDA's kernel has it, and a copy of what is left, which bfloat16 needs anyhow."""
    kept = []
    for dropout in (0.0, 0.1):
        run = run_of("qwen3_vl", **ADAPTERS | {"tuning__lora": {"dropout": dropout}})
        kept.append([layer.kept for layer in layers_of(run.planned_model(), run.family, run.recipe)])
    text = run.family.config.text_config
    read = 5 * text.hidden_size + text.num_attention_heads * text.head_dim + text.intermediate_size
    grown = [more - less for less, more in zip(*kept, strict=True)]
    assert [one for one in grown if one] == [read] * text.num_hidden_layers
