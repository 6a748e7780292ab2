"""Further passes over one encoding: each equals a plain pass of its own, and so does the sum of their gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from evs_train.data.template import IGNORE_INDEX
from evs_train.prune import EvsHook
from evs_train.rates import Rates
from evs_train.samplers import Fixed
from tests.parity.rig import Rig, mean_loss, predicting

ALL = ("two", "image", "text", "still", "both")
RATES = (0.0, 0.8)


def further(*rates: float) -> tuple[Rates, ...]:
    return tuple(Rates(Fixed(rate), cap=False) for rate in rates)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("names", [ALL, ("text",)], ids=["media", "text"])
def test_passes_over_one_encoding_are_the_plain_passes(rig: Rig, names: tuple[str, ...]) -> None:
    """Loss, logits and the gradient of every parameter, the tower's included."""
    separate, summed = [], 0.0
    for rate in (*RATES, 0.5):
        out, _ = rig.forward(rig.batch(names, rate), encoder_trains=True)
        out.loss.backward()  # gradients of separate runs add up in `grad`
        separate.append(out)
    expected = rig.gradients()
    rig.model.zero_grad(set_to_none=True)

    out, hook = rig.forward(rig.batch(names, 0.5, further=further(*RATES)), encoder_trains=True)
    for found, alone in zip([*(one.outputs for one in hook.passes), out], separate, strict=True):
        assert torch.equal(found.logits, alone.logits)
        found.loss = mean_loss(found, hook)
        assert torch.equal(found.loss, alone.loss)
        summed = summed + found.loss
    assert [one.plan.rates[0] for one in hook.passes] == list(RATES)
    summed.backward()
    found_gradients = rig.gradients()
    for name, gradient in expected.items():
        assert (gradient is None) == (found_gradients[name] is None), name
        assert gradient is None or close(found_gradients[name], gradient) or gradient.abs().max() < 1e-7, name


@pytest.mark.parametrize("encoder_trains", [True, False])
def test_media_are_encoded_once(rig: Rig, monkeypatch: pytest.MonkeyPatch, encoder_trains: bool) -> None:
    """However many passes there are. Images and videos of a batch are a call each."""
    calls: list[str] = []
    encode = rig.family.encode
    monkeypatch.setattr(
        rig.family, "encode", lambda model, media, kind: calls.append(kind) or encode(model, media, kind)
    )
    for teacher in (False, True):
        rates = further(0.0) if teacher else further(*RATES)
        _, hook = rig.forward(rig.batch(ALL, 0.5, further=rates), encoder_trains=encoder_trains, teacher=teacher)
        assert len(hook.passes) == len(rates)
        assert sorted(calls) == ["image", "video"]
        calls.clear()


@pytest.mark.parametrize("packing", [False, True])
def test_a_teacher_is_the_dense_pass_at_supervised_places(rig: Rig, packing: bool) -> None:
    if packing and not rig.family.attention_only:
        pytest.skip("cannot be packed")
    dense = rig.batch(ALL, 0.0, packing=packing)
    with torch.no_grad():
        expected, labels = rig.full(dense)
    batch = rig.batch(ALL, 0.5, packing=packing, further=further(0.0))
    out, hook = rig.forward(batch, teacher=True)
    (teacher,) = hook.passes
    logits = teacher.outputs["logits"]
    assert not logits.requires_grad
    assert logits.shape == out.logits.shape
    assert torch.allclose(logits[0], predicting(expected.logits, labels), rtol=1e-5, atol=1e-6)
    # and the pruned pass predicts the same tokens in the same order
    assert torch.equal(hook.targets, labels[labels != IGNORE_INDEX])
    assert sum(batch["plan"].num_tokens) < sum(dense["plan"].num_tokens)
    out.loss.backward()


def test_sequential_positions_are_those_of_each_pass(qwen: Rig, rig: Rig) -> None:
    if "sequential" not in rig.family.position_rules:
        pytest.skip("no sequential positions")
    alone, _ = rig.forward(rig.batch(ALL, 0.8, sequential=True))
    _, hook = rig.forward(rig.batch(ALL, 0.5, sequential=True, further=further(0.8)))
    assert torch.equal(hook.passes[0].outputs.logits, alone.logits)


def test_a_teacher_has_no_dropout_and_the_student_has(qwen: Rig) -> None:
    dropped = nn.Sequential(qwen.model.lm_head, nn.Dropout(0.5))
    plain = qwen.model.lm_head
    with torch.no_grad():
        expected, labels = qwen.full(qwen.batch(ALL, 0.0))
    try:
        qwen.model.lm_head = dropped
        batch = qwen.batch(ALL, 0.0, further=further(0.0))
        out, hook = qwen.forward(batch, teacher=True)
    finally:
        qwen.model.lm_head = plain
    picked = predicting(expected.logits, labels)
    assert torch.allclose(hook.passes[0].outputs["logits"][0], picked, atol=1e-6)
    assert not torch.allclose(out.logits[0], picked, atol=1e-2)
    assert dropped[1].training


def test_only_the_drawn_pass_is_drawn(qwen: Rig) -> None:
    """Pictures are of the drawn rate: the plans of further passes carry no frames."""
    example: Any = qwen.examples["two"]
    frames = tuple(torch.zeros(1).numpy() for _ in example.items)
    qwen.examples["framed"] = dataclasses.replace(example, frames=frames)
    batch = qwen.batch(("framed",), 0.5, further=further(0.0))
    assert all(planned.frames is not None for planned in batch["plan"].videos)
    assert all(planned.frames is None for planned in batch["further"][0]["plan"].videos)
    _, hook = qwen.forward(batch)
    assert isinstance(hook, EvsHook)
    assert [planned.pruning_rate for planned, _ in hook.kept] == [0.5, 0.5]
