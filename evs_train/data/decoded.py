"""What the decoders have in common: where pixels go, what is told of a video, and the limits that all of them keep.

Invariant: a limit is held against the header before anything large is done, and against what was really found after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evs_train.data.decoding import Decoding
from evs_train.errors import MediaError

Pixels = npt.NDArray[np.uint8]
REENCODE = "re-encode the file, for example to H.264 mp4 with ffmpeg, or remove its rows"
_BYTES_PER_PIXEL = 24
"""What decoders may need: up to 16 reference frames of 1.5 bytes (H.264)."""


def _empty(shape: tuple[int, ...]) -> Pixels:
    return np.empty(shape, np.uint8)


def _silent() -> None:
    """No progress is reported."""


@dataclass(frozen=True)
class Sink:
    """Where decoded pixels go (`allocate` makes the array), and who hears that the work gets on."""

    allocate: Callable[[tuple[int, ...]], Pixels] = _empty
    progress: Callable[[], None] = _silent

    def gather(self, frames: Iterable[Pixels], count: int) -> Pixels:
        """`count` frames of (H, W, 3), written into one array (F, H, W, 3) as they come."""
        pixels = None
        for place, frame in enumerate(frames):
            if pixels is None:
                pixels = self.allocate((count, *frame.shape))
            pixels[place] = frame
            self.progress()
        assert pixels is not None
        return pixels


@dataclass(frozen=True)
class Decoded:
    """Sampled frames, and what is known of their source; fields as of `video.Clip`, times as plain floats."""

    frames: Pixels
    frame_indices: list[int]
    fps: float
    timestamps: list[float]
    total_frames: int
    duration: float
    backend: str
    codec: str | None = None
    rotation: int | None = None


def check_pixels(name: str, width: int, height: int, decoding: Decoding) -> None:
    """Hold the size of a frame or image against the limits.

    Raises:
        MediaError: "too large" beyond `max_pixels`.
        MemoryError: reference frames of that size may not fit into `memory_mb`, and decoders that run into that limit
            say all sorts of things, for example that the data are invalid.
    """
    if decoding.max_pixels is not None and width * height > decoding.max_pixels:
        raise MediaError(
            f"{name}: {width} x {height} pixels are more than {decoding.max_pixels:,}",
            "scale it down, or raise data.max_pixels",
            "too large",
        )
    if decoding.memory_mb is not None and width * height * _BYTES_PER_PIXEL > decoding.memory_mb << 20:
        raise MemoryError


def check_length(name: str, seconds: float, frames: int, decoding: Decoding) -> None:
    """Raises MediaError ("too long") for more than `max_seconds` or `max_frames`."""
    if decoding.max_seconds is not None and seconds > decoding.max_seconds:
        raise MediaError(
            f"{name}: {seconds:.1f} s of video are more than {decoding.max_seconds:g}",
            "cut it, or raise data.max_video_seconds",
            "too long",
        )
    if decoding.max_frames is not None and frames > decoding.max_frames:
        raise MediaError(
            f"{name}: {frames} frames are more than {decoding.max_frames}",
            "cut it, or raise data.max_video_frames",
            "too long",
        )
