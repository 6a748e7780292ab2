"""What is known of media files without opening them again: a file of facts and faults, made by `evs-train check`.

An entry belongs to one state of a file (size and change time); a file that changed is unknown again. Training reads the
index and never writes it: a video that was found good is not decoded from end to end again, and one that was found bad
is refused without decoding. Each entry says what decoded the video (`backend`): one that decord read rightly is not
looked through again to find out. So a read-only folder or a missing index costs time and nothing else.

Invariant: faults that may pass (a timeout, a file system that is away) are not kept. The file is replaced whole, so
readers see the old one or the new one. Cost: looking an entry up is one `stat`. In memory a training run holds about
300 bytes a file. Of two checks that write one index at the same time, the last one's entries stay.
`probe.py` makes the entries.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import feather
from torch import Tensor

from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList, Source, TarMember, name_of
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.errors import DataError, Reason
from evs_train.redaction import redact, restore

VERSION = "2"
_FIRST_COLUMNS = ("key", "size", "mtime_ns", "message", "hint", "reason", "backend")

Kind = Literal["video", "image"]


class Fault(NamedTuple):
    """The parts of a MediaError or DataError, which by itself would keep the frames of its traceback alive."""

    message: str
    hint: str
    reason: Reason


@dataclass(frozen=True)
class Facts:
    """What is known of a good medium; of an image only kind, width, height and codec.

    Attributes:
        width, height: pixels, upright.
        num_frames, fps, duration: of the whole video.
        rotation: degrees by which the file says that its pictures are turned.
        sampling: the `FrameSampling` that gave `indices` and `timestamps`, as text.
    """

    kind: Kind
    width: int
    height: int
    codec: str
    num_frames: int = 1
    fps: float = 0.0
    duration: float = 0.0
    rotation: int = 0
    sampling: str = ""
    indices: tuple[int, ...] = ()
    timestamps: tuple[float, ...] = ()

    @classmethod
    def of_clip(cls, clip: Clip) -> Facts:
        """What a decoded clip says of its video, for another clip of the same frames."""
        height, width = clip.frames.shape[1:3]
        return cls(
            "video", width, height, clip.codec or "", clip.total_frames, clip.fps, clip.duration,
            indices=tuple(clip.frame_indices), timestamps=tuple(clip.timestamps.tolist()),
        )  # fmt: skip

    def blank_clip(self, name: str, sampling: FrameSampling, *, pixels: bool = True) -> Clip:
        """The sampled clip with blank frames: what planning needs of a video, without decoding it.

        Args:
            sampling: may differ from the one that gave `indices` in its share alone.
            pixels: the frames are black, and take memory and a processor's work; otherwise they have a shape only.
        """
        places = sampling.thinned(len(self.indices))
        shape = (len(places), self.height, self.width, 3)
        frames = np.zeros(shape, dtype=np.uint8) if pixels else np.broadcast_to(np.uint8(0), shape)
        times = np.asarray(self.timestamps, dtype=np.float64)[places]
        indices = [self.indices[place] for place in places]
        return Clip(frames, indices, self.fps, times, self.num_frames, self.duration, name, shape_only=not pixels)

    def blank_image(self, *, pixels: bool = True) -> Image.Image | Tensor:
        """A black image of the same size, or (3, H, W) uint8 on the meta device: a shape without memory."""
        if pixels:
            return Image.new("RGB", (self.width, self.height))
        return torch.empty((3, self.height, self.width), dtype=torch.uint8, device="meta")


@dataclass(frozen=True)
class Entry:
    """One medium in one state. `facts` and `fault` exclude each other; both are None where facts were not read.

    `backend`: what decoded a good video (see `Clip`).
    """

    size: int
    mtime_ns: int
    facts: Facts | None = None
    fault: Fault | None = None
    backend: str | None = None


@dataclass
class MediaIndex:
    """Entries by key (see `key_of`)."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def find(self, source: Source) -> Entry | None:
        """The entry of a medium in its present state."""
        entry = self.entries.get(key_of(source)) if self.entries else None
        return entry if entry is not None and (entry.size, entry.mtime_ns) == state_of(source) else None

    @classmethod
    def read(cls, path: Path, *, facts: bool = False) -> MediaIndex:
        """Read an index; an empty one where there is none, or one of another version.

        Raises:
            DataError: the file cannot be read.
        """
        table = read_table(path, None if facts else _FIRST_COLUMNS)
        if table is None or (table.schema.metadata or {}).get(b"evs_index") != VERSION.encode():
            return cls()
        if list(table.schema) != [column for column in _SCHEMA if facts or column.name in _FIRST_COLUMNS]:
            raise damaged(path, "its columns are others")
        rows = (restore(row) for batch in table.to_batches(1024) for row in batch.to_pylist())
        try:
            return cls({row.pop("key"): _entry(row) for row in rows})
        except (AssertionError, TypeError) as error:  # a reason that there is not; a list that is missing
            raise damaged(path, error) from error

    def write(self, path: Path) -> None:
        """Replace the file. Raises OSError."""
        rows = [redact({"key": key, **_row(entry)}) for key, entry in self.entries.items()]
        replace_table(path, pyarrow.Table.from_pylist(rows, schema=_SCHEMA))


