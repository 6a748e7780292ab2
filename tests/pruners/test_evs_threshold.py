"""Which of the tokens that EVS keeps are hidden. That hiding is dropping: tests/parity/test_hiding.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from evs_train import evs
from evs_train.errors import RecipeError
from evs_train.pruners import build_pruner
from evs_train.pruners.base import Video
from tests.pruners.test_pruners import drifting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", [0.3, 0.9, 0.99])
def test_what_is_more_alike_than_the_threshold_is_hidden(similarity: float, dtype: torch.dtype) -> None:
    embeds = drifting(8, 16, dtype)
    pruner = build_pruner({"kind": "evs-threshold", "similarity": similarity})
    choice = pruner.choose(Video(embeds), 0.3)
    assert torch.equal(choice.index, evs.select_tokens(embeds, 0.3)), "what is kept is what EVS keeps"
    assert choice.seen is not None
    for place, seen in zip(choice.index.tolist(), choice.seen.tolist(), strict=True):
        unit, token = divmod(place, 16)
        cosine = F.cosine_similarity(embeds[unit, token], embeds[unit - 1, token], dim=0) if unit else -torch.ones(())
        assert seen == (float(cosine) <= similarity), (unit, token, float(cosine))
    assert 16 < int(choice.seen.sum()) < len(choice.index)


def test_the_threshold_is_not_rounded_to_bfloat16() -> None:
    embeds = drifting(8, 16, torch.bfloat16)
    cosines = F.cosine_similarity(embeds[1:], embeds[:-1], dim=-1).flatten().tolist()
    places = [place for place, cosine in enumerate(cosines) if 0.8 < cosine < 0.97]
    for place in places:
        below = build_pruner({"kind": "evs-threshold", "similarity": cosines[place] - 1e-5})
        above = build_pruner({"kind": "evs-threshold", "similarity": cosines[place] + 1e-5})
        assert 16 + place not in below.choose(Video(embeds), 0.01).visible.tolist()
        assert 16 + place in above.choose(Video(embeds), 0.01).visible.tolist()
    assert places


def test_a_still_video_shows_its_first_unit_alone() -> None:
    still = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).expand(5, 6, 8)
    choice = build_pruner("evs-threshold").choose(Video(still), 0.5)
    assert choice.visible.tolist() == list(range(6))
    assert len(choice.index) == 15


def test_nothing_is_hidden_of_a_single_unit_and_at_rate_0() -> None:
    pruner = build_pruner("evs-threshold")
    assert pruner.choose(Video(torch.ones(1, 6, 8)), 0.9).visible.tolist() == list(range(6))
    assert pruner.choose(Video(torch.ones(5, 6, 8)), 0.0).visible.tolist() == list(range(30))


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, True, "0.9", None, float("nan")])
def test_a_threshold_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"^evs.method.similarity must be a number with 0 < similarity < 1, got"):
        build_pruner({"kind": "evs-threshold", "similarity": value})
