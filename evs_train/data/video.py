"""Video and image files to pixels, with the true time of every frame.

A clip is decoded sparsely with decord: only the frames that `sample_indices` asks for become arrays, upright, in RGB.
Invariant: pixels, indices and timestamps of a `Clip` belong together and come from undamaged data. decord alone does
not promise that: where the bitstream is damaged FFmpeg paints over the hole, and where frames are missing decord
repeats others, both without a word. So a file is first decoded once from end to end with PyAV, which reports both
(`check_video`); anything but a clean pass is a `MediaError`. What cannot be noticed: a Matroska file with sound that
was cut off (its header does not tell the length of the video alone), and a last second that is missing.

Cost: the check is one more decode of the file, once per file and process (remembered by path, size and change time);
10 s of 480x270 H.264 take about 0.06 s of one core for each of the two. Memory is the sampled frames only.

Not here: resizing, normalising (the model's processor does both), sound, remote files, and any retry or replacement of
a bad file (the caller decides).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import decord
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata

from evs_train.config import DataSection
from evs_train.errors import MediaError, RecipeError

CLOCK_HZ = 1000
"""Ticks per second of the clock that stands in for a frame rate where a video has none (see `video_metadata`)."""

REENCODE = "re-encode the file, for example to H.264 mp4 with ffmpeg, or remove its rows"

# decord reports every failure twice, on stderr and as an exception; the exception is what this module passes on.
decord.logging.set_level(decord.logging.QUIET)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees. Exactly one of `fps` and `num_frames` is set.

    Args:
        fps: frames per second of video time; the result is clamped to `min_frames` and `max_frames`.
        num_frames: this many frames spread uniformly over the video, whatever its length.
        min_frames: lower clamp for `fps`; a video with fewer frames gives all it has.
        max_frames: upper clamp for `fps`.

    Raises:
        RecipeError: a value or a combination that makes no sense.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 1
    max_frames: int = 768

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


def frame_sampling(data: DataSection) -> FrameSampling:
    """How a recipe's `data` section samples frames; 2 per second when it says nothing."""
    fps = 2.0 if data.fps is None and data.num_frames is None else data.fps
    return FrameSampling(fps=fps, num_frames=data.num_frames, min_frames=data.min_frames, max_frames=data.max_frames)


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video file.

    Args:
        frames: (F, H, W, 3) uint8, RGB, upright (the container's rotation is applied).
        frame_indices: F positions in display order among the video's `total_frames` frames.
        fps: average frame rate of the source, frames per second.
        timestamps: (F,) float64, seconds from the start of the video's first frame to the start of each sampled frame.
        total_frames: number of frames in the source.
        duration: seconds from the start of the first to the end of the last frame of the source.
        path: the file, for messages.
    """

    frames: npt.NDArray[np.uint8]
    frame_indices: list[int]
    fps: float
    timestamps: npt.NDArray[np.float64]
    total_frames: int
    duration: float
    path: str


def sample_indices(timestamps: npt.NDArray[np.float64], sampling: FrameSampling) -> list[int]:
    """Choose frames: pure, deterministic, strictly increasing.

    By `fps`, the frame nearest in time to each of 0, 1/fps, 2/fps ... up to the start of the last frame (of two equally
    near ones the earlier), each at most once. If that gives fewer than `min_frames` or more than `max_frames`, that
    many frames are spread uniformly over the indices, as for `num_frames`.

    Args:
        timestamps: (total_frames,) seconds, ascending, of all frames of the video.
        sampling: what to choose.

    Returns:
        Indices into `timestamps`; all of them where the video has no more than were asked for.
    """
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


def read_video(path: str | Path, sampling: FrameSampling, *, verify: bool = True) -> Clip:
    """Decode one video file, after checking it from end to end unless `verify` is off (see the module's docstring).

    Of several video streams the one FFmpeg calls best is read. decord runs on one thread: loaders run over files.

    Raises:
        MediaError: the file is missing, empty, not a video, or damaged anywhere (in a sampled frame or not).
    """
    path = str(_existing(Path(path), "video"))
    num_decodable = check_video(path) if verify else None
    try:
        reader = decord.VideoReader(path, num_threads=1)
        if num_decodable is not None and len(reader) != num_decodable:
            # decord counts packets, and would return repeats where no frame is behind one.
            raise MediaError(f"{path}: {len(reader)} frames are listed, {num_decodable} can be decoded", REENCODE)
        spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)  # (total_frames, 2): start and end
        starts = spans[:, 0] - spans[0, 0]
        fps = float(reader.get_avg_fps())
        if not (np.isfinite(spans).all() and (np.diff(starts) >= 0).all() and math.isfinite(fps) and fps > 0):
            raise MediaError(f"{path}: the video has no usable timestamps or frame rate", REENCODE)
        indices = sample_indices(starts, sampling)
        frames = np.stack([_rgb(reader[index].asnumpy()) for index in indices])
    except (decord.DECORDError, RuntimeError, IndexError, StopIteration) as error:
        reason = str(error).strip().splitlines()[0]
        raise MediaError(f"{path}: cannot be decoded: {reason}", REENCODE) from error
    return Clip(frames, indices, fps, starts[indices], len(starts), float(spans[-1, 1] - spans[0, 0]), path)


def _rgb(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Frame of decord, (H, W, 3 or more), without the padding of its rows: (H, W, 3).

    decord2 3.4 takes `bytes per row // width` for the number of channels, so that widths whose rows FFmpeg pads to four
    or more bytes per pixel (16, 24, 32, 48, 96, 144) come out as (H, W, 4 or more) with shifted pixels, and make its
    `get_batch` fail. Frames are therefore fetched one by one (the same seeks, the same time) and rows cut to 3 W bytes.
    """
    height, width = raw.shape[:2]
    return np.ascontiguousarray(raw.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)


def check_video(path: str | Path) -> int:
    """Decode a video from end to end and return its number of frames.

    Raises:
        MediaError: it is missing, empty, not a video, or some of it is damaged, missing or undecodable.
    """
    stat = _existing(Path(path), "video").stat()
    return _check_video(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _check_video(path: str, size: int, mtime_ns: int) -> int:
    """`check_video` for one state of a file; size and change time are there for the cache."""
    num_frames, start, end, longest = 0, 0.0, 0.0, 0.0
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise MediaError(f"{path}: has no video stream", "remove its rows, or list it as another kind of file")
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise MediaError(f"{path}: damaged video: frame {num_frames} is corrupt", REENCODE)
                num_frames += 1
                if frame.time is not None:
                    longest = max(longest, frame.time - start)
                    start, end = frame.time, frame.time + float(frame.duration * (frame.time_base or 0))
            declared = _declared_seconds(container, stream)
    except (av.FFmpegError, ValueError) as error:
        where = f" after {num_frames} frames" if num_frames else ""
        raise MediaError(f"{path}: cannot be decoded{where}: {error}", REENCODE) from error
    if num_frames == 0:
        raise MediaError(f"{path}: holds no video frame", REENCODE)
    # A header may count the last frame as longer than it is shown; two of the longest frames are allowed for that.
    if declared - end > max(1.0, 0.05 * declared, 2 * longest):
        raise MediaError(f"{path}: cut off: the header says {declared:.1f} s of video, {end:.1f} s are there", REENCODE)
    return num_frames


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Length of the video by the header; 0 where it is not told (Matroska tells only the longest stream's)."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if len(container.streams) == 1 and container.duration else 0.0


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
        video_backend="decord",
        frames_indices=list(indices),
    )


def read_image(path: str | Path) -> Image.Image:
    """Decode one image file to RGB, upright by its EXIF tag (as `transformers.image_utils.load_image` does).

    Raises:
        MediaError: the file is missing, empty, or not a whole image.
    """
    path = _existing(Path(path), "image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be decoded: {error}", "replace the file, or remove its rows") from error


def _existing(path: Path, kind: str) -> Path:
    if not path.exists():
        raise MediaError(f"{path}: {kind} file not found", "check the path in the row and data.media_root")
    if not path.is_file():
        raise MediaError(f"{path}: not a file", f"name one {kind} file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: {kind} file is empty", "copy it again, or remove its rows")
    return path