def read_table(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
    """The table in a file, or some of its columns, checked; None where there is no file.

    Unchecked, offsets that are damaged lead out of the file's memory and end the process when a value is read (seen).

    Raises:
        DataError: it cannot be read.
    """
    try:
        table = feather.read_table(path, columns=columns)
        table.validate(full=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:  # a length may ask for any memory
        raise damaged(path, error) from error
    return table


def damaged(path: Path, what: object) -> DataError:
    """The error of a file that is made again when it is gone."""
    return DataError(f"{path}: cannot be read: {what}", "remove it; evs-train check writes it again")


def replace_table(path: Path, table: pyarrow.Table) -> None:
    """Write a file as a whole, so that readers see the old one or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".draft{os.getpid()}")
    try:
        feather.write_feather(table, str(draft))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def index_file(data: DataSection) -> Path:
    """Where a recipe's index is: `data.index`, or beside the first rows file, where every rank and node finds it."""
    return Path(data.index) if data.index else Path(data.rows[0]).parent / ".evs_index" / "media.arrow"


def key_of(source: Source) -> str:
    """Text that names a medium: its path, the member of a shard with its place, or a hash of a list of frames."""
    if isinstance(source, TarMember):
        return f"{name_of(source)}@{source.offset}"
    if isinstance(source, FrameList):
        return f"frames {hashlib.sha256('|'.join([*source.paths, str(source.fps)]).encode()).hexdigest()}"
    return source


def state_of(source: Source) -> tuple[int, int] | None:
    """(size, change time in ns) of a medium; of frames the sum and the newest, with their folder; None: not there."""
    try:
        if isinstance(source, TarMember):
            return source.size, os.stat(source.shard).st_mtime_ns
        if isinstance(source, FrameList):
            stats = [os.stat(path) for path in source.paths]
        else:
            stats = [os.stat(source)]
            if os.path.isdir(source):
                stats += [entry.stat() for entry in os.scandir(source)]
    except OSError:
        return None
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        *((name, pyarrow.int64()) for name in ("size", "mtime_ns")),
        *((name, pyarrow.string()) for name in ("message", "hint", "reason", "backend", "kind")),
        *((name, pyarrow.int32()) for name in ("width", "height")),
        ("codec", pyarrow.string()),
        ("num_frames", pyarrow.int64()),
        *((name, pyarrow.float64()) for name in ("fps", "duration")),
        ("rotation", pyarrow.int32()),
        ("sampling", pyarrow.string()),
        ("indices", pyarrow.list_(pyarrow.int64())),
        ("timestamps", pyarrow.list_(pyarrow.float64())),
    ],
    metadata={"evs_index": VERSION},
)


def _row(entry: Entry) -> dict[str, Any]:
    facts = asdict(entry.facts) if entry.facts else {}
    fault = entry.fault._asdict() if entry.fault else {}
    return {"size": entry.size, "mtime_ns": entry.mtime_ns, "backend": entry.backend, **fault, **facts}


def _entry(row: dict[str, Any]) -> Entry:
    size, mtime_ns, message, hint, reason, backend = (row.pop(name) for name in _FIRST_COLUMNS[1:])
    if message is not None:
        assert reason in get_args(Reason), reason
        return Entry(size, mtime_ns, fault=Fault(message, hint, reason))
    backend = backend and sys.intern(backend)
    if not row:
        return Entry(size, mtime_ns, backend=backend)
    row |= {"indices": tuple(row["indices"]), "timestamps": tuple(row["timestamps"])}
    return Entry(size, mtime_ns, Facts(**row), backend=backend)
