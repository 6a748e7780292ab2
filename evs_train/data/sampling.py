"""Which frames of a video a model sees: a pure function of the frames' times.

Invariant: chosen indices are strictly increasing, and the same times give the same choice on every machine.
Cost: none to speak of. No frame is opened here; see `decode.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evs_train.errors import RecipeError


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees. Exactly one of `fps` and `num_frames` is set.

    Args:
        fps: frames per second of video time; the result is clamped to `min_frames` and `max_frames`.
        num_frames: this many frames spread uniformly over the video, whatever its length.
        min_frames: lower clamp for `fps`; a video with fewer frames gives all it has.
        max_frames: upper clamp for `fps`.
        segment: seconds from and to which frames are taken, the last one included; None for the whole video.
        share: of the chosen frames so many stay, spread evenly, but at least `min_frames` of them.

    Raises:
        RecipeError: a value or a combination that makes no sense.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 1
    max_frames: int = 768
    share: float = 1.0
    segment: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.num_frames is None):
            given = "neither is" if self.fps is None else "both are"
            raise RecipeError(f"exactly one of data.fps and data.num_frames must be set: {given}", "set one to null")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise RecipeError(f"data.fps must be a positive number, not {self.fps}")
        if self.num_frames is not None and self.num_frames < 1:
            raise RecipeError(f"data.num_frames must be at least 1, not {self.num_frames}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise RecipeError(
                f"data.min_frames must be at least 1 and at most data.max_frames: {self.min_frames}, {self.max_frames}"
            )
        if self.segment is not None and not 0 <= self.segment[0] < self.segment[1]:
            raise RecipeError(f"a segment must start at 0 s or later and end after that: {self.segment}")
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"a share of the sampled frames must be in (0, 1], not {self.share}")

    def thinned(self, count: int) -> list[int]:
        """Which of `count` chosen frames stay, as places among them."""
        return _spread(count, max(min(self.min_frames, count), math.floor(count * self.share)))


def sample_indices(timestamps: npt.NDArray[np.float64], sampling: FrameSampling) -> list[int]:
    """Choose frames: pure, deterministic, strictly increasing.

    By `fps`, the frame nearest in time to each of 0, 1/fps, 2/fps ... up to the start of the last frame (of two equally
    near ones the earlier), each at most once. If that gives fewer than `min_frames` or more than `max_frames`, that
    many frames are spread uniformly over the indices, as for `num_frames`. Of a segment, the same is done with the
    frames in it; where there is none, with the one that is on screen then.

    Args:
        timestamps: (total_frames,) seconds, ascending, of all frames of the video.
        sampling: what to choose.

    Returns:
        Indices into `timestamps`; all of them where the video has no more than were asked for.
    """
    if sampling.segment is not None:
        start, end = (time + timestamps[0] for time in sampling.segment)
        first, behind = np.searchsorted(timestamps, [start, np.nextafter(end, math.inf)])
        if first == behind:
            first, behind = max(first - 1, 0), max(first, 1)
        inner = sample_indices(timestamps[first:behind], replace(sampling, segment=None))
        return [int(first) + index for index in inner]
    chosen = _chosen(timestamps, sampling)
    return [chosen[place] for place in sampling.thinned(len(chosen))]


def _chosen(timestamps: npt.NDArray[np.float64], sampling: FrameSampling) -> list[int]:
    total = len(timestamps)
    if sampling.fps is None:
        return _spread(total, sampling.num_frames or total)
    times = timestamps - timestamps[0]
    # The slack keeps a last frame whose time is k/fps but for rounding (decord tells time in float32).
    num_targets = math.floor(times[-1] * sampling.fps + 1e-3) + 1
    midpoints = (times[1:] + times[:-1]) / 2
    nearest = np.unique(np.searchsorted(midpoints, np.arange(num_targets) / sampling.fps, side="left"))
    clamped = min(max(len(nearest), sampling.min_frames), sampling.max_frames)
    return _spread(total, clamped) if clamped != len(nearest) else [int(index) for index in nearest]


def _spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices from first to last; in integers, so that no rounding can repeat one."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [0]
    return [(2 * k * (total - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]
