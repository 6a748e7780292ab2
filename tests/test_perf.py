"""The benchmarks of performance: sides take turns, the limit counts what torch counts, all of it runs at toy size."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.perf import __main__ as command
from benchmarks.perf import estimates, harness, scale, step
from benchmarks.perf.harness import Bench, Column, Spread, alternate, as_table, bytes_of, peak_memory, ratio
from benchmarks.perf.limit import Product, products, tokens_of
from benchmarks.perf.live import LiveTrainer
from benchmarks.perf.runs import ScriptedRun, Step, StepClock, Workload, estimate, expected_peak, held_by
from benchmarks.perf.shapes import TOY, TOY_NEMOTRON, Shape
from evs_train.trainer import UptrainTrainer

CPU = torch.device("cpu")


def test_sides_take_turns_and_each_is_first_equally_often() -> None:
    order: list[str] = []

    def side(name: str) -> harness.Side:
        return lambda: float(order.append(name) or len(order))

    times = alternate({name: side(name) for name in "abc"}, rounds=3, warmup=1)
    assert order == list("abcbcacababc")
    assert times == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is three times as slow in one round changes no ratio."""
    assert ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == Spread(2.0, 2.0, 2.0, 3)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert f"{Spread(1.25, 1.0, 2.0, 3):.1f}" == "1.2 [1.0..2.0]"


def test_peak_memory_is_that_of_tensors() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        first = torch.zeros(5000)
        del first
        second = torch.zeros(3000)
        third = second + 1
        del second, third

    found = peak_memory(work, CPU, held=bytes_of([kept, kept[:10]]))
    assert 0 <= found - 4 * (1000 + 6000) < 100  # and single numbers


def test_a_table_has_a_line_for_each_row() -> None:
    rows = [{"name": "a", "x": 1.5}, {"name": "bb", "y": Spread(2.0, 1.0, 3.0, 2)}]
    table = as_table([Column("name", "side"), Column("x", "x", ".2f"), Column("y", "y", ".0f")], rows)
    assert table.splitlines() == ["side     x         y", "a     1.50", "bb          2 [1..3]"]


def counted(
    shape: Shape,
    tuning: Any,
    rate: float,
    folder: Path,
    *,
    freeze: list[str] | None = None,
    checkpointing: bool = False,
) -> tuple[FlopCounterMode, list[Product]]:
    """What torch counts of one forward and backward, and what the limit has for it if all that is computed counts."""
    run = ScriptedRun(Workload(shape, tuning, checkpointing), [Step((8, 6), rate)], Bench("toy", CPU, folder))
    recipe = run.recipe
    chosen = recipe.tuning if freeze is None else recipe.tuning.model_copy(update={"freeze": freeze})
    eager = recipe.model.model_copy(update={"attn_implementation": "eager"})
    run.recipe = recipe.model_copy(update={"model": eager, "tuning": chosen})
    trainer = run.build_trainer()
    model = trainer.model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.hook.model.disable_input_require_grads()  # a need of reentrant checkpoints, which costs backward passes
    trainer.hook.model.set_experts_implementation("eager")  # torch counts no grouped products
    trainer.hook.attach(model)
    batch = run.collator([run.stream[0]])
    plan = batch["plan"]
    with FlopCounterMode(display=False) as counter:
        loss, outputs = trainer.compute_loss(model, batch, True, torch.tensor(sum(plan.num_supervised)))
        loss.backward()
    rows, length = plan.shape
    tokens = tokens_of([plan], run.family)
    computed = dataclasses.replace(
        tokens,
        of_part=tokens.of_part | {"language_model": rows * length},
        pairs=tokens.pairs | {"language_model": rows * length**2},
        supervised=outputs["logits"].shape[:-1].numel(),
    )
    return counter, list(products(model, run.family, computed, checkpointing=checkpointing))


@pytest.mark.parametrize("rate", [0.0, 0.75])
@pytest.mark.parametrize(
    ("tuning", "freeze", "checkpointing"),
    [("full", None, False), ("full", [], False), ("lora", None, False), ("full", None, True), ("lora", None, True)],
)
def test_the_limit_counts_what_torch_counts(
    rate: float, tuning: str, freeze: list[str] | None, checkpointing: bool, tmp_path: Path
) -> None:
    """Dense and pruned, forward and backward, with gradients, adapters and recomputation."""
    counter, listed = counted(TOY, tuning, rate, tmp_path, freeze=freeze, checkpointing=checkpointing)
    assert sum(one.flops * one.passes for one in listed) == counter.get_total_flops()


