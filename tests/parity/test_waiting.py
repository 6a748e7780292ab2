"""The device half never makes the host wait: no value read back, no shape that depends on one, no blocking copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from benchmarks.perf.waits import noted_waits
from evs_train import evs, prune
from evs_train.prune import KINDS, to_device
from evs_train.pruners.evs_threshold import EvsThreshold
from tests.parity.rig import Rig
from tests.parity.tracing import trace

ALL = ("two", "image", "text", "still", "both")
RATES = (0.0, 0.5, 0.9)


def rules(rig: Rig) -> list[dict[str, Any]]:
    """Of batches: padded, packed, numbered anew, where the family has them."""
    packings = [{}, {"packing": True}] if rig.family.attention_only else [{}]
    positions = [{}, {"sequential": True}] if "sequential" in rig.family.position_rules else [{}]
    return [packing | rule for packing in packings for rule in positions]


@pytest.mark.parametrize("rate", RATES)
def test_the_device_half_never_waits(rig: Rig, rate: float) -> None:
    for rule in rules(rig):
        batch = rig.batch(ALL, rate, **rule)
        assert {planned.item.kind for planned in batch["plan"].items} == {"image", "video"}
        inputs, waits = trace(rig, batch)
        _, with_gradient = trace(rig, batch, backward=True)
        assert waits.places == with_gradient.places == [], rule
        assert 10 < waits.num_operations < with_gradient.num_operations
        assert inputs["input_ids"].shape == batch["plan"].shape
        assert inputs["attention_mask"].device.type == "cuda"


def test_nor_with_tokens_that_are_hidden(attention_rig: Rig) -> None:
    for packing in (False, True):
        pruner = EvsThreshold()
        batch = attention_rig.batch(ALL, 0.5, packing=packing, pruner=pruner)
        inputs, waits = trace(attention_rig, batch, pruner=pruner)
        assert waits.places == []
        assert inputs["attention_mask"].device.type == "cuda"


def test_nor_with_another_attention(attention_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = attention_rig
    for attention, names in (("eager", ALL), ("flash_attention_2", ALL), ("flash_attention_2", ("two",))):
        monkeypatch.setattr(rig.model.config.get_text_config(), "_attn_implementation_internal", attention)
        _, waits = trace(rig, rig.batch(names, 0.75, packing=len(names) > 1))
        assert waits.places == [], attention


def test_nor_with_blanks(rig: Rig) -> None:
    _, waits = trace(rig, rig.batch(("text",), 0.75))
    with FakeTensorMode(), noted_waits(torch.device("cpu")) as moving:
        for kind in KINDS:
            to_device(rig.family.blank(kind), torch.device("cuda"))
    assert waits.places == moving.places == []


def test_a_mask_as_index_is_seen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_mask(embeds: Tensor, pruning_rate: float) -> Tensor:
        scores = evs.dissimilarity(embeds).flatten()
        return torch.arange(scores.numel(), device=scores.device)[scores > pruning_rate]

    monkeypatch.setattr(evs, "select_tokens", by_mask)
    with pytest.raises(DynamicOutputShapeException):
        trace(rig, rig.batch(ALL, 0.5))


@pytest.mark.parametrize(
    "slow",
    [
        lambda ids: ids.to("cpu"),
        lambda ids: ids.new_tensor([0, 1]),
        lambda ids: ids.flatten()[torch.arange(2)],
        lambda ids: ids[[0]],
    ],
    ids=["to the host", "from a list", "an index on the host", "a list as index"],
)
def test_a_blocking_copy_is_seen(qwen: Rig, monkeypatch: pytest.MonkeyPatch, slow: Callable[[Tensor], Tensor]) -> None:
    compact = prune.compact

    def copying(batch: dict[str, Any], selected: Any, pad_token_id: int) -> dict[str, Tensor]:
        slow(batch["input_ids"])
        return compact(batch, selected, pad_token_id)

    monkeypatch.setattr(prune, "compact", copying)
    assert len(trace(qwen, qwen.batch(ALL, 0.5))[1].places) == 1
