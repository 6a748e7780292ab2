"""What only a GPU can show of pruners: mixed precision, which takes sums and norms in float32 there, changes nothing.

The same test runs on a CPU, where autocast leaves these operations alone, so that it is not found broken later.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from evs_train.pruners import PRUNERS, build_pruner
from tests.gpu.test_device_half import DEVICES
from tests.pruners.test_pruners import drifting, video_of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_autocast_changes_nothing(name: str, device: str) -> None:
    pruner, video = build_pruner(name), video_of(drifting(8, 16, torch.bfloat16))
    assert video.change is not None
    video = dataclasses.replace(video, embeds=video.embeds.to(device), change=video.change.to(device))
    plain = pruner.choose(video, 0.75)
    with torch.autocast(device, torch.bfloat16):
        mixed = pruner.choose(video, 0.75)
    assert torch.equal(mixed.index, plain.index)
    assert (mixed.seen is None and plain.seen is None) or torch.equal(mixed.seen, plain.seen)  # type: ignore[arg-type]