def test_the_limit_counts_the_matrices_of_experts_and_mamba_layers(tmp_path: Path) -> None:
    """Not the recurrence: torch counts how its kernel goes about it, and a depthwise convolution as a dense one.

    The limit lets the tokens that RADIO puts before the patches through its patch projection, too: 0.14 %.
    """
    counter, listed = counted(TOY_NEMOTRON, "lora", 0.75, tmp_path)
    found = counter.get_flop_counts()["Global"]
    matrices = sum(one.flops * one.passes for one in listed if one.bytes and not one.name.endswith("conv1d"))
    assert matrices == pytest.approx(found[torch.ops.aten.mm] + found[torch.ops.aten.addmm], rel=2e-3)
    recurrences = [one for one in listed if one.name.endswith("in_proj.base_layer") and not one.bytes]
    assert [one.passes for one in recurrences] == [3, 3]  # forward and twice that backward, in the first layer, too


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    measured = list(estimates.measured(estimates.RESULTS / "perf_cpu.json"))
    for lines, count in ((estimates.limits(), 5), (estimates.memories(), 4), (measured, len(measured))):
        missing = [line for line in islice(lines, count) if line not in page]
        assert not missing, "put what `python -m benchmarks.perf.estimates` prints into docs/performance.md"
    for line in measured[2:]:
        assert 90 <= int(line.split("|")[-2].strip(" %")) <= 110, line


def test_estimates_stand_beside_what_was_measured(tmp_path: Path, bench: Bench) -> None:
    """As the step's own figures have them, and as they are now: without the pixels, on a CPU."""
    work = Workload(TOY, "full")
    run = ScriptedRun(work, [Step((64,), 0.5)], bench)
    tokens = tokens_of(run.plan_batches(1), run.family)
    said = estimate(run, run.planned_model(), tokens)
    assert expected_peak(said, CPU) == said.total - said.inputs < expected_peak(said, torch.device("cuda"))
    kept = {"model": TOY.name, "tuning": "full", "frames": 64, "rate": 0.5, "peak_gib": expected_peak(said, CPU)}
    groups = {
        "step": [kept, {**kept, "frames": 32}, {"rate": 0.0, "frames": 64, "note": "out of memory"}],
        "scale": [{**kept, "frames": 512}, {"rate": 0.0, "held_gib": 1.0}],
    }
    path = tmp_path / "perf.json"
    path.write_text(json.dumps({"size": "toy", "groups": {name: {"rows": rows} for name, rows in groups.items()}}))
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in list(estimates.measured(path))[2:]]
    assert [cells[2] for cells in found] == ["64", "512"]
    assert found[0][-1] == "100%"
    assert int(found[1][-1].strip("%")) > 110


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("toy", CPU, tmp_path / "bench", say=lambda line: None)


def test_a_run_shows_what_its_script_says(bench: Bench) -> None:
    """Frames and rates of each step, as the trainer's own counts have them; each step is timed or weighed."""
    script = [Step((8, 6), 0.0), Step((6, 6), 0.75), Step((8, 6), 0.75)]
    run = ScriptedRun(Workload(TOY, "full"), script, bench)
    clock = StepClock(CPU, weighed=[2])
    trainer = run.build_trainer()
    trainer.add_callback(clock)
    trainer.train()
    plans = run.plan_batches(len(script))
    assert [plan.rates for plan in plans] == [(0.0, 0.0), (0.75, 0.75), (0.75, 0.75)]
    assert [[2 * video.item.num_units for video in plan.videos] for plan in plans] == [[8, 6], [6, 6], [8, 6]]
    assert trainer.tally.total["tokens"] == tokens_of(plans, run.family).of_part["language_model"]
    assert trainer.tally.total["video_tokens_before"] == 16 * (7 + 6 + 7)
    assert [(one.seconds is None, one.peak is None) for one in clock.steps] == [
        (False, True),
        (False, True),
        (True, False),
    ]
    held = bytes_of(held_by(trainer.model, trainer.optimizer))
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trained = 4 * sum(count for count, trains in sizes if trains)
    assert held == pytest.approx(4 * sum(count for count, _ in sizes) + 2 * trained, rel=1e-2)
    assert clock.steps[2].peak is not None
    assert clock.steps[2].peak > held + trained  # and gradients, and activations


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    plain = UptrainTrainer.training_step

    def training_step(self: UptrainTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        if sum(inputs["plan"].num_tokens) > num_tokens:
            raise torch.OutOfMemoryError("too long")
        return plain(self, model, inputs, *args)

    monkeypatch.setattr(UptrainTrainer, "training_step", training_step)


def test_rates_that_do_not_fit_leave_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 130)
    monkeypatch.setitem(step.PLANS, "toy", step.Plan((Workload(TOY, "full"),), (8,), 1))
    rows = step.run(bench)
    assert [(row["rate"], row.get("note"), "seconds" in row) for row in rows] == [
        (0.0, "out of memory", False), (0.5, None, True), (0.75, None, True), (0.9, None, True)
    ]  # fmt: skip
    assert not any("speedup" in row for row in rows)


