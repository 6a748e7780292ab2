"""One row to one example: its media decoded, or blank ones of the same size, number and times.

Invariant: the blank example of a row has the ids, labels and lengths of the real one, since both are made by the same
code from the same facts (`index.Facts`); only pixels differ. What this process found to be bad is not read again.
Where it is kept what the vision tower says of all media of a row, its example is the blank one with that beside it.
Cost: that of decoding and of the model's processor; without pixels, of the text and of reading what is kept. Which row
comes when is not decided here (`order.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from evs_train.data.chat import PIXELS, Example, Kind, Media, Picture, SampleEncoder, build_example
from evs_train.data.decoding import Decoding
from evs_train.data.features import PIECES, FeatureStore, Keys
from evs_train.data.index import Entry, Facts, Fault, MediaIndex
from evs_train.data.manifest import Sample
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import Source, TarMember, name_of
from evs_train.data.video import Clip, read_image, read_video
from evs_train.errors import DataError, MediaError


@dataclass
class RowReader:
    """Reads rows as a recipe says.

    Attributes:
        last_only: train on the last answer of each row alone.
        max_length: refuse rows of more tokens before pruning.
        verify: check each video from end to end before its first use, unless `index` knows the file.
        decoding: decoder and limits.
        index: what is known of media files that have not changed since.
        features: what the vision tower said of media; a row whose media are all there is not decoded.
        measure_changes: of the pixels of decoded videos (`Example.changes`).
    """

    samples: Sequence[Sample]
    encoder: SampleEncoder
    sampling: FrameSampling
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    last_only: bool = False
    verify: bool = True
    decoding: Decoding = field(default_factory=Decoding)
    index: MediaIndex = field(default_factory=MediaIndex)
    features: FeatureStore | None = None
    measure_changes: bool = False
    # What this process found to be bad, so that it is not decoded again. Whole errors would keep their frames alive.
    _bad_files: dict[Source, Fault] = field(default_factory=dict)
    _bad_rows: dict[int, Fault] = field(default_factory=dict)

    def read(self, number: int, *, share: float = 1.0, keep_frames: bool = False) -> Example:
        """The example of row `number`, with this share of its sampled frames.

        Raises:
            DataError, MediaError: it cannot be used; names the row.
        """
        if number in self._bad_rows:
            raise DataError(*self._bad_rows[number])
        sample = self.samples[number]
        sampling = dataclasses.replace(self.sampling, share=share)
        keys = None if self.features is None else self.features.keys(sample, sampling)
        try:
            found = None if keys is None or keep_frames else self._stored(sample, keys)
            return found or self._decoded(sample, sampling, keys, keep_frames=keep_frames)
        except DataError as error:
            self._bad_rows[number] = Fault(error.message, error.hint, error.reason)
            raise

    def _decoded(
        self, sample: Sample, sampling: FrameSampling, keys: Keys | None, *, keep_frames: bool = False
    ) -> Example:
        clips = [self._clip(source, sampling) for source in sample.videos]
        images = [self._image(source) for source in sample.images]
        example = self._build(sample, clips, images, keep_frames=keep_frames, measure_changes=self.measure_changes)
        if keys is None:
            return example
        facts: dict[Kind, list[Facts]] = {
            "video": [Facts.of_clip(clip) for clip in clips],
            "image": [Facts("image", image.width, image.height, codec="") for image in images],
        }
        pieces = {
            PIECES[kind]: [
                {"key": key, "inputs": inputs, "facts": one}
                for key, inputs, one in zip(
                    of_kind, self.encoder.split_media(example.media, kind), facts[kind], strict=True
                )
            ]
            for kind, of_kind in keys.items()
        }
        return dataclasses.replace(example, media=_without_pixels(example.media) | pieces)

    def _stored(self, sample: Sample, keys: Keys) -> Example | None:
        """The example of a row all of whose media were encoded before: nothing is decoded."""
        assert self.features is not None
        for source in (*sample.videos, *sample.images):
            self._known(source)
        found = self.features.find(keys)
        if found is None:
            return None
        example = self.blank(sample, [one.facts for kind in ("video", "image") for one in found[kind]])
        pieces = {
            PIECES[kind]: [{"key": key, "outputs": one.outputs} for key, one in zip(of_kind, found[kind], strict=True)]
            for kind, of_kind in keys.items()
        }
        return dataclasses.replace(example, media=_without_pixels(example.media) | pieces, decoded_by=())

    def blank(self, sample: Sample, facts: Sequence[Facts], *, share: float = 1.0) -> Example:
        """The example of a row from blank media; `facts` of its videos, then of its images. Raises DataError."""
        sampling = dataclasses.replace(self.sampling, share=share)
        videos, images = facts[: len(sample.videos)], facts[len(sample.videos) :]
        pixels = self.encoder.reads_pixels
        clips = [
            one.blank_clip(name_of(at), sampling, pixels=pixels) for one, at in zip(videos, sample.videos, strict=True)
        ]
        return self._build(sample, clips, [one.blank_image(pixels=pixels) for one in images])

    def file_to_blame(self, sample: Sample, error: DataError | MediaError) -> str | None:
        """The medium that a row failed for, or None if the row itself is bad."""
        files = [name_of(one) for one in (*sample.videos, *sample.images) if one in self._bad_files]
        return files[0] if files and isinstance(error, MediaError) else None

    def _build(self, sample: Sample, clips: Sequence[Clip], images: Sequence[Picture], **options: bool) -> Example:
        return build_example(
            sample,
            clips,
            images,
            self.encoder,
            template_kwargs=self.template_kwargs,
            max_length=self.max_length,
            last_only=self.last_only,
            **options,
        )

    def _clip(self, source: Source, sampling: FrameSampling) -> Clip:
        known = self._known(source)
        verify, suits_decord = self.verify and known is None, known is not None and known.backend == "decord"
        with self._remembered(source):
            return read_video(source, sampling, verify=verify, suits_decord=suits_decord, decoding=self.decoding)

    def _image(self, source: str | TarMember) -> Image.Image:
        self._known(source)
        with self._remembered(source):
            return read_image(source, decoding=self.decoding)

    def _known(self, source: Source) -> Entry | None:
        """What the index knows of a good file, as it is now. Raises MediaError if it is known to be bad."""
        fault = self._bad_files.get(source)
        if fault is None:
            entry = self.index.find(source)
            if entry is None or entry.fault is None:
                return entry
            fault = self._bad_files[source] = entry.fault
        raise MediaError(*fault)

    @contextlib.contextmanager
    def _remembered(self, source: Source) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            self._bad_files[source] = Fault(error.message, error.hint, error.reason)
            raise


def _without_pixels(media: Media) -> Media:
    return {name: value for name, value in media.items() if name not in PIXELS.values()}
