"""What pruning may and may not change: kept tokens, positions, labels, and the equality of dropping and masking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evs_train.evs import select_tokens
from evs_train.models import FAMILIES
from evs_train.prune import EvsHook, compact
from evs_train.pruners.base import Choice
from tests.parity.conftest import fresh
from tests.parity.rig import (
    SCORED_WITH_DEEPSTACK,
    Rig,
    attention_mask,
    captured_inputs,
    kept_positions,
    language_model_logits,
    plain_forward_fails,
    plain_media,
    plain_positions,
    slow_retained,
    supervised,
    unpruned_embeds,
)

RATES = (0.3, 0.75, 0.9)
SEEDED = [*((0, rate) for rate in RATES), (1, 0.47), (2, 0.83)]  # seed of the weights, rate
MIXED = ("two", "image", "text")
ALL = ("two", "image", "text", "still", "both")


@pytest.mark.capability("dropping a token", "is masking it")
@pytest.mark.parametrize(("seed", "rate"), SEEDED)
def test_dropping_equals_masking(attention_rig: Rig, rate: float) -> None:
    rig = attention_rig
    batch = rig.batch(MIXED, rate)
    assert len({planned.item.num_units for planned in batch["plan"].videos}) == 2
    kept = kept_positions(rig, batch)
    dropped, labels = rig.full(batch)

    ids = batch["input_ids"]
    inputs = {"attention_mask": attention_mask(batch) * kept, "position_ids": plain_positions(batch)}
    if plain_forward_fails(rig, batch):
        masked = language_model_logits(rig, unpruned_embeds(rig, batch), **inputs)
    else:
        masked = rig.model(input_ids=ids, **inputs, **plain_media(rig, batch)).logits
    assert not torch.equal(kept, attention_mask(batch).bool()), "nothing was pruned: the test would prove nothing"
    for row in range(len(ids)):
        length = batch["plan"].num_tokens[row]
        torch.testing.assert_close(dropped.logits[row, :length], masked[row, kept[row]], rtol=1e-4, atol=2e-5)
    assert labels.shape[1] < ids.shape[1]


@pytest.mark.capability("dropping a token", "leaves a shorter sequence")
@pytest.mark.parametrize(("seed", "rate"), SEEDED)
def test_a_hybrid_sees_the_kept_tokens_as_its_whole_sequence(recurrent_rig: Rig, rate: float) -> None:
    """The plain language model on the embeddings of the kept tokens alone, each row by itself and without padding."""
    rig = recurrent_rig
    batch = rig.batch(ALL, rate)
    kept, embeds = kept_positions(rig, batch), unpruned_embeds(rig, batch)
    assert not torch.equal(kept, attention_mask(batch).bool()), "nothing was pruned: the test would prove nothing"
    pruned, _ = rig.full(batch)
    for row, length in enumerate(batch["plan"].num_tokens):
        positions = batch["position_ids"][:, row : row + 1, kept[row]] if "position_ids" in batch else None
        alone = language_model_logits(
            rig, embeds[row : row + 1, kept[row]], torch.ones(1, length, dtype=torch.int64), positions
        )
        torch.testing.assert_close(pruned.logits[row, :length], alone[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rate", RATES)
def test_a_hybrid_that_only_masks_sees_more(recurrent_rig: Rig, rate: float) -> None:
    """Why hybrids have a reference of their own: their recurrent layers read a masked token's place as a step."""
    rig = recurrent_rig
    batch = rig.batch(("two",), rate)
    kept, embeds = kept_positions(rig, batch), unpruned_embeds(rig, batch)
    masked = language_model_logits(rig, embeds, kept.long(), batch.get("position_ids"))
    dropped, _ = rig.full(batch)
    assert not torch.allclose(dropped.logits[0], masked[0, kept[0]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("seed", "rate"), SEEDED)
def test_kept_tokens_are_those_of_the_slow_reference(rig: Rig, rate: float) -> None:
    batch = rig.batch(ALL, rate)
    kept = kept_positions(rig, batch)
    seen = captured_inputs(rig, batch)
    for row in range(len(ALL)):
        length = batch["plan"].num_tokens[row]
        assert int(seen["attention_mask"][row].sum()) == length
        assert torch.equal(seen["input_ids"][row, :length], batch["input_ids"][row, kept[row]])
        if "position_ids" in batch:
            positions = seen["position_ids"].view(-1, *seen["input_ids"].shape)
            assert torch.equal(positions[:, row, :length], batch["position_ids"][:, row, kept[row]])


@pytest.mark.parametrize("family", [name for name in FAMILIES if "sequential" in FAMILIES[name].position_rules])
def test_sequential_positions_number_the_kept_tokens(
    family: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = fresh(family, tiny_checkpoint, mixed_rows)
    batch = rig.batch(ALL, 0.75, sequential=True)
    kept = kept_positions(rig, batch)
    seen = captured_inputs(rig, batch)
    assert seen["position_ids"].shape == seen["input_ids"].shape
    for row, length in enumerate(batch["plan"].num_tokens):
        assert torch.equal(seen["input_ids"][row, :length], batch["input_ids"][row, kept[row]])
        assert seen["position_ids"][row, :length].tolist() == list(range(length))


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


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("two",), marks=pytest.mark.capability("several videos", "yes")),
        pytest.param(("both",), marks=pytest.mark.capability("images beside video", "yes")),
        ALL,
        ("text",),
        ("still", "image"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("rate", [0.0, *RATES])
def test_supervised_tokens_never_change(rig: Rig, names: tuple[str, ...], rate: float) -> None:
    batch = rig.batch(names, rate)
    _, labels = rig.full(batch)
    before = supervised(batch["labels"])
    assert supervised(labels) == before
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


@pytest.mark.capability("padded batch", "yes")
@pytest.mark.parametrize(("seed", "rate"), [(0, 0.0), *SEEDED[1:]])
def test_a_row_is_the_same_alone_and_in_a_padded_batch(rig: Rig, rate: float) -> None:
    together, _ = rig.full(rig.batch(ALL, rate))
    lengths = rig.batch(ALL, rate)["plan"].num_tokens
    for row, name in enumerate(ALL):
        alone, _ = rig.full(rig.batch((name,), rate))
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
        upcast: EvsHook(rig.family, rig.model, float32_score=upcast)._choose(planned, features).index
        for upcast in (False, True)
    }
    shaped = features[0].view(item.num_units, item.tokens_per_unit, -1)
    assert torch.equal(chosen[False], select_tokens(shaped, planned.pruning_rate))
    assert torch.equal(chosen[True], select_tokens(shaped.float(), planned.pruning_rate))
    assert not torch.equal(chosen[False], chosen[True])


@pytest.mark.parametrize("family_name", SCORED_WITH_DEEPSTACK)
def test_scores_of_the_embeddings_alone_are_an_option(rig: Rig) -> None:
    batch = rig.batch(("two",), 0.5)
    with torch.no_grad():
        encoded = rig.family.encode(rig.model, batch["media"], "video")
    chosen: dict[bool, list[Tensor]] = {}
    for engine in (True, False):
        hook = EvsHook(rig.family, rig.model, engine_score=engine)
        chosen[engine] = [
            hook._choose(p, features).index for p, features in zip(batch["plan"].videos, encoded, strict=True)
        ]
    for planned, (pooled, *_), found in zip(batch["plan"].videos, encoded, chosen[False], strict=True):
        shaped = pooled.view(planned.item.num_units, planned.item.tokens_per_unit, -1)
        assert found.tolist() == slow_retained(shaped, planned.pruning_rate)
    assert not all(map(torch.equal, chosen[True], chosen[False]))


def test_mixed_precision_chooses_in_its_dtype(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 weights under bfloat16 autocast: what promotes features, as LLaVA's newline, must not upcast scores."""
    scored: list[torch.dtype] = []

    def noted(embeds: Tensor, pruning_rate: float) -> Tensor:
        scored.append(embeds.dtype)
        return select_tokens(embeds, pruning_rate)

    monkeypatch.setattr("evs_train.evs.select_tokens", noted)
    rig.forward(rig.batch(("two", "both"), 0.5), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert scored == [torch.bfloat16] * 3


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
    chosen = [Choice(torch.arange(planned.num_retained)) for planned in batch["plan"].videos]
    moved = compact({**batch, "labels": marks, "position_ids": marks.expand(3, -1, -1)}, chosen, pad_token_id=0)
    source = moved["labels"][0]
    assert bool((source[1:] > source[:-1]).all())
    assert torch.equal(moved["position_ids"], source.expand(3, 1, -1))
    assert torch.equal(moved["input_ids"][0], batch["input_ids"][0, source])
