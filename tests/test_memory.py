"""The estimate of memory against what a model really allocates, and how DeepSpeed divides it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evs_train.inputs import DEEPSPEED_DIR
from evs_train.memory import GIB, MemoryEstimate, estimate_memory
from evs_train.models import FAMILIES
from evs_train.objectives import cross_entropies, teacher_kl
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of


@pytest.fixture
def run_of(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(family: str = "qwen3_vl", **options: Any) -> Run:
        return Run(recipe_of(arguments(tiny_checkpoint(family), mixed_rows, tmp_path / "run", **options)))

    return make


def estimate(
    run: Run, deepspeed: str | None = None, num_processes: int = 1, num_tokens: int = 100, num_logits: int = 0
) -> MemoryEstimate:
    config = None if deepspeed is None else json.loads((DEEPSPEED_DIR / f"{deepspeed}.json").read_text())
    model = run.planned_model()
    return estimate_memory(
        model,
        run.family,
        run.recipe,
        config,
        num_tokens=num_tokens,
        num_logits=num_logits,
        num_processes=num_processes,
    )


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
    two, three = estimate(run, "zero2", 4), estimate(run, "zero3", 4)
    assert (two.weights * GIB, two.gradients * GIB) == (2 * parameters, 2 * parameters / 4)
    assert three.weights * GIB == 2 * parameters / 4
    assert two.optimizer * GIB == three.optimizer * GIB == 12 * parameters / 4
    offloaded = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    model = run.planned_model()
    less = estimate_memory(model, run.family, run.recipe, offloaded, num_tokens=1, num_logits=1, num_processes=4)
    assert (less.optimizer, less.weights) == (0, three.weights)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_grow_with_tokens_and_shrink_with_checkpointing(family: str, run_of: Callable[..., Run]) -> None:
    plain, checkpointed = run_of(family), run_of(family, train__gradient_checkpointing=True)
    assert estimate(plain, num_tokens=200).activations == pytest.approx(2 * estimate(plain).activations)
    config = plain.family.config.get_text_config()
    logits = estimate(plain, num_logits=5).activations - estimate(plain).activations
    assert logits * GIB == pytest.approx(12 * 5 * config.vocab_size)
    saved = estimate(plain).activations - estimate(checkpointed).activations
    layers, hidden = config.num_hidden_layers, config.hidden_size
    assert saved * GIB == pytest.approx(100 * 2 * hidden * (34 * layers - 2 * layers - 34))


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
