"""Training of the proof: our own `Run`, with examples that are prepared once.

The same 32 frames of each clip are shown many times, so rows are decoded and tokenized once and kept on disk, pixels as
bytes (`ExampleCache`); what the model reads is the same (tests/test_proof.py). Cost: about 110 kB of disk and 10 ms,
once, for each clip.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from evs_train.config import Recipe
from evs_train.data.chat import Example, MediaItem
from evs_train.data.rows import RowReader
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run

PIXELS = "pixel_values_videos"


class ExampleCache:
    """All rows of one file, prepared.

    Args:
        reader: prepares the rows, if they are not on disk yet.
        folder: where prepared rows are kept, all of them by the same processor.
        say: is told what takes long.
    """

    def __init__(self, reader: RowReader, folder: Path, say: Callable[[str], None] = print) -> None:
        texts = "\n".join(f"{sample.id} {sample.messages}" for sample in reader.samples)
        kind = "-changes" if reader.measure_changes else ""
        file = folder / f"{hashlib.sha256(texts.encode()).hexdigest()[:16]}{kind}.pt"
        if not file.is_file():
            say(f"preparing {len(reader.samples)} rows")
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(_prepared(reader), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        # mmap: pixels are read from the file when they are needed, and processes share them.
        with torch.serialization.safe_globals([Example, MediaItem]):  # a file of nothing else, so of no code
            self._rows, self._codes = torch.load(file, weights_only=True, mmap=True)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> Example:
        """The example of row `number`."""
        row: Example = self._rows[number]
        return dataclasses.replace(row, media={**row.media, PIXELS: _floats(self._codes[number])})


def _prepared(reader: RowReader) -> tuple[list[Example], Tensor]:
    """Examples without their pixels, and those as bytes, (rows, patches, values of a patch)."""
    rows: list[Example] = []
    codes = torch.empty(0)
    for number in range(len(reader.samples)):
        row = reader.read(number)
        pixels: Tensor = row.media[PIXELS]
        if not rows:
            codes = torch.empty((len(reader.samples), *pixels.shape), dtype=torch.uint8)
        codes[number] = (pixels * 127.5 + 127.5).round().to(torch.uint8)
        rows.append(dataclasses.replace(row, media={k: v for k, v in row.media.items() if k != PIXELS}))
    return rows, codes


def _floats(codes: Tensor) -> Tensor:
    """Pixels as the processor normalises them: mean and deviation are half of the range."""
    return (codes.float() - 127.5) / 127.5


@dataclass
class CachedReader(RowReader):
    """A `RowReader` that reads from a cache."""

    cache: ExampleCache | None = None

    def read(self, number: int, *, share: float = 1.0, keep_frames: bool = False) -> Example:
        assert self.cache is not None
        assert share == 1.0
        return self.cache.read(number)


class StudyRun(Run):
    """A run that reads prepared rows."""

    trained: PreTrainedModel

    def __init__(
        self,
        recipe: Recipe,
        cache_folder: Path,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(recipe)
        self.cache = ExampleCache(self.reader, cache_folder, say)
        plain = {f.name: getattr(self.reader, f.name) for f in dataclasses.fields(self.reader) if f.init}
        self.reader = CachedReader(**plain, cache=self.cache)

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        trainer = super().build_trainer(args)
        self.trained = trainer.hook.model
        return trainer
