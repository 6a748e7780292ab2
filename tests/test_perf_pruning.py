"""The benchmarks of pruning itself: waits are seen, the other ways do what they say, the groups run at toy size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.perf import __main__ as command
from benchmarks.perf.alternatives import WAYS, NotDropped, ScanByToken, ScanByUnit, drop_share, scan, threshold_for
from benchmarks.perf.device_half import DeviceHalf, with_gradient
from benchmarks.perf.harness import Bench
from benchmarks.perf.packing import BATCHINGS, PLANS, Mix
from benchmarks.perf.runs import ScriptedRun, Step, Workload
from benchmarks.perf.shapes import TOY
from benchmarks.perf.sides import Found, compared
from benchmarks.perf.waits import noted_waits
from benchmarks.perf.without import BUCKET, Bucketed, PositionsInForward
from evs_train.trainer import UptrainTrainer

CPU = torch.device("cpu")
NUMBERS, MASK = torch.arange(6.0), torch.tensor([True, False] * 3)


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (lambda: NUMBERS.sum().item(), 1),
        (lambda: bool(MASK.any()), 1),
        (NUMBERS.tolist, 1),
        (lambda: NUMBERS[MASK], 1),
        (lambda: NUMBERS.clone().index_put_((MASK,), torch.ones(3)), 1),
        (MASK.nonzero, 1),
        (NUMBERS.unique, 1),
        (lambda: NUMBERS.repeat_interleave(torch.ones(6, dtype=torch.int64)), 1),
        (lambda: NUMBERS.repeat_interleave(torch.ones(6, dtype=torch.int64), output_size=6), 0),
        (lambda: NUMBERS.masked_fill(MASK, 0.0), 0),
        (lambda: NUMBERS[NUMBERS.argsort()[:3]], 0),
        (lambda: NUMBERS.split([2, 4]), 0),
    ],
)
def test_what_would_wait_for_a_gpu_is_noted_on_a_cpu(work: Callable[[], object], count: int) -> None:
    with noted_waits(CPU) as waits:
        work()
    assert len(waits.places) == count


def test_views_and_allocations_are_no_operations() -> None:
    with noted_waits(CPU) as waits:
        torch.empty(3, 4).flatten()[2:].unsqueeze(0)
        torch.zeros(3) + 1
    assert waits.num_operations == 2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedRun, UptrainTrainer]]:
    """Two rows of different length at rate 0.75."""
    bench = Bench("toy", CPU, tmp_path_factory.mktemp("perf"), lambda line: None)
    run = ScriptedRun(Workload(TOY, "full"), [Step((12, 8), 0.75)], bench)
    yield run, run.build_trainer()
    ScanByUnit.thresholds.clear()


def half_of(trainer: tuple[ScriptedRun, UptrainTrainer], way: str) -> DeviceHalf:
    run, made = trainer
    made.hook.__class__ = WAYS[way]
    return DeviceHalf(made.hook, run.collator([run.stream[0]]), CPU)


def test_indexing_by_a_mask_gives_what_we_give(trainer: Any) -> None:
    ours, other = (half_of(trainer, way).prune() for way in ("evs_train", "boolean mask"))
    assert ours.keys() == other.keys()
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert torch.equal(ours[name], other[name]), name
    for one, two in zip(with_gradient(ours), with_gradient(other), strict=True):
        assert torch.equal(one, two)


def test_hidden_tokens_are_those_that_we_drop(trainer: Any) -> None:
    halves = {way: half_of(trainer, way) for way in ("evs_train", "masked, not dropped")}
    inputs = {way: half.prune() for way, half in halves.items()}
    with torch.no_grad():
        losses = [halves[way].hook.model(**inputs[way]).loss for way in inputs]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    full, pruned = (inputs[way]["input_ids"].numel() for way in ("masked, not dropped", "evs_train"))
    assert full > pruned


def test_the_scan_compares_with_the_last_one_kept() -> None:
    embeds = torch.randn(1, 5, 8) + 0.4 * torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(0)).cumsum(0)
    expected = []
    for place in range(5):
        last = embeds[0, place]
        for unit in range(7):
            keep = unit == 0 or bool(1 - F.cosine_similarity(embeds[unit, place], last, dim=0) > 0.2)
            last = embeds[unit, place] if keep else last
            expected.append(keep)
    assert scan(embeds, 0.2).T.flatten().tolist() == expected
    assert 5 < sum(expected) < 35
    for wanted in (8, 15, 30):
        assert abs(int(scan(embeds, threshold_for(embeds, wanted)).sum()) - wanted) <= 2


def test_the_scans_keep_about_as_many_tokens(trainer: Any) -> None:
    for way in ("scan by unit", "scan by token"):
        half = half_of(trainer, way)
        assert isinstance(half.hook, ScanByUnit | ScanByToken)
        masks = half.hook.masks(half.batch, half.encoding[0]["video"])
        for planned, mask in zip(half.batch["plan"].videos, masks, strict=True):
            units = mask.view(planned.item.num_units, -1)
            assert units[0].all()
            assert abs(int(mask.sum()) - planned.num_retained) <= planned.item.num_units
            if way == "scan by token":
                share = drop_share(planned)
                assert set(units[1:].sum(1).tolist()) == {units.shape[1] - int(units.shape[1] * share)}


def test_only_ours_and_masking_do_not_wait(trainer: Any) -> None:
    counts = {}
    for way in WAYS:
        half = half_of(trainer, way)
        half()  # thresholds are found before
        with noted_waits(CPU) as waits:
            half()
        counts[way] = len(waits.places)
    assert counts["evs_train"] == counts["masked, not dropped"] == 0
    tokens = half.batch["plan"].video_tokens_before
    assert 0 < counts["boolean mask"] == counts["scan by unit"] < tokens < counts["scan by token"]


def test_the_device_half_has_the_gradient_of_training(trainer: Any) -> None:
    half = half_of(trainer, "evs_train")
    outputs = list(with_gradient(half.prune()))
    sums = torch.autograd.grad(sum((one.sum() for one in outputs), torch.zeros(())), half._leaves)
    for leaf, gradient in zip(half._leaves, sums, strict=True):
        assert set(gradient.unique().tolist()) == {0.0, 1.0}
        assert gradient.shape == leaf.shape
    assert half.side() > 0


def test_batches_of_a_mix(tmp_path: Path) -> None:
    bench = Bench("toy", CPU, tmp_path, lambda line: None)
    sides = {one.name: Mix(PLANS["toy"], one, bench) for one in BATCHINGS}
    figures = {name: side.figures() for name, side in sides.items()}
    longest = figures["1 row"]["largest"]
    assert [figures[name]["padding"] for name in ("1 row", "4 rows, packed", "budget, packed")] == [0, 0, 0]
    assert figures["4 rows, padded"]["padding"] > 0
    assert figures["4 rows, padded"]["largest"] == 4 * longest
    assert all(figures[name]["largest"] <= longest for name in ("budget, padded", "budget, packed"))
    assert all(one["rows"] >= PLANS["toy"].rows for one in figures.values())
    draws = [draw for plan in sides["budget, packed"].batches for draw in plan.draws]
    assert set(range(PLANS["toy"].rows)) <= set(draws)


def test_not_dropping_keeps_every_feature(trainer: Any) -> None:
    half = half_of(trainer, "masked, not dropped")
    assert isinstance(half.hook, NotDropped)
    kept: list[Tensor] = list(with_gradient(half.prune()))
    assert sum(map(len, kept)) == sum(len(layer) for video in half.encoding[0]["video"] for layer in video)


def test_positions_in_the_forward_are_those_of_the_workers(tmp_path: Path) -> None:
    run = ScriptedRun(Workload(TOY, "full"), [Step((8,), 0.75)], Bench("toy", CPU, tmp_path, lambda line: None))
    hook, batch = run.build_trainer().hook, run.collator([run.stream[0]])
    ours = hook.prune(batch)
    hook.__class__ = Bucketed
    padded = hook.prune(batch)
    hook.__class__ = PositionsInForward
    theirs = hook.prune({**batch, "position_ids": None, "index": None})
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert torch.equal(ours[name], theirs[name]), name
    assert padded["input_ids"].shape == (1, BUCKET) != ours["input_ids"].shape
    assert padded["attention_mask"].sum() == ours["attention_mask"].sum() == ours["input_ids"].numel()


def test_sides_that_compute_something_else_have_no_figures() -> None:
    plain = Found([2.0, 6.0], 100, [(1.0, 2.0), (1.0, 2.0)])
    same = Found([1.0, 3.0], 50, [(1.0, 2.0), (1.0, 2.000001)])
    row = compared(plain, same, 1e-5)
    assert (row["faster"].median, row["memory"]) == (2, 0.5)
    assert row["differ"] == pytest.approx(5e-7, rel=1e-3)
    assert compared(plain, same, 0.0).keys() == {"differ", "note"}
    other = Found([1.0, 3.0], 50, [(1.0, 2.0), (1.1, 2.0)])
    assert compared(plain, other, 1e-2).keys() == {"differ", "note"}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of each group at toy size, as they stand in the JSON file."""
    out = tmp_path_factory.mktemp("perf") / "perf.json"
    names = ["pruning", "alternatives", "packing", "loader", "savings"]
    assert command.main(["--size", "toy", "--groups", *names, "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    return {name: group["rows"] for name, group in json.loads(out.read_text())["groups"].items()}


def test_pruning_is_timed_beside_its_step(groups: dict[str, list[dict[str, Any]]]) -> None:
    rows = groups["pruning"]
    assert [(row["tuning"], row["rate"]) for row in rows] == [(t, q) for t in ("full", "lora") for q in (0.0, 0.75)]
    for row in rows:
        assert row["waits"] == 0 < row["step_waits"]
        assert row["share"]["median"] == pytest.approx(
            row["pruning_ms"]["median"] / 1000 / row["seconds"]["median"], rel=1e-6
        )
        assert row["launched"] > 10
    assert [row["kept"] for row in rows[:2]] == sorted((row["kept"] for row in rows[:2]), reverse=True)


def test_all_ways_prune_the_same_batch(groups: dict[str, list[dict[str, Any]]]) -> None:
    rows = {row["way"]: row for row in groups["alternatives"]}
    assert list(rows) == list(WAYS)
    assert rows["evs_train"]["relative"]["median"] == 1
    assert len({rows[way]["kept"] for way in ("evs_train", "boolean mask", "masked, not dropped")}) == 1
    assert rows["masked, not dropped"]["computed"] > rows["boolean mask"]["computed"]


def test_a_mix_is_trained_on(groups: dict[str, list[dict[str, Any]]]) -> None:
    rows = groups["packing"]
    assert [row["batches"] for row in rows] == [one.name for one in PLANS["toy"].batchings]
    assert rows[0]["gain"]["median"] == 1
    assert all(row["tokens_per_second"]["median"] > 0 for row in rows)


def test_waiting_is_what_the_trainer_says(groups: dict[str, list[dict[str, Any]]]) -> None:
    rows = groups["loader"]
    assert [row["workers"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 < row["wait_ms"]["median"] / 1000 < row["seconds"]["median"]
        assert 0 < row["share"]["median"] < 1


def test_each_saving_is_the_same_step_made_cheaper(groups: dict[str, list[dict[str, Any]]]) -> None:
    rows = {(row["saving"], row["rate"]): row for row in groups["savings"]}
    measured = {name: row for name, row in rows.items() if "faster" in row}
    assert {row["note"] for name, row in rows.items() if name not in measured} == {"not measured on this device"}
    assert len(measured) == 14
    assert all(row["before_seconds"]["median"] > 0 for row in measured.values())
    memory = {name: row["memory"] for name, row in measured.items() if "memory" in row}
    assert memory[("logits of supervised tokens", 0)] < memory[("logits of supervised tokens", 0.75)] < 1
    assert memory[("passes over one encoding", 0.75)] > 1  # all passes at once
    parts = [memory[(f"{part} recomputed", 0.75)] for part in ("both", "language model", "vision tower")]
    assert parts[0] == min(parts)
    assert max(parts) < 1
    for tuning in ("full", "lora"):
        reads = rows[(f"kept features: epoch that reads, {tuning}", 0.75)]
        assert reads["limit"] > 1
        assert sum(reads["sections"].values()) - reads["sections"]["cpu_seconds"] == pytest.approx(
            reads["seconds"]["median"], rel=0.01
        )
        after = rows[(f"kept features: epoch that reads, after it, {tuning}", 0.75)]
        writes = rows[(f"kept features: epoch that writes, {tuning}", 0.75)]
        assert (after["before_seconds"], after["seconds"]) == (writes["seconds"], reads["seconds"])
