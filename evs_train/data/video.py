"""Videos and images to pixels, with the true time of every frame: what the rest of the package calls.

Invariant: pixels, indices and timestamps of a `Clip` belong together and come from undamaged data; anything else is a
`MediaError` with a named reason, and nothing that a file does to a decoder ends this process. `decoding.py` says how
that is kept, `decode.py` how files are read. Memory is that of the sampled frames, once.

Not here: resizing, normalising (the model's processor does both), sound, remote files, and any retry or replacement of
a bad file (the caller decides).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.video_utils import VideoMetadata

from evs_train.data.decoding import DECODER, DEFAULTS, Decoding
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList, Source, TarMember, name_of
from evs_train.data_config import DataSection

CLOCK_HZ = 1000
"""Ticks per second of the clock that stands in for a frame rate where a video has none (see `video_metadata`)."""

_log = logging.getLogger(__name__)


def frame_sampling(data: DataSection) -> FrameSampling:
    """How a recipe's `data` section samples frames; 2 per second when it says nothing."""
    fps = 2.0 if data.fps is None and data.num_frames is None else data.fps
    return FrameSampling(fps=fps, num_frames=data.num_frames, min_frames=data.min_frames, max_frames=data.max_frames)


def decoding_options(data: DataSection) -> Decoding:
    """How a recipe's `data` section has media decoded, and its limits."""
    return Decoding(
        backend=data.backend,
        frames_fps=data.frames_fps,
        timeout=data.decode_timeout,
        max_pixels=data.max_pixels,
        max_seconds=data.max_video_seconds,
        max_frames=data.max_video_frames,
        memory_mb=data.decode_memory_mb,
    )


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video.

    Args:
        frames: (F, H, W, 3) uint8, RGB, upright (the container's rotation is applied).
        frame_indices: F positions in display order among the video's `total_frames` frames.
        fps: average frame rate of the source, frames per second.
        timestamps: (F,) float64, seconds from the start of the video's first frame to the start of each sampled frame.
        total_frames: number of frames in the source.
        duration: seconds from the start of the first to the end of the last frame of the source.
        path: the file, shard member or frames, for messages.
        backend: what decoded it: decord, pyav or images.
        codec: of the file, by FFmpeg's name; None where only decord looked at it.
        rotation: degrees by which the file says that its pictures are turned; None where it was not verified.
        shape_only: nothing was decoded: `frames` has the shape alone, one zero for all of its values.
    """

    frames: npt.NDArray[np.uint8]
    frame_indices: list[int]
    fps: float
    timestamps: npt.NDArray[np.float64]
    total_frames: int
    duration: float
    path: str
    backend: str = "decord"
    codec: str | None = None
    rotation: int | None = None
    shape_only: bool = False


def read_video(
    source: Source | Path,
    sampling: FrameSampling,
    *,
    verify: bool = True,
    suits_decord: bool = False,
    decoding: Decoding = DEFAULTS,
) -> Clip:
    """Decode sampled frames of one video, in this process's decoding child.

    Of several video streams the one FFmpeg calls best is read. A folder is a video whose frames are its images.

    Args:
        source: file, folder of frames, member of a shard, or list of frames.
        sampling: which frames.
        verify: decode the whole video first, to be sure of it (`decode.py`); not needed where that was done before.
        suits_decord: without `verify`: decord read this file before, after it was verified, so it need not be looked
            through to find out whether decord can.
        decoding: decoder and limits.

    Raises:
        MediaError: the video cannot be used, see `errors.Reason`.
    """
    source = str(source) if isinstance(source, Path) else source
    name = name_of(source)
    reply = DECODER.request(name, decoding.timeout, absolute(source), decoding, sampling, verify, suits_decord)
    facts = reply.facts
    timestamps = np.array(facts.pop("timestamps"), np.float64)
    clip = Clip(frames=reply.pixels, timestamps=timestamps, path=name, **facts)
    _log_once(name, clip.backend)
    return clip


@lru_cache(maxsize=1 << 16)
def _log_once(name: str, backend: str) -> None:
    _log.debug("%s is read with %s", name, backend)


def video_metadata(clip: Clip) -> VideoMetadata:
    """What a Hugging Face video processor needs, with `do_sample_frames=False`, to write true timestamps into prompts.

    The processors compute time as index / fps (Qwen3-VL) or index * int(1000 / fps) / 1000 (Nemotron Omni). Where every
    sampled frame lies within half a source frame of index / fps, they are given the real rate and indices, which is
    what serving engines give them. Elsewhere (variable frame rate) frames are counted on a clock of 1000 ticks per
    second, which makes both formulas return the true time in milliseconds; `total_num_frames` then counts ticks too.
    """
    height, width = clip.frames.shape[1:3]
    fps, indices, total = clip.fps, clip.frame_indices, clip.total_frames
    if (np.abs(clip.timestamps - np.asarray(indices) / fps) > 0.5 / fps).any():
        indices = [int(tick) for tick in np.rint(clip.timestamps * CLOCK_HZ)]
        fps, total = float(CLOCK_HZ), max(round(clip.duration * CLOCK_HZ), indices[-1] + 1)
    return VideoMetadata(
        total_num_frames=total,
        fps=fps,
        width=width,
        height=height,
        duration=clip.duration,
        video_backend=clip.backend,
        frames_indices=list(indices),
    )


def read_image(source: str | TarMember | Path, *, decoding: Decoding = DEFAULTS) -> Image.Image:
    """Decode one image to RGB, upright by its EXIF tag, in this process's decoding child.

    Raises:
        MediaError: the image cannot be used, see `errors.Reason`.
    """
    source = str(source) if isinstance(source, Path) else source
    return Image.fromarray(DECODER.request(name_of(source), decoding.timeout, absolute(source), decoding).pixels)


def absolute(source: Source) -> Source:
    """The same for a process that may have another working directory."""
    here = os.getcwd()
    if isinstance(source, TarMember):
        return replace(source, shard=os.path.join(here, source.shard))
    if isinstance(source, FrameList):
        return replace(source, paths=tuple(os.path.join(here, path) for path in source.paths))
    return os.path.join(here, source)
