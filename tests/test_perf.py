"""The benchmarks of performance: sides take turns, the limit counts what torch counts, all of it runs at toy size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.perf import __main__ as command
from benchmarks.perf import harness
from benchmarks.perf.harness import Bench, Column, Spread, alternate, as_table, bytes_of, peak_memory, ratio
from benchmarks.perf.limit import Product, products, tokens_of
from benchmarks.perf.runs import ScriptedRun, Step, Workload
from benchmarks.perf.shapes import TOY, TOY_NEMOTRON, Shape

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
        outputs = model(**batch)
        outputs["loss"].backward()
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
