"""What the machine can do at most, measured in the same run, so that its absolute speed drops out of every ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.perf.harness import timed

_SIDE = {"cuda": 8192, "cpu": 1024}  # of a square product: 1.1 TFLOP and 2 GFLOP
_BYTES = {"cuda": 2**31, "cpu": 2**28}  # beyond any cache
_TURNS = 10


@dataclass(frozen=True)
class Machine:
    """Peaks: operations per second of one large matrix product, bytes per second of one large copy (read and write)."""

    flops: float
    bytes: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of several turns. `dtype`: what the model computes in. Cost: a second or less."""
    side = _SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = timed(lambda: torch.matmul(one, other), device)
    source = torch.zeros(_BYTES[device.type] // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device)
    product(), copy()  # the first one loads kernels and touches pages
    return Machine(
        flops=2 * side**3 / min(product() for _ in range(_TURNS)),
        bytes=2 * _BYTES[device.type] / min(copy() for _ in range(_TURNS)),
    )
