"""Hiding a kept token from attention is dropping it, positions preserved: what `evs-threshold` rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evs_train.errors import RecipeError
from evs_train.generation import PrunedModel
from evs_train.inputs import check_pruner
from evs_train.pruners.base import Choice, Pruner, Video
from evs_train.pruners.evs_threshold import EvsThreshold
from evs_train.tally import Tally
from evs_train.uptrain import Run
from tests.parity.rig import Rig, supervised
from tests.runs import arguments, recipe_of

MIXED = ("two", "image", "text", "both")
RATE = 0.3
HIDING = EvsThreshold(0.5)


@dataclass(frozen=True)
class Told(Pruner):
    """Keeps of one video after the other the places it is told."""

    counts: Iterator[int]
    places: Iterator[Tensor]

    def num_retained(self, num_units: int, tokens_per_unit: int, pruning_rate: float) -> int:
        return next(self.counts)

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        return Choice(next(self.places))


@dataclass(frozen=True)
class Watched(Pruner):
    """Hides as `HIDING`, and keeps what it chose."""

    chosen: list[Choice]
    hides = True

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        self.chosen.append(HIDING.choose(video, pruning_rate))
        return self.chosen[-1]


def told(chosen: list[Choice]) -> Told:
    """The pruner that does not keep what `chosen` hides."""
    seen = [choice.visible for choice in chosen]
    return Told(iter([len(places) for places in seen]), iter(seen))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_logits_are_those_without_the_hidden_tokens(attention_rig: Rig, packing: bool) -> None:
    rig, chosen = attention_rig, []
    batch = rig.batch(MIXED, RATE, packing=packing, pruner=Watched(chosen))
    with torch.no_grad():
        hiding, hook = rig.forward(batch, pruner=Watched(chosen))
        pruner = told(chosen)
        without = rig.batch(MIXED, RATE, packing=packing, pruner=pruner)
        dropping, other = rig.forward(without, pruner=pruner)
    hidden = sum(int((~choice.seen).sum()) for choice in chosen if choice.seen is not None)
    assert 0 < hidden < batch["plan"].video_tokens_after, "nothing was hidden: the test would prove nothing"
    assert torch.equal(hook.targets, other.targets)
    torch.testing.assert_close(hiding.logits, dropping.logits, rtol=1e-4, atol=2e-5)
    # Plans, hence labels and metrics, count what is kept; what is hidden of it is told beside that.
    plan, plan_without = batch["plan"], without["plan"]
    assert plan.video_tokens_after - plan_without.video_tokens_after == hidden
    assert plan.num_supervised == plan_without.num_supervised == tuple(map(len, supervised(batch["labels"])))
    assert hook.hidden is not None
    assert int(hook.hidden) == hidden
    assert other.hidden is None
    tally = Tally(["pass_drawn"], hides=True)
    tally.add(plan, hook.hidden)
    tally.add(plan, hook.hidden)
    assert tally.collect(lambda sums: sums, torch.device("cpu"))["video_tokens_seen"] == 2 * (
        plan.video_tokens_after - hidden
    )


def test_gradients_are_those_without_the_hidden_tokens(qwen: Rig) -> None:
    found, chosen = [], []
    batch = qwen.batch(MIXED, RATE, pruner=Watched(chosen))
    qwen.forward(batch, pruner=Watched(chosen))[0].loss.backward()
    found.append(qwen.gradients())
    qwen.model.zero_grad(set_to_none=True)
    pruner = told(chosen)
    qwen.forward(qwen.batch(MIXED, RATE, pruner=pruner), pruner=pruner)[0].loss.backward()
    found.append(qwen.gradients())
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_answers_are_those_without_the_hidden_tokens(attention_rig: Rig) -> None:
    """Of whole prompts; the mask has holes that `generate` must keep."""
    rig, chosen = attention_rig, []
    rig.model.eval()
    prompt, options = rig.examples["two"], {"max_new_tokens": 6, "eos_token_id": None}
    steps = []
    for pruner in (Watched(chosen), None):
        model = PrunedModel(rig.family, rig.model, pruner=pruner or told(chosen))
        inputs = model.inputs(prompt, RATE)
        out = rig.model.generate(**inputs, **options, do_sample=False, output_logits=True, return_dict_in_generate=True)
        steps.append(torch.cat(out.logits))
    assert not bool(chosen[0].seen.all())  # type: ignore[union-attr]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=2e-5)


def test_layers_that_cannot_hide_are_refused(
    recurrent_family: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    words = arguments(tiny_checkpoint(recurrent_family), mixed_rows, tmp_path, evs__method={"kind": "evs-threshold"})
    with pytest.raises(RecipeError, match=f"^evs.method: {recurrent_family} has recurrent layers"):
        Run(recipe_of(words))


def test_kernels_without_a_mask_are_refused(attention_rig: Rig) -> None:
    check_pruner(HIDING, attention_rig.family, "sdpa")
    with pytest.raises(RecipeError, match=r"^evs.method: flash_attention_2 takes no mask"):
        check_pruner(HIDING, attention_rig.family, "flash_attention_2")
