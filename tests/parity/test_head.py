"""The output layer sees only what predicts supervised tokens: the same hidden states, loss and gradients as with all.

The hidden states are the same bits. A row of a matrix product need not be, for another number of rows, so what follows
is compared in float64, where the tolerance leaves room for rounding and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from evs_train.config import TuningSection
from evs_train.data.template import IGNORE_INDEX
from evs_train.models.tuning import apply_tuning
from tests.parity.rig import Rig, predicting

ALL = ("two", "image", "text", "still", "both")


def in_float64(checkpoint: Path, rows: Path) -> Rig:
    rig = Rig(checkpoint, rows, torch.float64)
    rig.model.train().set_experts_implementation("eager")  # the other one has no kernel for float64
    apply_tuning(rig.model, rig.family, TuningSection(freeze=[]))
    return rig


def seen_by_head(rig: Rig, run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """What the output layer computes on while `run` runs, and what that returns."""
    seen: list[Tensor] = []
    head = rig.family.output_embeddings(rig.model)
    handle = head.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    result = run()
    handle.remove()
    (hidden,) = seen
    return hidden, result


def assert_trains_like_all_logits(rig: Rig, rate: float) -> None:
    """Logits, loss and every gradient."""
    batch = rig.batch(ALL, rate)
    full, labels = rig.full(batch, encoder_trains=True)
    full.loss.backward()
    expected = rig.gradients()
    rig.model.zero_grad(set_to_none=True)
    out, _ = rig.forward(batch, encoder_trains=True)
    out.loss.backward()
    found = rig.gradients()
    rig.model.zero_grad(set_to_none=True)
    assert close(out.logits[0], predicting(full.logits, labels))
    torch.testing.assert_close(out.loss, full.loss, rtol=1e-6, atol=0)  # the same float32 terms in another order
    for name, gradient in expected.items():
        assert gradient is not None
        assert close(found[name], gradient), name


def close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("packing", [False, True])
def test_the_head_sees_the_same_hidden_states_and_no_others(rig: Rig, rate: float, packing: bool) -> None:
    if packing and not rig.family.attention_only:
        pytest.skip("cannot be packed")
    batch = rig.batch(ALL, rate, packing=packing)
    everything, (_, labels) = seen_by_head(rig, lambda: rig.full(batch))
    hidden, (out, hook) = seen_by_head(rig, lambda: rig.forward(batch))
    assert everything.shape[:2] == batch["plan"].shape
    assert torch.equal(hidden[0], predicting(everything, labels))
    assert torch.equal(hook.targets, labels[labels != IGNORE_INDEX])
    assert out.logits.shape[:2] == hidden.shape[:2] == (1, sum(batch["plan"].num_supervised))
    after, _ = seen_by_head(rig, lambda: rig.full(batch))
    assert after.shape == everything.shape, "the hook on the output layer is for one call"


def test_loss_and_gradients_are_those_of_all_logits(
    family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = in_float64(tiny_checkpoint(family_name), mixed_rows)
    for rate in (0.0, 0.6):
        assert_trains_like_all_logits(rig, rate)


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save", "tied"])
def test_a_head_that_is_adapted_or_tied_learns_the_same(
    how: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = in_float64(tiny_checkpoint("qwen3_vl"), mixed_rows)
    if how == "tied":
        rig.model.lm_head.weight = rig.model.get_input_embeddings().weight
    else:
        names = {"target_modules": ["q_proj"], how: ["lm_head"]}
        rig.model = get_peft_model(rig.model, LoraConfig(r=4, init_lora_weights=False, **names)).double()
        assert any("lm_head" in name for name in rig.gradients())
    assert_trains_like_all_logits(rig, 0.6)