def test_lengths_that_do_not_fit_leave_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 250)
    rows = [row for row in scale.run(bench) if "frames" in row]
    assert [(row["rate"], row["frames"], row.get("note")) for row in rows] == [
        (0.0, 8, None), (0.0, 16, "out of memory"), (0.75, 8, None), (0.75, 16, None), (0.75, 32, "out of memory")
    ]  # fmt: skip


def test_the_fit_is_the_power_law() -> None:
    frames = (8, 16, 32, 64)
    law = scale.Law.through(frames, [3.0, *(2 * count**1.5 for count in frames[1:])])  # the short half does not count
    assert (law.factor, law.exponent) == (pytest.approx(2), pytest.approx(1.5))
    assert law.frames_for(2 * 1000.5**1.5) == 1000


def test_trainers_in_threads_take_single_steps_and_report_errors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ScriptedRun(Workload(TOY, "full"), [Step((8,), 0.0), Step((8,), 0.75), Step((8,), 0.0)], bench)
    trainer = run.build_trainer()
    live = LiveTrainer(trainer, CPU)
    assert trainer.state.global_step == 0
    assert live.step() > 0
    assert trainer.state.global_step == 1
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        live.step()
    live.stop()


def test_all_groups_run_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, on a CPU: all that a GPU would run but its kernels."""
    out = tmp_path / "perf.json"
    assert command.main(["--size", "toy", "--groups", "scale", "--out", str(out)]) == 0
    first = json.loads(out.read_text())
    assert command.main(["--size", "toy", "--groups", "step", "overhead", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["groups"].pop("scale") == first["groups"]["scale"]  # not measured again, and still there
    assert list(written["groups"]) == ["step", "overhead"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    for group in (*written["groups"].values(), *first["groups"].values()):
        assert group["environment"]["versions"]["torch"]
        assert group["environment"]["device"] == "cpu"
    assert capsys.readouterr().out.count("tiny Qwen3-VL") >= 6  # tables
    of_step = written["groups"]["step"]["rows"]
    assert [row["rate"] for row in of_step] == 2 * list(step.RATES)
    for dense, *pruned in (of_step[:4], of_step[4:]):
        assert (dense["limit"], dense["memory"], dense["speedup"]["median"]) == (1, 1, 1)
        limits = [row["limit"] for row in pruned]
        assert 1 < limits[0] < limits[1] <= limits[2]
        assert all(row["efficiency"]["median"] == row["speedup"]["median"] / row["limit"] for row in pruned)
        assert all(row["memory"] < 1 and 0 < row["estimate_gib"] < dense["estimate_gib"] for row in pruned)
    (over,) = written["groups"]["overhead"]["rows"]
    assert over["losses_differ"] < 1e-6
    assert over["evs_train"]["count"] == over["trainer"]["count"] == 2
    measured = [row for row in first["groups"]["scale"]["rows"] if "seconds" in row]
    assert [(row["rate"], row["frames"]) for row in measured] == [(q, f) for q in (0, 0.75) for f in (8, 16, 32)]
    for name in ("peak_gib", "estimate_gib"):
        assert 0 < measured[0][name] < measured[1][name] < measured[2][name]
