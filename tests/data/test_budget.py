"""Micro-batches with a budget of tokens: never above it, every draw once, the same for any number of processes."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from evs_train import evs
from evs_train.data.budget import LOOKAHEAD, Budget, BudgetBatches
from evs_train.data.index import Fault
from evs_train.data.lengths import Length, PlannedRow, Refused
from evs_train.data.order import DrawOrder
from evs_train.errors import DataError
from evs_train.rates import Rates
from evs_train.samplers import build_sampler

TOKENS = 4000
UNIFORM = {"kind": "uniform", "min": 0.0, "max": 0.9}


def video(name: str, units: int, per_unit: int = 20, text: int = 60, fewest: int = 2) -> PlannedRow:
    """A row of one video, with all levels down to `fewest` units."""
    counts = [units]
    while counts[-1] > fewest:
        counts.append(max(fewest, int(units * 0.75 ** len(counts))))
    levels = tuple(Length(text + n * per_unit, 10, 0, (n,), (per_unit,)) for n in counts)
    return PlannedRow(name, f"rows.json row {name}", levels, is_whole=True)


def long_tailed(count: int = 300, seed: int = 0) -> list[PlannedRow | Refused]:
    """Rows of 1 to some hundred units, most of them short."""
    units = np.random.default_rng(seed).lognormal(2.5, 1.0, count).astype(int) + 1
    return [video(str(number), int(min(one, 1000))) for number, one in enumerate(units)]


def grouped(items: Iterable[Any], size: int) -> list[list[Any]]:
    listed = list(items)
    return [listed[first : first + size] for first in range(0, len(listed), size)]


def planned(rows: list[PlannedRow | Refused] | None = None, rate: Any = UNIFORM, **options: Any) -> BudgetBatches:
    rows = long_tailed() if rows is None else rows
    budget = Budget(TOKENS, **{k: options.pop(k) for k in ("packing", "media_tokens", "lose_frames") if k in options})
    per_sample = options.pop("per_sample", False)
    settings: dict[str, Any] = {"per_step": 4, "at_once": 2, "num_draws": len(rows), **options}
    rates = Rates(build_sampler(rate), seed=3, per_sample=per_sample)
    return BudgetBatches(rows, DrawOrder(len(rows), seed=5), rates, budget, **settings)


def numbers(plan: BudgetBatches) -> range:
    return range(plan.num_steps * plan.per_step)


def tokens_of(plan: BudgetBatches, draw: int, attempt: int, step: int) -> list[int]:
    """Tokens after pruning at each level, from the formula."""
    row = plan.rows[plan.order.row(draw, attempt)]
    assert isinstance(row, PlannedRow)
    found = []
    for level in row.levels:
        (units,), (per_unit,) = level.num_units, level.tokens_per_unit
        rate = plan.rates.of_video(draw, step, units)
        found.append(level.num_tokens - units * per_unit + evs.retained_tokens(units, per_unit, rate))
    return found


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_no_micro_batch_is_above_the_budget(packing: bool, per_sample: bool) -> None:
    plan = planned(packing=packing, per_sample=per_sample)
    sizes, media = [], []
    for number in numbers(plan):
        batch = plan.batch(number)
        assert batch.step == number // 4
        lengths = []
        shown = [
            plan.way(slot, batch.step, slot.attempt, plan.order.row(slot.draw, slot.attempt)) for slot in batch.slots
        ]
        media.append(sum(way[1].num_video_tokens for way in shown if not isinstance(way, Fault) and way[1] is not None))
        for slot in batch.slots:
            levels = tokens_of(plan, slot.draw, slot.attempt, batch.step)
            assert slot.num_tokens == next(tokens for tokens in levels if tokens <= TOKENS)
            lengths.append(slot.num_tokens)
        sizes.append(sum(lengths) if packing else len(lengths) * max(lengths))
    assert max(sizes) <= TOKENS
    assert np.mean(sizes) > 0.85 * TOKENS
    usage = plan.usage()
    assert usage.most_supervised == max(10 * len(plan.batch(number).slots) for number in numbers(plan))
    assert (usage.most_video_tokens, usage.most_image_tokens) == (max(media), 0)


@pytest.mark.parametrize("packing", [False, True])
def test_every_draw_is_read_once_and_none_waits_for_ever(packing: bool) -> None:
    plan = planned(packing=packing)
    of_step = [
        [slot.draw for number in group for slot in plan.batch(number).slots] for group in grouped(numbers(plan), 4)
    ]
    draws = list(itertools.chain(*of_step))
    assert len(set(draws)) == len(draws)
    assert set(range(300)) <= set(draws)  # one epoch, and what fills its last steps
    assert plan.draws_before(plan.num_steps) == len(draws)
    assert [plan.draws_before(step) for step in range(3)] == [0, len(of_step[0]), len(of_step[0]) + len(of_step[1])]
    for step, mine in enumerate(of_step[:-1]):  # the oldest that waits is read in the step
        oldest = min(set(range(max(draws) + 1)) - set(itertools.chain(*of_step[:step])))
        assert oldest in mine


def test_packing_fills_and_padding_groups() -> None:
    packed, padded = planned(packing=True).usage(), planned(packing=False).usage()
    assert packed.padding == 0
    assert packed.fill > 0.95
    assert padded.padding < 0.1
    assert max(packed.imbalance, padded.imbalance) < 0.05
    plan = planned()
    in_order = sorted((slot for number in numbers(plan) for slot in plan.batch(number).slots), key=lambda s: s.draw)
    by_eights = [[slot.num_tokens for slot in group] for group in grouped(in_order, 8)]
    fixed = 1 - sum(map(sum, by_eights)) / sum(len(group) * max(group) for group in by_eights)
    assert padded.padding < fixed / 4


@pytest.mark.parametrize("packing", [False, True])
def test_the_steps_are_the_same_for_any_number_of_processes(packing: bool) -> None:
    """Four micro-batches a step on 1, 2 or 4 ranks: the same ones, shared out differently."""
    plans = [planned(packing=packing, at_once=at_once) for at_once in (1, 2, 4)]
    steps = [
        [sorted(plan.batch(number).slots[0].draw for number in group) for group in grouped(numbers(plan), 4)]
        for plan in plans
    ]
    assert steps[0] == steps[1] == steps[2]
    again = pickle.loads(pickle.dumps(plans[1]))  # as a spawned worker gets it
    assert [again.batch(number) for number in numbers(again)] == [plans[1].batch(n) for n in numbers(plans[1])]
    assert plans[0].describe().startswith(f"4 {'packed' if packing else 'padded'} micro-batches of 4000 tokens (plan ")
    assert plans[0].describe() == plans[1].describe() == plans[2].describe()  # so that any of them may be resumed
    assert plans[1].describe() != planned(packing=packing, rate=0.5, at_once=2).describe()


def test_ranks_get_micro_batches_of_a_size() -> None:
    """Rows that fit once or twice: without sorting, neighbours would differ."""
    rows = [video(str(n), 90 + 25 * (n % 5), text=200) for n in range(200)]
    plan = planned(rows, rate=0.0, per_step=8, at_once=4, packing=True)
    sizes = [sum(slot.num_tokens for slot in plan.batch(number).slots) for number in numbers(plan)]
    groups = list(grouped(sizes, 4))
    assert all(min(a) >= max(b) for a, b in grouped(groups, 2))
    assert sizes[4:8] == sorted(sizes[4:8])  # the second group is handed out the other way round
    assert sizes[:4] == sorted(sizes[:4], reverse=True)


def test_a_row_too_long_loses_frames_or_is_refused() -> None:
    rows = [video("long", 1000), *(video(str(n), 10) for n in range(20))]
    shown = planned(rows, rate=0.5, per_step=1, at_once=1)
    kept = [slot for n in numbers(shown) for slot in shown.batch(n).slots if shown.order.row(slot.draw) == 0]
    assert kept
    for slot in kept:
        assert TOKENS * 0.7 < slot.num_tokens <= TOKENS
        way = shown.way(slot, 0, 0, 0)
        assert not isinstance(way, Fault)
        share, length = way
        assert share == 0.75**4  # 1000 units, half of them kept, at most 197 may stay
        assert length == rows[0].levels[4]
    assert shown.usage().shortened == len(kept)
    refused = planned(rows, rate=0.5, per_step=1, at_once=1, lose_frames=False)
    replaced = [slot for n in numbers(refused) for slot in refused.batch(n).slots if slot.attempt]
    assert [slot.draw for slot in replaced] == [slot.draw for slot in kept]
    fault = refused.way(replaced[0], 0, 0, 0)
    assert isinstance(fault, Fault)
    assert fault.reason == "too long"
    assert "rows.json row long: 10060 tokens after pruning, above data.max_tokens_per_batch = 4000" in fault.message
    assert refused.usage().shortened == 0
    assert refused.usage().replaced == len(replaced)


def test_a_refused_row_is_replaced_in_the_plan() -> None:
    bad = Refused("bad", "rows.json row 1", "a.mp4", "truncated", "a.mp4: cut off", "mend it")
    plan = planned([bad, *(video(str(n), 10) for n in range(20))], per_step=1, at_once=1)
    slots = [slot for number in numbers(plan) for slot in plan.batch(number).slots]
    (replaced,) = [slot for slot in slots if slot.draw < 21 and plan.order.row(slot.draw) == 0]
    assert replaced.attempt >= 1
    assert plan.way(replaced, 0, 0, 0) == Fault("a.mp4: cut off", "mend it", "truncated")


def test_a_stand_in_is_no_longer_than_what_was_planned() -> None:
    rows = [video("short", 10), video("long", 40), video("shorter", 9)]
    plan = planned(rows, rate=0.0, per_step=1, at_once=1, lose_frames=False)
    slot = next(s for n in numbers(plan) for s in plan.batch(n).slots if plan.order.row(s.draw, s.attempt) == 0)
    assert isinstance(plan.way(slot, 0, slot.attempt + 1, 1), Fault)
    assert plan.way(slot, 0, slot.attempt + 1, 2) == (1.0, rows[2].levels[0])


def test_media_tokens_have_a_budget_of_their_own() -> None:
    """What the encoder computes does not shrink with the rate."""
    free, bound = planned(rate=0.9, packing=True), planned(rate=0.9, packing=True, media_tokens=8000)

    def media(plan: BudgetBatches) -> list[tuple[int, int]]:
        found = []
        for number in numbers(plan):
            slots = plan.batch(number).slots
            rows = [plan.rows[plan.order.row(slot.draw, slot.attempt)] for slot in slots]
            found.append((len(rows), sum(row.full.num_media_tokens for row in rows if isinstance(row, PlannedRow))))
        return found

    assert max(tokens for _, tokens in media(free)) > 16000
    assert all(tokens <= 8000 or count == 1 for count, tokens in media(bound))


def test_nothing_fits() -> None:
    with pytest.raises(DataError, match=r"data\.max_tokens_per_batch = 4000: 100 rows tried for draw 0 are all"):
        planned([video("a", 1000, fewest=900)], rate=0.0)


def test_steps_may_be_given() -> None:
    plan = planned(num_steps=7)
    assert plan.num_steps == 7
    first = [plan.batch(number) for number in range(4)]
    assert first == [planned(num_steps=3).batch(number) for number in range(4)]


def test_the_lookahead_is_bounded() -> None:
    """A micro-batch is not chosen from the whole epoch, but from what waits beside its step."""
    plan = planned(long_tailed(3000), rate=0.5, packing=True)
    for number in numbers(plan):
        draws = [slot.draw for slot in plan.batch(number).slots]
        between = sum(min(tokens_of(plan, draw, 0, 0)[0], TOKENS) for draw in range(min(draws), max(draws)))
        assert between <= (LOOKAHEAD + 4 + 4) * TOKENS  # of which those of its step may be read already
