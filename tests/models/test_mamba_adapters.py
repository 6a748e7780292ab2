"""Adapters on the projections of Nemotron's Mamba layers: what trains, and what a fused kernel would pass by.

`python -m tests.models.test_mamba_adapters` prints the measurement that docs/decisions.md cites: every choice of layers
at two dtypes, rates and learning rates, 30 steps each; about three minutes.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.nemotron_h import modeling_nemotron_h

from evs_train.data.synthetic import write_dataset
from evs_train.models.tiny import build_tiny
from evs_train.prune import EvsHook
from tests.parity.rig import Rig, mean_loss

PROJECTIONS = (("in_proj",), ("out_proj",), ("in_proj", "out_proj"))
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Outcome:
    losses: list[float]
    still: list[str]  # adapters whose lora_B got no gradient in the first step
    finite: bool  # all gradients of all steps


def adapted(rig: Rig, targets: tuple[str, ...]) -> Any:
    """The model with adapters on the Mamba layers of these names, whatever the family refuses."""
    torch.manual_seed(0)
    names = [name for name, _ in rig.model.named_modules() if name.rsplit(".", 1)[-1] in targets]
    return get_peft_model(rig.model, LoraConfig(r=8, lora_alpha=16, target_modules=names)).train()


def train(rig: Rig, rows: list[str], targets: tuple[str, ...], rate: float, lr: float, steps: int) -> Outcome:
    model = adapted(rig, targets)
    hook = EvsHook(rig.family, model.get_base_model())
    hook.attach(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr)
    outcome = Outcome([], [], True)
    for step in range(steps):
        loss = mean_loss(model(**rig.batch(rows, rate)), hook)
        loss.backward()
        outcome.losses.append(loss.item())
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        assert gradients.keys() == trained.keys()
        if step == 0:
            outcome.still = [name for name, gradient in gradients.items() if "lora_B" in name and not gradient.any()]
        outcome.finite &= all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return outcome


@pytest.mark.parametrize("targets", PROJECTIONS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_projections_train_without_nan_where_layers_are_called(
    targets: tuple[str, ...], dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = Rig(tiny_checkpoint("nemotron_h_omni"), mixed_rows, dtype)
    outcome = train(rig, list(rig.examples), targets, rate=0.9, lr=1e-2, steps=8)
    assert outcome.still == []
    assert outcome.finite
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses[-1] < outcome.losses[0] - 0.5


def test_a_fused_kernel_is_given_the_bare_weight_of_out_proj(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, before the layer is called. When this fails, `lora_refused` can be looked at again."""
    rig = Rig(tiny_checkpoint("nemotron_h_omni"), mixed_rows)
    model = adapted(rig, ("out_proj",))
    given: list[Tensor] = []
    fused = modeling_nemotron_h.mamba2_split_conv1d_scan_combined

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["outproj_weight"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(modeling_nemotron_h, "mamba2_split_conv1d_scan_combined", noted)
    hook = EvsHook(rig.family, model.get_base_model()).attach(model)
    model(**rig.batch(["two"], 0.5))
    hook.remove()
    bare = [p for name, p in model.named_parameters() if name.endswith("out_proj.base_layer.weight")]
    assert len(given) == len(bare) == 2
    assert all(one is other for one, other in zip(given, bare, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = build_tiny("nemotron_h_omni", folder / "model")
        rows = write_dataset(folder / "world", num_clips=4, seed=0, size=64, num_frames=12)
        for dtype, targets in itertools.product(DTYPES, PROJECTIONS):
            for rate, lr in itertools.product((0.5, 0.9), (1e-3, 1e-2)):
                rig = Rig(checkpoint, rows, dtype)
                outcome = train(rig, list(rig.examples)[:4], targets, rate, lr, steps=30)
                print(
                    f"{dtype!s:15} {'+'.join(targets):16} rate {rate} lr {lr}: "
                    f"{outcome.losses[0]:.3f} -> {outcome.losses[-1]:.3f}, finite {outcome.finite}, "
                    f"without gradient {outcome.still}"
                )
