"""Sparse decoding with PyAV, for what decord cannot read; and what both ways of decoding ask PyAV.

The packets say when each frame is shown; then each group of pictures that holds a sampled frame is decoded from its key
frame on. Invariant: a frame is taken only if its own time is the one that was asked for, so none is a repeat or a
neighbour. Cost: one pass over the file without decoding, and the decoding that decord would do as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np

from evs_train.data.decoded import REENCODE, Decoded, Pixels, Sink, check_length
from evs_train.data.decoding import Decoding
from evs_train.data.media_files import MediaFile, damage_of
from evs_train.data.sampling import FrameSampling, sample_indices
from evs_train.errors import MediaError

DECODE_ERRORS = (av.FFmpegError, ValueError)
NO_VIDEOS = ("image2", "tty")
"""Formats of FFmpeg that make a video of a picture, or of text; so do those called `..._pipe`."""


def open_video(file: MediaFile) -> av.container.InputContainer:
    """Open a file; strange letters in its title do no harm."""
    return av.open(file.for_decoder(), metadata_errors="replace")


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The stream that FFmpeg, and so decord, calls the best one; decoded on one thread: loaders run over files.

    Raises:
        MediaError: the file is a picture or a text, or has no video but sound, perhaps with a cover picture.
    """
    if container.format.name in NO_VIDEOS or container.format.name.endswith("_pipe"):
        raise MediaError(f"{name}: cannot be decoded: it is a picture or a text", "list it as an image", "not a video")
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
        hint = "remove its rows, or list it as another kind of file"
        raise MediaError(f"{name}: has no video stream", hint, "no video stream")
    stream.codec_context.thread_count = 1
    return stream


def failure(file: MediaFile, num_frames: int, error: Exception) -> MediaError:
    """What to say of a file that PyAV gave up on after `num_frames` frames."""
    where = f" after {num_frames} frames" if num_frames else ""
    return MediaError(f"{file.name}: cannot be decoded{where}: {error}", REENCODE, damage_of(file))


def by_pyav(
    file: MediaFile, sampling: FrameSampling, num_decodable: int | None, decoding: Decoding, sink: Sink
) -> Decoded:
    """Decode sampled frames.

    Args:
        file: what is read.
        sampling: which frames.
        num_decodable: how many frames decoding from end to end gave, if that was done.
        decoding: limits.
        sink: takes the pixels.

    Raises:
        MediaError: the packets have no times, or a sampled frame is not behind its packet.
    """
    name = file.name
    try:
        with open_video(file) as container:
            stream = video_stream(container, name)
            packets = _packets(container, stream, name, sink)
            if num_decodable is not None and len(packets) != num_decodable:
                listed = f"{len(packets)} frames are listed, {num_decodable} can be decoded"
                raise MediaError(f"{name}: {listed}", REENCODE, "damaged")
            tick = float(stream.time_base)
            starts = np.array([packet.pts - packets[0].pts for packet in packets]) * tick
            fps = float(stream.average_rate or 0) or (len(packets) - 1) / max(float(starts[-1]), tick)
            if fps == 0:  # one frame, and no word of a rate
                raise MediaError(f"{name}: the video has no frame rate", REENCODE, "no timestamps")
            duration = float(starts[-1]) + (packets[-1].duration * tick or 1 / fps)
            check_length(name, duration, len(packets), decoding)
            indices = sample_indices(starts, sampling)
            keys = [packet.pts for packet in packets if packet.is_key] or [packets[0].pts]
            frames = _frames_at(container, stream, [packets[index].pts for index in indices], keys, name)
            pixels = sink.gather(frames, len(indices))
    except DECODE_ERRORS as error:
        raise failure(file, 0, error) from error
    return Decoded(pixels, indices, fps, starts[indices].tolist(), len(packets), duration, "pyav")


class _Packet(NamedTuple):
    """What is known of a frame before it is decoded; times in the stream's ticks."""

    pts: int
    duration: int
    is_key: bool


def _packets(container: av.container.InputContainer, stream: av.VideoStream, name: str, sink: Sink) -> list[_Packet]:
    """The packets of all frames that are shown, in order of time."""
    packets = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                raise MediaError(f"{name}: frames do not tell their times", REENCODE, "no timestamps")
            packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe))
            sink.progress()
    if not packets:
        raise MediaError(f"{name}: holds no video frame", REENCODE, "no frames")
    return sorted(packets)


def _frames_at(
    container: av.container.InputContainer, stream: av.VideoStream, times: Sequence[int], keys: Sequence[int], name: str
) -> Iterator[Pixels]:
    """The frames that are shown at `times`, ascending; `keys` are the times of key frames."""
    position: int | None = None
    decoder: Iterator[av.VideoFrame] = iter(())
    size: tuple[int, int] | None = None
    for time in times:
        key = keys[max(bisect_right(keys, time) - 1, 0)]
        if position is None or key > position:
            container.seek(key, stream=stream)
            decoder = container.decode(stream)
        frame = _advance(decoder, time)
        if frame is None:  # the seek went past it: some containers have no index
            container.seek(keys[0], stream=stream)
            decoder = container.decode(stream)
            frame = _advance(decoder, time)
        if frame is None or frame.is_corrupt:
            state = "missing" if frame is None else "corrupt"
            raise MediaError(f"{name}: damaged video: the frame at tick {time} is {state}", REENCODE, "damaged")
        position = time
        size = size or (frame.width, frame.height)  # a picture that changes its size is scaled to the first, as decord
        picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
        yield np.rot90(picture, round(frame.rotation / 90))


def _advance(decoder: Iterator[av.VideoFrame], time: int) -> av.VideoFrame | None:
    """Decode up to the frame of that time; None when there is none."""
    for frame in decoder:
        if frame.pts is not None and frame.pts >= time:
            return frame if frame.pts == time else None
    return None
