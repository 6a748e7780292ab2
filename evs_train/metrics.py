"""What a log says of the steps since the last one: names and units of the metrics, from what was counted and timed.

Invariant: sums are over all ranks, times of this rank. Cost: none; `tally.py` counts and reduces, `timing.py` times.
Metrics of bad samples, skipped steps and cached features are named where they are counted.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

import torch

from evs_train.tally import BACKENDS


def metrics_of(sums: Mapping[str, float], times: Mapping[str, float], elapsed: float) -> dict[str, float]:
    """Metrics of the steps between two logs.

    Args:
        sums: what `Tally.collect` gives.
        times: seconds by section, of `Stopwatch.collect`.
        elapsed: seconds between the logs.
    """
    return {
        **{name: value for name, value in sums.items() if name.startswith("loss/")},
        "evs/rate": sums["rate"] / max(sums["rows"], 1),
        "evs/rate_applied": sums["rate_applied"] / max(sums["video_rows"], 1),
        "evs/video_tokens_before": sums["video_tokens_before"],
        "evs/video_tokens_after": sums["video_tokens_after"],
        **({"evs/video_tokens_seen": sums["video_tokens_seen"]} if "video_tokens_seen" in sums else {}),
        "evs/supervised_tokens": sums["supervised"],
        "evs/padding": sums["padding"] / max(sums["padding"] + sums["tokens"], 1),
        "data/shortened": sums["shortened"],
        **{f"data/decoded/{backend}": sums[f"decoded/{backend}"] for backend in BACKENDS},
        "speed/tokens_per_second": sums["tokens"] / elapsed,
        "speed/samples_per_second": sums["rows"] / elapsed,
        **{f"time/{name}": seconds for name, seconds in times.items()},
        "time/rest": elapsed - sum(times.values()),
        "memory/peak_gib": _peak_memory() / 2**30,
    }


def _peak_memory() -> int:
    """Bytes: the device's peak allocation, or this process's largest resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
