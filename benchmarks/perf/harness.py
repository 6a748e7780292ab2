"""What the groups of `benchmarks.perf` share: sides that take turns, medians with their spread, peak memory, tables.

A *side* is one of the ways that are compared. In every round each side does its work once, and the order turns from
round to round, so a machine that slows down, or a cache that one side leaves to the next, meets all sides alike.
Ratios are taken within a round and their median is quoted, which drops what slows whole rounds.

A group is a module with a `GROUP`, found by its name (`__main__.py`). Its `run` gets a `Bench` and returns rows: flat
mappings of JSON values and `Spread`s. What the same code measures on a GPU is bracketed by synchronisations.
This module knows nothing of models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Size = Literal["toy", "cpu", "gpu"]
SIZES: tuple[Size, ...] = ("toy", "cpu", "gpu")
Side = Callable[[], float]
"""Does its work once, and returns the seconds that it took."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured `count` times. `str` gives `median [lower..upper]`."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles as `statistics.quantiles` has them (inclusive)."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.lower:{spec}}..{self.upper:{spec}}]"


@dataclass(frozen=True)
class Column:
    """One column of a group's table: the row's key, its heading, and a format such as `.3f` (also of a `Spread`)."""

    key: str
    heading: str
    spec: str = ""


@dataclass(frozen=True)
class Bench:
    """What a group is given.

    Attributes:
        size: `toy` takes seconds and shows only that the code runs; `cpu` minutes; `gpu` has the shapes of real models.
        device: where models stand.
        folder: an empty folder for files of the run.
        say: is told what takes long.
    """

    size: Size
    device: torch.device
    folder: Path
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Group:
    """A group of measurements.

    Attributes:
        title: what is compared, for tables and figures.
        run: measures.
        columns: of the table.
        draw: draws rows, as they stand in the JSON file, on a matplotlib `Axes`; None: no figure.
    """

    title: str
    run: Callable[[Bench], list[Row]]
    columns: Sequence[Column]
    draw: Callable[[Any, Sequence[Row]], None] | None = None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> Side:
    """The side that does `work`; its seconds are from an idle device to an idle device."""

    def side() -> float:
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begun

    return side


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Who works when: `rounds` rounds of all names, each round beginning one name later than the one before."""
    return [name for number in range(rounds) for name in _turned(names, number)]


def _turned(names: Sequence[str], number: int) -> list[str]:
    first = number % len(names)
    return [*names[first:], *names[:first]]


def alternate(sides: Mapping[str, Side], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every side in each of `rounds` rounds, after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name in turns(list(sides), warmup + rounds):
        times[name].append(sides[name]())
    return {name: of_side[warmup:] for name, of_side in times.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios within each round."""
    return Spread.of([one / other for one, other in zip(numerator, denominator, strict=True)])


class PeakMemory:
    """Largest number of bytes that tensors hold on the device between `begin` and `end`.

    On a GPU this is torch's own count, of everything that is allocated. On a CPU torch's profiler counts allocations
    from `begin` on, so `held` (see `bytes_of`) must say what is held before. It is the same quantity: the memory of
    tensors, without what the process needs beside them or what the allocator keeps for later. The profiler slows the
    work down, so what is measured here on a CPU must not be timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._held = 0

    def begin(self, held: int) -> None:
        """Start counting. `held`: bytes of tensors that are there already; a GPU knows."""
        self._held = held
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile.start()

    def end(self) -> int:
        """The peak since `begin`, in bytes."""
        if self.device.type == "cuda":
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        self._profile.stop()
        profiler: Any = self._profile.profiler  # torch leaves parts of it without types
        events = profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        level = highest = 0
        for _, change in changes:
            level += change
            highest = max(highest, level)
        return self._held + highest


def peak_memory(work: Callable[[], object], device: torch.device, held: int = 0) -> int:
    """Bytes that tensors hold at most while `work` runs once; see `PeakMemory`."""
    peak = PeakMemory(device)
    peak.begin(held)
    work()
    return peak.end()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def as_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Rows as text, numbers to the right; a key that a row has not is left empty."""
    cells = [[column.heading for column in columns]]
    cells += [[_cell(row.get(column.key), column.spec) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    is_text = [all(isinstance(row.get(column.key), str) for row in rows) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:{spec}}"
