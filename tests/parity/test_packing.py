"""Rows joined to one sequence: the same logits, loss and gradients as alone, and no attention between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evs_train.errors import RecipeError
from evs_train.uptrain import Run
from tests.parity.rig import Rig, captured_inputs, logits_of_rows, supervised
from tests.runs import arguments, recipe_of

ALL = ("two", "image", "text", "still", "both")


@pytest.mark.capability("packed batch", "yes")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rate", [0.0, 0.75])
def test_a_row_is_the_same_alone_and_packed(attention_rig: Rig, rate: float, attention: str) -> None:
    rig = attention_rig
    rig.model.set_attn_implementation(attention)
    try:
        batch = rig.batch(ALL, rate, packing=True)
        plan = batch["plan"]
        packed, labels = rig.full(batch)
        assert packed.logits.shape[:2] == plan.shape == (1, sum(plan.num_tokens))
        for name, found in zip(ALL, logits_of_rows(packed.logits, plan), strict=True):
            alone, _ = rig.full(rig.batch((name,), rate))
            torch.testing.assert_close(found, alone.logits[0], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert supervised(labels) == [[token for row in supervised(batch["labels"]) for token in row]]
    finally:
        rig.model.set_attn_implementation("sdpa")


def test_loss_and_gradients_are_those_of_the_padded_batch(attention_rig: Rig) -> None:
    rig, gradients, losses = attention_rig, [], []
    for packing in (False, True):
        rig.model.zero_grad(set_to_none=True)
        out, _ = rig.forward(rig.batch(ALL, 0.5, packing=packing))
        out.loss.backward()
        losses.append(out.loss)
        gradients.append(rig.gradients())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    padded, packed = gradients
    for name, reference in padded.items():
        torch.testing.assert_close(packed[name], reference, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_flash_attention_is_told_the_borders_and_given_no_mask(attention_rig: Rig) -> None:
    """Only what the kernel would be handed; it runs on GPUs alone."""
    rig = attention_rig
    text = rig.model.config.get_text_config()
    for names, packing in ((ALL, True), (("two",), False)):
        batch = rig.batch(names, 0.75, packing=packing)
        with pytest.MonkeyPatch.context() as patch:
            seen = captured_inputs(rig, batch)
            told = batch["index"]["boundaries"]
            patch.setattr(text, "_attn_implementation_internal", "flash_attention_2")
            arguments = rig.attention_arguments(batch)
        assert arguments["attention_mask"] is None
        assert seen["attention_mask"] is not None
        for side in "qk":
            assert torch.equal(arguments[f"cu_seq_lens_{side}"], told)
            assert arguments[f"max_length_{side}"] == max(batch["plan"].num_tokens)
        assert told.dtype == torch.int32
        assert told.tolist() == [sum(batch["plan"].num_tokens[:row]) for row in range(len(names) + 1)]


@pytest.mark.capability("packed batch", "refused")
def test_a_recurrent_family_refuses_to_pack(
    recurrent_family: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    words = arguments(tiny_checkpoint(recurrent_family), mixed_rows, tmp_path, train__packing=True)
    with pytest.raises(RecipeError, match=f"^train.packing: {recurrent_family} cannot be packed"):
        Run(recipe_of(words))
