"""Media read once to learn what is known of them from then on: the entries of the index, made on all cores.

Invariant: `probe` reads a medium as training does (`read_video`, `read_image`), so its verdict is training's; an error
that may be gone the next time makes no entry. Cost: a probe decodes a video end to end and then the frames that the
recipe samples; what the index knows is not read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from evs_train.data.decoding import DEFAULTS, Decoding
from evs_train.data.index import Entry, Facts, Fault, Kind, MediaIndex, key_of, state_of
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList, Source, name_of
from evs_train.data.video import read_image, read_video
from evs_train.errors import MediaError, Reason

PASSING: frozenset[Reason] = frozenset({"missing", "no permission", "timeout", "crash", "out of memory"})
"""Reasons that may be gone the next time; a file is probed again."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def probe(
    kind: Kind, source: Source, sampling: FrameSampling, *, known: Facts | None = None, decoding: Decoding = DEFAULTS
) -> Entry | MediaError:
    """Read a medium as training would. An error that may pass comes back as it is, since it makes no entry.

    `known`: of a video in this state that was sampled otherwise; it is not checked from end to end again.
    """
    state, backend = state_of(source), None
    try:
        if kind == "image":
            assert not isinstance(source, FrameList)
            width, height = read_image(source, decoding=decoding).size
            facts = Facts("image", width, height, codec=Path(name_of(source)).suffix.lower().lstrip("."))
        else:
            clip = read_video(source, sampling, verify=known is None, decoding=decoding)
            backend = clip.backend
            rotation = clip.rotation if known is None else known.rotation
            assert clip.codec is not None
            assert rotation is not None
            facts = replace(Facts.of_clip(clip), rotation=rotation, sampling=str(sampling))
    except MediaError as error:
        fault = Fault(error.message, error.hint, error.reason)
        return error.with_traceback(None) if error.reason in PASSING or state is None else Entry(*state, fault=fault)
    assert state is not None, f"{name_of(source)} could be read but not found"
    return Entry(*state, facts, backend=backend)


def unknown(
    index: MediaIndex, wanted: Iterable[tuple[Kind, Source]], sampling: FrameSampling
) -> list[tuple[Kind, Source, bool]]:
    """What of the `wanted` media must be read, and whether it must be checked from end to end.

    A video that is known but was sampled otherwise is read anew without that check.
    """
    todo: list[tuple[Kind, Source, bool]] = []
    for kind, source in dict.fromkeys(wanted):
        entry = index.find(source)
        if entry is None:
            todo.append((kind, source, True))
        elif entry.facts is not None and kind == "video" and entry.facts.sampling != str(sampling):
            todo.append((kind, source, False))
    return todo


def probe_all(
    index: MediaIndex,
    todo: Sequence[tuple[Kind, Source, bool]],
    sampling: FrameSampling,
    num_workers: int,
    decoding: Decoding = DEFAULTS,
) -> Iterator[tuple[Source, MediaError | None]]:
    """Probe what `unknown` says, into `index`; yields each medium when it is done, with an error that may pass."""
    known = {source: None if verify else index.entries[key_of(source)].facts for _, source, verify in todo}
    for number, found in parallel(
        lambda one: probe(one[0], one[1], sampling, known=known[one[1]], decoding=decoding), todo, num_workers
    ):
        source = todo[number][1]
        if isinstance(found, Entry):
            index.entries[key_of(source)] = found
        else:
            index.entries.pop(key_of(source), None)
        yield source, None if isinstance(found, Entry) else found


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def parallel(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[tuple[int, Result]]:
    """(number, function(item)) of all items as they are done, in forked processes, or in this one (0 or 1)."""
    loader: Iterable[tuple[int, Result]] = DataLoader(
        _Calls(function, items),
        batch_size=None,
        num_workers=min(num_workers, len(items)) if num_workers > 1 else 0,
        collate_fn=_as_it_is,
        in_order=False,
    )
    yield from loader


class _Calls(Dataset[Any]):
    """The work of `parallel`, as torch's loader takes it: its workers are those that training decodes in."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.function(self.items[number])


def _as_it_is(value: Item) -> Item:
    return value
