"""The device half traced over fake tensors, which have shapes and no values.

A value that is read back or a shape that depends on one raises there, and a blocking copy is noted. Encoders of
transformers have waits of their own, so features are fed: of the shapes that a real call gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.perf.device_half import with_gradient
from benchmarks.perf.waits import Waits, noted_waits
from evs_train.prune import EvsHook
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS
from tests.parity.rig import Rig


def trace(
    rig: Rig, batch: dict[str, Any], *, backward: bool = False, pruner: Pruner = EVS
) -> tuple[dict[str, Any], Waits]:
    """What the model would be called with, and the waits until then, or also in the gradient of the features.

    torch runs no backward pass on a CUDA device that is not there. It is run on fake CPU tensors.
    """
    device = "cpu" if backward else "cuda"
    encoding = EvsHook(rig.family, rig.model, encoder_trains=True)._encode(batch["media"], training=True)
    with FakeTensorMode(), noted_waits(torch.device("cpu")) as waits:
        on_device = {key: value if key == "media" else faked(value, device) for key, value in batch.items()}
        inputs = rig.device_half(on_device, faked(encoding, device), pruner)
        if backward:
            torch.cat([one.flatten() for one in with_gradient(inputs)]).sum().backward()
    return inputs, waits


def faked(value: Any, device: str) -> Any:
    """The same without values, on a device that need not be there; features will have a gradient."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device, requires_grad=value.is_floating_point())
    if isinstance(value, dict):
        return {key: faked(item, device) for key, item in value.items()}
    return type(value)(faked(item, device) for item in value) if isinstance(value, list | tuple) else value
