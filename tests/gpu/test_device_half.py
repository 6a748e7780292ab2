"""What only a GPU can show: the device half does not synchronise, and bfloat16 on the device keeps rate 0 exact.

The same paths run on a CPU, too, without what is a GPU's, so that they are not found broken on the day of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.perf.device_half import with_gradient
from evs_train.prune import EvsHook, to_device
from tests.parity.rig import Rig, attention_mask

ALL = ("two", "image", "text", "still", "both")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def bfloat16_rig(
    device: torch.device, family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> Rig:
    rig = Rig(tiny_checkpoint(family_name), mixed_rows, torch.bfloat16)
    rig.model.to(device)
    return rig


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """On a CUDA device any operation raises that makes the host wait for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(rig: Rig) -> Iterator[dict[str, Any]]:
    """Images and videos in one batch: padded and packed, positions kept and numbered anew, at several rates."""
    for rate in (0.0, 0.5, 0.9):
        yield rig.batch(ALL, rate)
        if rig.family.attention_only:
            yield rig.batch(ALL, rate, packing=True)
        if "sequential" in rig.family.position_rules:
            yield rig.batch(ALL, rate, sequential=True)


def test_the_device_half_does_not_synchronise(bfloat16_rig: Rig, device: torch.device) -> None:
    rig = bfloat16_rig
    for batch in batches(rig):
        on_device = to_device(batch, device)
        encoding = EvsHook(rig.family, rig.model)._encode(on_device["media"], training=False)
        for features in [one for of_kind in encoding[0].values() for one in of_kind]:
            features[:] = [layer.detach().requires_grad_() for layer in features]
        with waiting_is_an_error(device):
            inputs = rig.device_half(on_device, encoding)
            torch.cat([one.flatten() for one in with_gradient(inputs)]).sum().backward()
        assert inputs["input_ids"].shape == batch["plan"].shape
        assert len(inputs["targets"]) == sum(batch["plan"].num_supervised)
        assert (inputs["targets"] >= 0).all()
        for planned, (pooled, *_) in zip(batch["plan"].videos, encoding[0]["video"], strict=True):
            kept = int(pooled.grad.any(-1)[: planned.item.num_tokens].sum())
            assert kept == planned.num_retained


def test_waiting_is_seen(device: torch.device) -> None:
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(pytest.raises(RuntimeError, match="synchronizing"))
        stack.enter_context(waiting_is_an_error(device))
        torch.ones(3, device=device).sum().item()


def test_rate_zero_is_exact_in_bfloat16(
    device: torch.device, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> None:
    rig = Rig(tiny_checkpoint("qwen3_vl"), mixed_rows, torch.bfloat16)
    rig.model.to(device)
    batch = to_device(rig.batch(ALL, 0.0), device)
    config, ids = rig.family.config, batch["input_ids"]
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    plain = rig.model(input_ids=ids, attention_mask=attention_mask(batch), mm_token_type_ids=kinds, **batch["media"])
    pruned, _ = rig.full(batch)
    assert torch.equal(pruned.logits, plain.logits)
