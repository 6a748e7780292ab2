"""Where a step's time goes, measured without stalling the device.

On a GPU a section is a pair of CUDA events that are read only when metrics are logged; on a CPU it is wall time.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Stopwatch:
    """Sums the time of named sections until `collect` is called."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def section(self, name: str, *, device: bool = True) -> Iterator[None]:
        """Time the body under `name`; `device=False` for work of the host alone, such as waiting for data."""
        if device and torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """Seconds per section since the last call. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000.0
            self._events.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
