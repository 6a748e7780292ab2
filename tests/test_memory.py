"""The estimate of memory against what a model really allocates, and how DeepSpeed divides it."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.perf.harness import PeakMemory, bytes_of
from evs_train.activations import Layer
from evs_train.config import Part
from evs_train.inputs import DEEPSPEED_DIR
from evs_train.memory import GIB, MemoryEstimate, estimate_memory, most_of_step
from evs_train.objectives import cross_entropies, teacher_kl
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of


@pytest.fixture
def run_of(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(family: str = "qwen3_vl", **options: Any) -> Run:
        return Run(recipe_of(arguments(tiny_checkpoint(family), mixed_rows, tmp_path / "run", **options)))

    return make


COUNTS = {"num_tokens": 100, "num_video_tokens": 0, "num_image_tokens": 0, "num_logits": 0, "num_processes": 1}


def estimate(run: Run, deepspeed: str | Mapping[str, Any] | None = None, **counts: int) -> MemoryEstimate:
    if isinstance(deepspeed, str):
        deepspeed = json.loads((DEEPSPEED_DIR / f"{deepspeed}.json").read_text())
    return estimate_memory(run.planned_model(), run.family, run.recipe, deepspeed, **COUNTS | counts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_gradients_and_moments_are_those_of_the_model(
    run_of: Callable[..., Run], method: str, dtype: str
) -> None:
    run = run_of(tuning__method=method, model__dtype=dtype)
    model = run.load_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = estimate(run)
    assert found.weights * GIB == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.gradients * GIB == sum(p.numel() * p.element_size() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found.optimizer * GIB == sum(moment.numel() * moment.element_size() for moment in moments)


def test_deepspeed_divides_it(run_of: Callable[..., Run]) -> None:
    run = run_of(model__dtype="bfloat16", deepspeed="zero2", tuning__freeze=[])
    parameters = sum(p.numel() for p in run.planned_model().parameters())
    two, three = estimate(run, "zero2", num_processes=4), estimate(run, "zero3", num_processes=4)
    assert (two.weights * GIB, two.gradients * GIB) == (2 * parameters, 2 * parameters / 4)
    assert three.weights * GIB == 2 * parameters / 4
    assert two.optimizer * GIB == three.optimizer * GIB == 12 * parameters / 4
    offloaded = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    less = estimate(run, offloaded, num_processes=4)
    assert (less.optimizer, less.weights) == (0, three.weights)


GIVEN: dict[Part, int] = {"vision": 10, "projector": 4, "language_model": 3}


def layer(part: Part, **bytes_of: Any) -> Layer:
    nothing: dict[str, Any] = dict.fromkeys(("input", "kept", "running", "working", "made", "casts", "trained"), 0)
    return Layer(part, **{"recomputes": False, **nothing, **bytes_of})


def most(*layers: Layer, logits: float = 0.0, stay: bool = False) -> tuple[float, float]:
    found = most_of_step(layers, GIVEN, logits=logits, gradient_bytes=2, gradients_stay=stay)
    return found.activations, found.step


def test_a_part_with_nothing_trained_before_it_takes_memory_only_while_it_runs() -> None:
    tower = [layer("vision", input=1, kept=50, running=7, working=9)] * 2
    text = layer("language_model", kept=20, working=5, trained=100)
    assert most(*tower, text) == (max(10 * (1 + 7), 3 * (20 + 5)), 3 * (20 + 5) + 200)
    projector = layer("projector", kept=2, made=11)
    assert most(*tower, projector, text) == (10 * (1 + 7) + 4 * 11, 3 * (20 + 5) + 200)
    assert most(layer("vision", trained=1), *tower, text)[0] == 2 * 10 * 50 + max(10 * 9, 3 * (20 + 5))


def test_layers_that_recompute_keep_their_input_and_one_of_them_the_rest() -> None:
    plain = [layer("language_model", input=4, kept=20, working=5, trained=1)] * 3
    again = [dataclasses.replace(one, recomputes=True) for one in plain]
    assert most(*plain)[0] == 3 * (3 * 20 + 5)
    assert most(*again)[0] == 3 * (3 * 4 + 20 + 5)
    assert most(*again, logits=1000.0)[0] == 3 * 3 * 4 + 1000


def test_gradients_come_while_activations_go() -> None:
    """The worst moment is at one end or the other, unless gradients stay from what was before."""
    layers = [layer("language_model", kept=20, casts=6, trained=10)] * 3
    assert most(*layers) == (3 * 66, 3 * 66 + 20)
    heavy = [layer("language_model", kept=20, casts=6, trained=1000)] * 3
    assert most(*heavy) == (3 * 66, 66 + 6000)
    assert most(*heavy, stay=True) == (3 * 66, 3 * 66 + 6000)


@pytest.mark.parametrize(
    "options",
    [
        {"tuning__freeze": []},
        {"tuning__freeze": ["vision"]},
        {"tuning__freeze": [], "train__gradient_checkpointing": True},
        {"tuning__freeze": [], "train__gradient_checkpointing": ["vision"]},
        {"tuning__method": "lora"},
        {"tuning__method": "lora", "train__gradient_checkpointing": True},
        {"tuning__method": "lora", "tuning__lora": {"parts": ["vision"], "targets": ["qkv", "proj"]}},
    ],
)
def test_a_step_takes_what_is_estimated(options: dict[str, Any], run_of: Callable[..., Run]) -> None:
    """Forward and backward of a row, as torch's profiler counts what is allocated; the pixels are there before."""
    run = run_of(data__num_frames=16, train__batch_size=1, train__steps=1, evs__rate=0.5, **options)
    trainer = run.build_trainer()
    peak, held = PeakMemory(torch.device("cpu")), bytes_of([*trainer.model.parameters(), *trainer.model.buffers()])
    found: list[int] = []
    step = trainer.training_step

    def weighed(*args: Any, **kwargs: Any) -> Tensor:
        peak.begin(held)
        loss = step(*args, **kwargs)
        found.append(peak.end())
        return loss

    trainer.training_step = weighed  # type: ignore[method-assign]
    trainer.train()
    (plan,) = run.plan_batches(1)
    said = estimate(
        run,
        num_tokens=plan.shape[1],
        num_video_tokens=plan.video_tokens_before,
        num_logits=sum(plan.num_supervised),
    )
    assert plan.video_tokens_before == sum(one.item.num_tokens for one in plan.items)
    # The pixels themselves are what Qwen's first matrix keeps in float32, where a copy is counted.
    uncopied = said.inputs if options.get("tuning__freeze") == [] else 0
    assert (said.weights + said.step - uncopied) * GIB == pytest.approx(found[0], rel=0.06)


class LargestTotal(TorchDispatchMode):
    """Bytes of the tensors that operations have made, when there were most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.live.update(one.untyped_storage() for one in tree_leaves(made) if isinstance(one, Tensor))
        self.most = max(self.most, sum(storage.nbytes() for storage in self.live))
        return made


@pytest.mark.parametrize(("teacher", "num_bytes"), [(False, 12), (True, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_logit(teacher: bool, num_bytes: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(40, 1, dtype=dtype, requires_grad=True), torch.ones(5000, 1, dtype=dtype)
    targets = torch.zeros(40, dtype=torch.int64)

    def loss() -> Tensor:
        with torch.no_grad():
            expected = (hidden @ weight.T).float() if teacher else None
        logits = (hidden @ weight.T).float()  # under autocast accelerate does so with every output
        summed = cross_entropies(logits, targets).sum()
        return summed if expected is None else summed + teacher_kl(logits, expected, 2.0)

    with LargestTotal() as total:
        loss().backward()
    assert total.most / (40 * 5000) == pytest.approx(num_bytes, rel=0.02)
