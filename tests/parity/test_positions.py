"""Positions of retained tokens, and the trap of their gaps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evs_train.config import ModelSection, Positions
from evs_train.data_config import DataSection
from evs_train.errors import RecipeError
from evs_train.models import FAMILIES
from evs_train.models.loading import load_family
from tests.parity.rig import Rig, captured_inputs, kept_positions, logits_of_rows

ALL = ("two", "image", "text", "still", "both")
ONE_D = sorted(name for name, family in FAMILIES.items() if "sequential" in family.position_rules)


@pytest.mark.capability("positions", "preserve")
@pytest.mark.parametrize("packing", [False, True])
def test_preserved_positions_are_those_of_the_unpruned_row(
    rig: Rig, packing: bool, record_property: Callable[[str, object], None]
) -> None:
    batch = rig.batch(ALL, 0.75, packing=packing)
    kept, seen = kept_positions(rig, batch), captured_inputs(rig, batch)
    if "position_ids" not in batch:
        record_property("cell", "takes none")
        assert "position_ids" not in seen
    elif packing:
        assert torch.equal(seen["position_ids"].flatten(), batch["position_ids"][:, kept].flatten())
    else:
        for row, length in enumerate(batch["plan"].num_tokens):
            expected = batch["position_ids"][:, row, kept[row]]
            assert torch.equal(seen["position_ids"][..., row, :length].reshape(expected.shape), expected)


@pytest.mark.capability("positions", "sequential")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family_name", ONE_D)
def test_sequential_positions_have_no_gaps(rig: Rig, packing: bool) -> None:
    batch = rig.batch(ALL, 0.75, packing=packing, sequential=True)
    seen = captured_inputs(rig, batch)
    lengths = batch["plan"].num_tokens
    rows = seen["position_ids"][0].split(lengths) if packing else seen["position_ids"]
    for row, length in zip(rows, lengths, strict=True):
        assert row[:length].tolist() == list(range(length))
    # Alone and together stay equal, and at rate 0 the two rules are one.
    together, _ = rig.full(batch)
    for name, found in zip(ALL, logits_of_rows(together.logits, batch["plan"]), strict=True):
        alone, _ = rig.full(rig.batch((name,), 0.75, sequential=True))
        torch.testing.assert_close(found, alone.logits[0], rtol=1e-4, atol=2e-5)
    dense, _ = rig.full(rig.batch(("two",), 0.0, sequential=True))
    preserved, _ = rig.full(rig.batch(("two",), 0.0))
    assert torch.equal(dense.logits, preserved.logits)
    pruned, _ = rig.full(rig.batch(("two",), 0.75, sequential=True))
    gapped, _ = rig.full(rig.batch(("two",), 0.75))
    assert not torch.allclose(pruned.logits, gapped.logits, atol=1e-3)


@pytest.mark.parametrize("family_name", ONE_D)
def test_without_a_mask_position_gaps_would_cut_the_row_into_documents(rig: Rig) -> None:
    """What transformers does, so that one learns when it stops; dropping equals masking is what holds with our mask."""
    inputs = captured_inputs(rig, rig.batch(("two",), 0.75))
    with_mask = rig.model(**inputs).logits
    without = rig.model(**{**inputs, "attention_mask": None}).logits
    gap = int((inputs["position_ids"][0].diff() > 1).nonzero()[0]) + 1
    torch.testing.assert_close(without[:, :gap], with_mask[:, :gap], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(without[:, gap:], with_mask[:, gap:], atol=1e-3)


@pytest.mark.parametrize("rule", ["sequential", "engine"])
def test_a_rule_that_a_family_does_not_have_is_refused(
    family_name: str, rule: Positions, tiny_checkpoint: Callable[[str], Path]
) -> None:
    section, data = ModelSection(path=str(tiny_checkpoint(family_name))), DataSection(rows=["unused.json"])
    if rule in FAMILIES[family_name].position_rules:
        assert load_family(section, data, rule).positions == rule
    else:
        with pytest.raises(RecipeError, match=f"^evs.positions: {rule} is not possible with {family_name}"):
            load_family(section, data, rule)
