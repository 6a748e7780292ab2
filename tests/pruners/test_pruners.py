"""What holds for every pruner of the table, and what each of the small ones keeps."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.perf.waits import noted_waits
from evs_train import evs
from evs_train.errors import RecipeError
from evs_train.pruners import PRUNERS, Method, build_pruner, method_name
from evs_train.pruners.base import Choice, Pruner, Video

RATES = (0.0, 0.3, 0.75, 0.9, 0.99)
SHAPES = ((1, 9), (2, 4), (8, 16), (20, 16), (7, 5))


VARIANTS: list[Method] = [
    {"kind": "evs-threshold", "similarity": 0.3},
    {"kind": "nvidia", "metric": "cos"},
    {"kind": "nvidia", "variant": "iterative"},
    {"kind": "nvidia", "level": "pixels"},
    {"kind": "nvidia", "level": "pixels", "variant": "iterative"},
]


@pytest.fixture(params=[*sorted(PRUNERS), *VARIANTS], ids=str)
def pruner(request: pytest.FixtureRequest) -> Pruner:
    return build_pruner(request.param)


def video_of(embeds: Tensor, seed: int = 0) -> Video:
    """With all that a pruner may look at; pixels change as the embeddings do."""
    change = (embeds[1:].float() - embeds[:-1].float()).abs().mean(dim=-1)
    return Video(embeds, seed, torch.cat([change.new_zeros(1, embeds.shape[1]), change]))


def drifting(num_units: int, per_unit: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(T, N, 24) embeddings of which some places stand still, some drift and some jump in the middle."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, per_unit, 24, generator=generator).repeat(num_units, 1, 1)
    steps = torch.randn(num_units, per_unit, 24, generator=generator).cumsum(0)
    embeds += 0.3 * steps * (torch.arange(per_unit) % 3 == 0)[None, :, None]
    embeds[num_units // 2 :, 1::3] = torch.randn(1, len(range(1, per_unit, 3)), 24, generator=generator)
    return embeds.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_units", "per_unit"), SHAPES)
def test_as_many_stay_as_the_host_planned(pruner: Pruner, num_units: int, per_unit: int, dtype: torch.dtype) -> None:
    embeds = drifting(num_units, per_unit, dtype)
    for rate in RATES:
        count = pruner.num_retained(num_units, per_unit, rate)
        assert 1 <= count <= num_units * per_unit
        choice = pruner.choose(video_of(embeds, seed=3), rate)
        assert choice.index.dtype == torch.int64
        assert choice.index.tolist() == sorted(set(choice.index.tolist()))
        assert len(choice.index) == count
        assert 0 <= int(choice.index[0]) <= int(choice.index[-1]) < num_units * per_unit
        if choice.seen is not None:
            assert pruner.hides
            assert (choice.seen.dtype, choice.seen.shape) == (torch.bool, choice.index.shape)
            assert choice.visible.tolist() == choice.index[choice.seen].tolist() != []
        if choice.groups is not None:
            assert choice.groups.shape == (num_units * per_unit,)
            assert choice.groups[choice.index].tolist() == list(range(count)), "a kept token is in its own group"
            assert 0 <= int(choice.groups.min()) <= int(choice.groups.max()) <= count
        merged = choice.merged(embeds.flatten(0, 1))
        assert merged.shape == (count, 24)
        assert merged.dtype == dtype
        assert bool(merged.isfinite().all())


def test_nothing_changes_at_rate_0(pruner: Pruner) -> None:
    embeds = drifting(8, 16, torch.bfloat16)
    choice = pruner.choose(video_of(embeds), 0.0)
    assert choice.index.tolist() == list(range(8 * 16))
    assert torch.equal(choice.merged(embeds.flatten(0, 1)), embeds.flatten(0, 1))
    assert choice.seen is None or bool(choice.seen.all())


def test_the_choice_depends_on_its_arguments_alone(pruner: Pruner) -> None:
    embeds = drifting(8, 16)
    torch.manual_seed(0)
    first = pruner.choose(video_of(embeds, seed=3), 0.75)
    torch.manual_seed(1)
    again = pruner.choose(video_of(embeds.clone(), seed=3), 0.75)
    for one, other in ((first.index, again.index), (first.groups, again.groups), (first.seen, again.seen)):
        assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]


def test_the_host_waits_for_nothing(pruner: Pruner) -> None:
    with FakeTensorMode(), noted_waits(torch.device("cpu")) as waits:
        embeds = torch.empty(8, 16, 24, device="cuda", requires_grad=True)
        choice = pruner.choose(video_of(embeds.detach()), 0.75)
        merged = choice.merged(embeds.flatten(0, 1))
        assert merged.shape == (pruner.num_retained(8, 16, 0.75), 24)
        assert merged.device.type == "cuda"
    assert waits.places == []


def test_gradients_reach_what_stays(pruner: Pruner) -> None:
    embeds = drifting(8, 16).requires_grad_()
    choice = pruner.choose(video_of(embeds.detach()), 0.75)
    choice.merged(embeds.flatten(0, 1)).sum().backward()
    assert embeds.grad is not None
    reached = embeds.grad.flatten(0, 1).abs().sum(1) > 0
    stays = torch.zeros(8 * 16, dtype=torch.bool)
    stays[choice.index] = True
    if choice.groups is not None:
        stays |= choice.groups < len(choice.index)
    assert torch.equal(reached, stays)


def test_evs_is_the_choice_of_serving() -> None:
    embeds = drifting(8, 16, torch.bfloat16)
    for rate in RATES:
        assert torch.equal(build_pruner("evs").choose(Video(embeds), rate).index, evs.select_tokens(embeds, rate))


def test_random_sets_are_all_equally_likely() -> None:
    pruner, embeds = build_pruner("random"), torch.zeros(4, 4, 2)
    drawn = [pruner.choose(Video(embeds, seed=seed), 0.75).index for seed in range(800)]
    often = torch.bincount(torch.cat(drawn), minlength=16)
    assert float((often - 200).abs().max()) < 6 * (800 * 0.25 * 0.75) ** 0.5
    assert len({tuple(one.tolist()) for one in drawn}) > 500


def test_whole_units_are_evenly_apart_and_fill_the_budget() -> None:
    pruner = build_pruner("frames")
    chosen = pruner.choose(Video(torch.zeros(20, 16, 2)), 0.7).index
    assert len(chosen) == 96
    assert sorted(set((chosen // 16).tolist())) == [0, 3, 6, 10, 13, 16]
    cut = pruner.choose(Video(torch.zeros(8, 4, 2)), 0.7).index  # 9 tokens: two units and a quarter
    assert cut.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 20]


def test_a_mean_is_taken_where_tokens_are_merged() -> None:
    rows = torch.tensor([[1.0], [3.0], [10.0], [5.0], [7.0]])
    choice = Choice(torch.tensor([0, 3]), groups=torch.tensor([0, 0, 2, 1, 1]))
    assert choice.merged(rows).tolist() == [[2.0], [6.0]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("evz", "evs.method: unknown pruner 'evz'; did you mean evs?"),
        ({"kind": "evz"}, "evs.method.kind: unknown pruner 'evz'; did you mean evs?"),
        ({"rate": 0.5}, "evs.method.kind: unknown pruner None"),
        ({"kind": "evs", "tau": 0.5}, "evs.method.tau: unknown key of evs; it has no options"),
    ],
)
def test_what_is_no_method_is_refused(spec: Method, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_pruner(spec)
    assert said in f"{caught.value.message}; {caught.value.hint}"


def test_names_are_known_without_torch() -> None:
    assert method_name({"kind": "random", "anything": 1}) == "random"  # options are the pruner's to judge


def test_the_page_on_adding_one_has_one_that_works() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "adding-a-pruner.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "every_third"}
    sys.modules["every_third"] = ModuleType("every_third")  # dataclasses look their module up
    exec(compile(code, "adding-a-pruner.md", "exec"), names)
    embeds = drifting(8, 16)
    for rate in RATES:
        index = names["PRUNER"](start=2).choose(Video(embeds), rate).index
        assert index.tolist() == sorted(set(index.tolist()))
        assert len(index) == names["PRUNER"]().num_retained(8, 16, rate)
    with pytest.raises(ValueError, match="start must be"):
        names["PRUNER"](start=-1)
