"""Video files to sampled frames, with the true time of every frame. Runs in the decoding child (`decode_worker.py`).

Only the frames that `sample_indices` asks for become arrays, upright, in RGB. decord reads; what it cannot read, PyAV
does (`decode_pyav.py`). Invariant: pixels, indices and timestamps belong together and come from undamaged data. decord
alone does not promise that: where the bitstream is damaged FFmpeg paints over the hole, and where frames are missing
decord repeats others, both without a word. So a file is first decoded once from end to end with PyAV, which reports
both (`check_video`); anything but a clean pass is a `MediaError`. What cannot be noticed: a Matroska file with sound
that was cut off (its header does not tell the length of the video alone), and a last second that is missing.

Cost: the check is one more decode of the file, once per file and process (remembered by path, size and change time);
10 s of 480x270 H.264 take about 0.06 s of one core for each of the two. A file that decord is known to read rightly
(`suits_decord`, from the index) is opened, but not looked through. A member of a shard is read into memory.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import av
import decord
import numpy as np

from evs_train.data import images
from evs_train.data.decode_pyav import DECODE_ERRORS, by_pyav, failure, open_video, video_stream
from evs_train.data.decoded import REENCODE, Decoded, Pixels, Sink, check_length, check_pixels
from evs_train.data.decoding import Decoding
from evs_train.data.media_files import MediaFile, damage_of, locate
from evs_train.data.sampling import FrameSampling, sample_indices
from evs_train.data.sources import FrameList, Source, TarMember, name_of
from evs_train.errors import MediaError

# decord reports every failure twice, on stderr and as an exception; the exception is what this module passes on.
decord.logging.set_level(decord.logging.QUIET)


_TIME_SLACK = 5e-3
"""Seconds by which the means of decord's times (float32) and of the frames' own may differ."""
_MOST_SECONDS = 1e9


class Examined(NamedTuple):
    """What a look through a video found: how many frames were decoded, the mean of their times from the first one on
    (None where none were decoded), whether decord can seek in it, its codec, and how far its first frame asks to be
    turned (degrees; None where it was not decoded).
    """

    num_frames: int | None
    mean_start: float | None
    is_closed: bool
    codec: str | None = None
    rotation: int | None = None


class _UnsuitedError(Exception):
    """decord cannot read a file, which says nothing of the file yet."""


def read_video(
    source: Source, sampling: FrameSampling, *, verify: bool, suits_decord: bool, decoding: Decoding, sink: Sink
) -> Decoded:
    """Decode one video; see `video.read_video`, which has this done in the child.

    Raises:
        MediaError: the video is missing, no video, beyond a limit, or damaged anywhere (in a sampled frame or not).
    """
    if isinstance(source, FrameList):
        return images.read_frames(
            name_of(source), source.paths, source.fps, sampling, verify=verify, decoding=decoding, sink=sink
        )
    if isinstance(source, str) and os.path.isdir(source):
        paths = images.frames_in(source)
        return images.read_frames(
            source, paths, decoding.frames_fps, sampling, verify=verify, decoding=decoding, sink=sink
        )
    file = locate(source, "video")
    trusted = suits_decord and not verify and decoding.backend != "pyav"
    examined = _suiting_decord(file) if trusted else _examined(file, verify, decoding, sink)
    decoded = _by_either(file, sampling, examined, decoding, sink)
    return replace(decoded, codec=examined.codec, rotation=examined.rotation)


def _by_either(file: MediaFile, sampling: FrameSampling, examined: Examined, decoding: Decoding, sink: Sink) -> Decoded:
    if decoding.backend == "pyav":
        return by_pyav(file, sampling, examined.num_frames, decoding, sink)
    try:
        return _by_decord(file, sampling, examined, decoding, sink)
    except _UnsuitedError as error:
        if decoding.backend == "decord":
            raise MediaError(
                f"{file.name}: cannot be decoded by decord: {error}", "set data.backend to auto"
            ) from error
    return by_pyav(file, sampling, examined.num_frames, decoding, sink)


def check_video(source: str | TarMember, decoding: Decoding, sink: Sink) -> int:
    """Decode a video from end to end and return its number of frames.

    Raises:
        MediaError: it is missing, empty, not a video, or some of it is damaged, missing or undecodable.
    """
    examined = _examined(locate(source, "video"), True, decoding, sink)
    assert examined.num_frames is not None
    return examined.num_frames


def _by_decord(file: MediaFile, sampling: FrameSampling, examined: Examined, decoding: Decoding, sink: Sink) -> Decoded:
    if not examined.is_closed:
        raise _UnsuitedError("its groups of pictures are open: decord would return frames beside those asked for")
    try:
        reader = decord.VideoReader(file.for_decoder(), num_threads=1)
        sink.progress()
        if examined.num_frames not in (None, len(reader)):
            # decord counts packets, and would return repeats where no frame is behind one.
            raise _UnsuitedError(f"it lists {len(reader)} frames, {examined.num_frames} can be decoded")
        spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)  # (total_frames, 2): start and end
        starts = spans[:, 0] - spans[0, 0]
        fps = float(reader.get_avg_fps())
        # Where a container does not tell times, decord takes an unset one for a time, and equal times for frames.
        is_sound = np.isfinite(spans).all() and (np.diff(starts) > 0).all() and starts[-1] < _MOST_SECONDS
        if not (is_sound and math.isfinite(fps) and fps > 0):
            raise _UnsuitedError("the video has no usable timestamps or frame rate")
        if examined.mean_start is not None and not abs(starts.mean() - examined.mean_start) < _TIME_SLACK:
            raise _UnsuitedError("its times are not those of the decoded frames")
        duration = float(spans[-1, 1] - spans[0, 0])
        check_length(file.name, duration, len(starts), decoding)
        indices = sample_indices(starts, sampling)
        frames = sink.gather((_fetched(file, reader, index, decoding) for index in indices), len(indices))
    except (decord.DECORDError, RuntimeError, IndexError, StopIteration, AssertionError) as error:
        raise _UnsuitedError((str(error).strip() or "no reason given").splitlines()[0]) from error
    return Decoded(frames, indices, fps, starts[indices].tolist(), len(starts), duration, "decord")


def _fetched(file: MediaFile, reader: decord.VideoReader, index: int, decoding: Decoding) -> Pixels:
    frame = _rgb(reader[index].asnumpy())
    check_pixels(file.name, frame.shape[1], frame.shape[0], decoding)  # its header may not have been looked at
    return frame


def _rgb(raw: Pixels) -> Pixels:
    """Frame of decord, (H, W, 3 or more), without the padding of its rows: (H, W, 3).

    decord2 3.4 takes `bytes per row // width` for the number of channels, so that widths whose rows FFmpeg pads to four
    or more bytes per pixel (16, 24, 32, 48, 96, 144) come out as (H, W, 4 or more) with shifted pixels, and make its
    `get_batch` fail. Frames are therefore fetched one by one (the same seeks, the same time) and rows cut to 3 W bytes.
    """
    height, width = raw.shape[:2]
    return np.ascontiguousarray(raw.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)


@lru_cache(maxsize=1 << 16)
def _suiting_decord(file: MediaFile) -> Examined:
    """Stands for a look through a file that decord is known to read rightly.

    It is opened all the same, since decord opens whatever FFmpeg can, and the index that vouches for it may have come
    with the data. Raises MediaError.
    """
    try:
        with open_video(file):
            return Examined(None, None, is_closed=True)
    except DECODE_ERRORS as error:
        raise failure(file, 0, error) from error


@lru_cache(maxsize=1 << 16)
def _examined(file: MediaFile, verify: bool, decoding: Decoding, sink: Sink) -> Examined:
    """Hold a video's header against the limits and look through its packets; with `verify`, decode all of them."""
    name, num_frames, first, start, end, longest, total = file.name, 0, 0.0, 0.0, 0.0, 0.0, 0.0
    rotation = None
    times, keys = list[float](), list[int]()  # of the packets, in the order of the file; which of them are key frames
    try:
        with open_video(file) as container:
            stream = video_stream(container, file)
            codec = stream.codec_context.name
            check_pixels(name, stream.width, stream.height, decoding)
            declared = _declared_seconds(container, stream)
            check_length(name, declared, stream.frames, decoding)
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    keys += [len(times)] if packet.is_keyframe else []
                    times.append(math.nan if packet.pts is None else packet.pts)
                for frame in packet.decode() if verify else ():
                    if frame.is_corrupt:
                        reason = damage_of(file, is_video=True)
                        raise MediaError(f"{name}: damaged video: frame {num_frames} is corrupt", REENCODE, reason)
                    rotation = int(frame.rotation) if rotation is None else rotation
                    if frame.time is not None:
                        first = frame.time if num_frames == 0 else first
                        longest = max(longest, frame.time - start)
                        start, end = frame.time, frame.time + float(frame.duration * (frame.time_base or 0))
                        total += start - first
                    num_frames += 1
                    check_length(name, end - first, num_frames, decoding)
                sink.progress()
    except DECODE_ERRORS as error:
        raise failure(file, num_frames, error) from error
    if not verify:
        return Examined(None, None, _is_closed(times, keys), codec)
    if num_frames == 0:
        raise MediaError(f"{name}: holds no video frame", REENCODE, "no frames")
    # A header may count the last frame as longer than it is shown; two of the longest frames are allowed for that.
    if declared - end > max(1.0, 0.05 * declared, 2 * longest):
        lengths = f"the header says {declared:.1f} s of video, {end:.1f} s are there"
        raise MediaError(f"{name}: cut off: {lengths}", REENCODE, "truncated")
    return Examined(num_frames, total / num_frames, _is_closed(times, keys), codec, rotation)


def _is_closed(times: list[float], keys: list[int]) -> bool:
    """Whether every key frame stands in the file where it is shown: none has later packets that are shown before it.

    Else its groups of pictures are open, as x265 makes them by default, and decord 3.4 takes the place of a key frame
    among the packets for its place among the frames: after a seek it returns frames that are off by a few.
    """
    places = np.empty(len(times), np.int64)
    places[np.argsort(times, kind="stable")] = np.arange(len(times))
    return bool((places[keys] == keys).all()) and not np.isnan(times).any()


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Length of the video by the header; 0 where it is not told (Matroska tells only the longest stream's)."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if len(container.streams) == 1 and container.duration else 0.0
