"""The EVS arithmetic against the published table, a slow reference and the rule's corner cases."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evs_train.evs import FIRST_UNIT_SCORE, dissimilarity, retained_tokens, select_tokens
from tests.parity.rig import slow_retained


@pytest.mark.parametrize(
    ("num_units", "per_unit", "rate", "kept"),
    [
        (1, 256, 0.7, 256),
        (3, 256, 0.7, 256),
        (4, 256, 0.7, 307),
        (8, 256, 0.7, 614),
        (64, 256, 0.7, 4915),
        (16, 299, 0.75, 1196),
        (5, 35, 0.3, 122),
        (100, 100, 0.9, 999),  # a double, truncated: not 1000
        (10, 100, 0.99, 100),
        (32, 299, 0.8, 1913),
        (1, 5, 0.8, 5),  # int(5 * (1 - .8)) is 0: the first unit holds
        (1, 90, 0.3, 90),
        (9, 10, 0.3, 62),
        (7, 13, 0.0, 91),
    ],
)
def test_retained_tokens_are_the_engines(num_units: int, per_unit: int, rate: float, kept: int) -> None:
    assert retained_tokens(num_units, per_unit, rate) == kept


@pytest.mark.parametrize("arguments", [(0, 4, 0.5), (4, 0, 0.5), (4, 4, 1.0), (4, 4, -0.1), (4, 4, float("nan"))])
def test_senseless_arguments_are_refused(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"pruning_rate|unit"):
        retained_tokens(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("content", ["random", "static", "ties", "drift", "zeros"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.75, 0.9, 0.99])
def test_selection_equals_the_slow_reference(dtype: torch.dtype, content: str, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 12, 16, generator=generator)
    embeds = {
        "random": torch.randn(7, 12, 16, generator=generator),
        "static": base.expand(7, -1, -1),
        "ties": base * torch.tensor([1.0, 1, -1, -1, 1, 1, -1]).view(7, 1, 1),
        "drift": base + 0.01 * torch.randn(7, 12, 16, generator=generator).cumsum(0),
        "zeros": torch.zeros(7, 12, 16),
    }[content].to(dtype)
    assert select_tokens(embeds, rate).tolist() == slow_retained(embeds, rate)


def test_unit_zero_is_kept_whole_and_order_is_raster() -> None:
    kept = select_tokens(torch.randn(6, 10, 8), 0.75)
    assert kept[:10].tolist() == list(range(10))
    assert bool((kept[1:] > kept[:-1]).all())
    assert kept.dtype == torch.int64


def test_scores_are_in_the_dtype_given_and_carry_no_gradient() -> None:
    embeds = torch.randn(3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    scores = dissimilarity(embeds)
    assert scores.dtype == torch.bfloat16
    assert scores.shape == (3, 4)
    assert not scores.requires_grad
    assert scores[0].tolist() == [FIRST_UNIT_SCORE] * 4


def test_the_unit_just_before_counts_not_the_last_kept_one() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    embeds = torch.stack([a, b, b, a]).view(4, 1, 2)  # unit 2 repeats unit 1, unit 3 differs from unit 2
    assert dissimilarity(embeds).flatten().tolist() == [FIRST_UNIT_SCORE, 1.0, 0.0, 1.0]
    assert select_tokens(embeds, 0.25).tolist() == [0, 1, 3]


def test_autocast_does_not_change_the_dtype_of_the_scores() -> None:
    """CUDA's autocast runs the cosine in float32, which would choose other tokens than serving. Needs no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            embeds = torch.empty(3, 4, 8, dtype=torch.bfloat16, device="cuda")
            upcast = torch.nn.functional.cosine_similarity(embeds[1:], embeds[:-1], dim=-1).dtype
            assert (upcast, dissimilarity(embeds).dtype) == (torch.float32, torch.bfloat16)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_selection_never_reads_a_value_back() -> None:
    """Fake tensors have shapes and no values: any `.item()`, mask indexing or data-dependent shape raises."""
    with FakeTensorMode():
        kept = select_tokens(torch.empty(8, 36, 64), 0.75)
        assert kept.shape == (retained_tokens(8, 36, 0.75),)
