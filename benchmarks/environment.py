"""What a benchmark's figures hold for: machine, versions and load, in the form that every result file has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def environment(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """A mapping for `json.dumps`, without names of machines or folders.

    Args:
        packages: whose versions matter.
        more: what else the figures depend on, such as the number of workers.
    """
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    return {
        "machine": platform.machine(),
        "processor": sorted({line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **more,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
