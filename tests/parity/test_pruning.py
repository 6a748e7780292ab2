"""What pruning may and may not change: kept tokens, positions, labels, and the equality of dropping and masking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from evs_train.evs import select_tokens
from evs_train.prune import EvsHook, compact
from tests.parity.rig import Rig, attention_mask, kept_positions, plain_media, supervised

RATES = (0.3, 0.75, 0.9)
MIXED = ("two", "image", "text")
ALL = ("two", "image", "text", "still", "both")


def captured_inputs(rig: Rig, batch: dict[str, Any]) -> dict[str, Any]:
    """What the hook hands to the model."""
    seen: dict[str, Any] = {}
    handle = rig.model.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs), with_kwargs=True)
    try:
        rig.forward(batch)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("rate", RATES)
def test_dropping_equals_masking(attention_rig: Rig, rate: float) -> None:
    rig = attention_rig
    batch = rig.batch(MIXED, rate)
    kept = kept_positions(rig, batch)
    dropped, hook = rig.forward(batch)

    ids = batch["input_ids"]
    positions = batch["position_ids"]  # (P, B, L)
    masked = rig.model(
        input_ids=ids,
        attention_mask=attention_mask(batch) * kept,
        position_ids=positions if len(positions) > 1 else positions[0],
        **plain_media(rig, batch),
    )
    assert not torch.equal(kept, attention_mask(batch).bool()), "nothing was pruned: the test would prove nothing"
    for row in range(len(ids)):
        length = batch["plan"].num_tokens[row]
        torch.testing.assert_close(dropped.logits[row, :length], masked.logits[row, kept[row]], rtol=1e-4, atol=2e-5)
    assert hook.labels.shape[1] < ids.shape[1]


@pytest.mark.parametrize("rate", RATES)
def test_kept_tokens_are_those_of_the_slow_reference(rig: Rig, rate: float) -> None:
    batch = rig.batch(ALL, rate)
    kept = kept_positions(rig, batch)
    seen = captured_inputs(rig, batch)
    for row in range(len(ALL)):
        length = batch["plan"].num_tokens[row]
        assert int(seen["attention_mask"][row].sum()) == length
        assert torch.equal(seen["input_ids"][row, :length], batch["input_ids"][row, kept[row]])
        if "position_ids" in batch:
            positions = seen["position_ids"].reshape(-1, *seen["input_ids"].shape)  # (P, B, L'), whatever P is
            assert torch.equal(positions[:, row, :length], batch["position_ids"][:, row, kept[row]])


def test_text_separators_and_images_all_stay(rig: Rig) -> None:
    batch = rig.batch(ALL, 0.9)
    video = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    video[batch["index"]["video"]] = True
    others = attention_mask(batch).flatten().bool() & ~video
    kept = kept_positions(rig, batch).flatten()
    assert bool(kept[others].all())
    seen = captured_inputs(rig, batch)
    # Only the placeholder that stands for video tokens may become rarer.
    placeholder = batch["input_ids"].flatten()[batch["index"]["video"]].unique()
    assert len(placeholder) == 1
    for row in range(len(ALL)):
        length = batch["plan"].num_tokens[row]
        after = seen["input_ids"][row, :length]
        before = batch["input_ids"][row][attention_mask(batch)[row].bool()]
        assert torch.equal(after[after != placeholder], before[before != placeholder])


@pytest.mark.parametrize("names", [ALL, ("two",), ("text",), ("still", "image"), ("both", "two")], ids="+".join)
@pytest.mark.parametrize("rate", [0.0, *RATES])
def test_supervised_tokens_never_change(rig: Rig, names: tuple[str, ...], rate: float) -> None:
    batch = rig.batch(names, rate)
    _, hook = rig.forward(batch)
    before = supervised(batch["labels"])
    assert supervised(hook.labels) == before
    assert [len(row) for row in before] == list(batch["plan"].num_supervised)
    assert min(map(len, before)) > 0


def test_planned_shapes_are_the_real_ones(rig: Rig) -> None:
    batch = rig.batch(ALL, 0.75)
    seen = captured_inputs(rig, batch)
    plan = batch["plan"]
    assert seen["input_ids"].shape == plan.shape == (len(ALL), max(plan.num_tokens))
    assert plan.video_tokens_after < plan.video_tokens_before


def test_a_single_unit_is_never_pruned(rig: Rig) -> None:
    plan = rig.batch(("still",), 0.9)["plan"]
    assert [planned.item.num_units for planned in plan.videos] == [1]
    assert plan.video_tokens_after == plan.video_tokens_before > 0


@pytest.mark.parametrize("rate", [0.0, 0.75])
def test_a_row_is_the_same_alone_and_in_a_padded_batch(rig: Rig, rate: float) -> None:
    together, _ = rig.forward(rig.batch(ALL, rate))
    lengths = rig.batch(ALL, rate)["plan"].num_tokens
    for row, name in enumerate(ALL):
        alone, _ = rig.forward(rig.batch((name,), rate))
        torch.testing.assert_close(
            together.logits[row, : lengths[row]],
            alone.logits[0],
            rtol=1e-4,
            atol=2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(("cap", "kept_units"), [(True, 2), (False, 1)])
def test_the_cap_leaves_two_units_worth_of_tokens(rig: Rig, cap: bool, kept_units: int) -> None:
    plan = rig.batch(("two", "still"), 0.95, cap=cap)["plan"]
    for planned in plan.videos:
        units = min(kept_units, planned.item.num_units)
        assert planned.num_retained == units * planned.item.tokens_per_unit
    assert plan.rates == (0.95, 0.95)
    assert plan.applied_rates[1] == 0.0
    assert plan.applied_rates[0] == pytest.approx(1 - plan.video_tokens_after / plan.video_tokens_before, abs=0.1)


def test_float32_scores_are_an_option(
    family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = Rig(tiny_checkpoint(family_name), mixed_rows, torch.bfloat16)
    batch = rig.batch(("two",), 0.5)
    planned = batch["plan"].videos[0]
    item = planned.item
    drifting = torch.randn(1, item.tokens_per_unit, 64) + 0.02 * torch.randn(
        item.num_units, item.tokens_per_unit, 64, generator=torch.Generator().manual_seed(0)
    ).cumsum(0)
    features = [drifting.to(torch.bfloat16).flatten(0, 1)]
    chosen = {
        upcast: EvsHook(rig.family, rig.model, float32_score=upcast)._select(planned, features)
        for upcast in (False, True)
    }
    shaped = features[0].view(item.num_units, item.tokens_per_unit, -1)
    assert torch.equal(chosen[False], select_tokens(shaped, planned.pruning_rate))
    assert torch.equal(chosen[True], select_tokens(shaped.float(), planned.pruning_rate))
    assert not torch.equal(chosen[False], chosen[True])


def test_the_mask_is_always_explicit(rig: Rig) -> None:
    """Without one, transformers takes the position gaps of pruned video for boundaries of packed documents."""
    seen = captured_inputs(rig, rig.batch(("two",), 0.75))
    assert seen["attention_mask"].dtype == torch.int64
    assert seen["attention_mask"].shape == seen["input_ids"].shape


def test_bfloat16_chooses_in_bfloat16(
    family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    """The choice is made in the dtype that serving runs in; an upcast breaks ties elsewhere."""
    rig = Rig(tiny_checkpoint(family_name), mixed_rows, torch.bfloat16)
    batch = rig.batch(("two", "both"), 0.75)
    kept = kept_positions(rig, batch)
    seen = captured_inputs(rig, batch)
    for row in range(2):
        length = batch["plan"].num_tokens[row]
        assert torch.equal(seen["input_ids"][row, :length], batch["input_ids"][row, kept[row]])


def test_compaction_moves_everything_by_one_index(qwen: Rig) -> None:
    batch = qwen.batch(("two",), 0.75)
    marks = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    chosen: list[Tensor] = [torch.arange(planned.num_retained) for planned in batch["plan"].videos]
    moved = compact({**batch, "labels": marks, "position_ids": marks.expand(3, -1, -1)}, chosen, pad_token_id=0)
    source = moved["labels"][0]
    assert bool((source[1:] > source[:-1]).all())
    assert torch.equal(moved["position_ids"], source.expand(3, 1, -1))
    assert torch.equal(moved["input_ids"][0], batch["input_ids"][0, source])


def test_the_device_half_never_reads_a_value_back(rig: Rig) -> None:
    """Fake tensors have shapes and no values: a mask index, an `.item()` or a data-dependent shape would raise."""
    batch = rig.batch(ALL, 0.75)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        fake["index"] = {key: mode.from_tensor(value) for key, value in batch["index"].items()}
        chosen = [
            select_tokens(torch.empty(p.item.num_units, p.item.tokens_per_unit, 16), p.pruning_rate)
            for p in batch["plan"].videos
        ]
        moved = compact(fake, chosen, pad_token_id=0)
    assert moved["input_ids"].shape == batch["plan"].shape
