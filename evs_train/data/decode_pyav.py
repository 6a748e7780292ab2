"""Sparse decoding with PyAV, for what decord cannot read; and what both ways of decoding ask PyAV.

The packets say when each frame is shown; then each group of pictures that holds a sampled frame is decoded from its key
frame on. Invariant: a frame is taken only if its own time is the one that was asked for, so none is a repeat or a
neighbour. Where a container cannot be seeked to the tick, or does not tell frames' times (AVI, which shows frames at
an even pace in the order in which they come out of the decoder), all frames are decoded and counted.

Cost: one pass over the file without decoding, and the decoding that decord would do as well; all of it when counting.
"""

from __future__ import annotations

import errno
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
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mpegvideo", "m4v",
    "h264", "hevc", "vvc", "av1", "obu", "ivf", "vc1", "dv", "gif", "apng", "mxf", "nut", "rm", "swf", "wtv",
    "yuv4mpegpipe", "mp3", "wav", "flac", "aac", "image2", "tty", "bmp_pipe", "gif_pipe", "jpeg_pipe", "png_pipe",
    "webp_pipe",
)  # fmt: skip
"""FFmpeg's names of the formats that are opened: such as keep all in one file. Playlists (HLS, DASH, concat, IMF) and
session descriptions (SDP, RTSP) are not among them: they make FFmpeg open other files and connections. Sound and
pictures are, to be told for what they are."""
NO_VIDEOS = ("image2", "tty")
"""Formats of FFmpeg that make a video of a picture, or of text; so do those called `..._pipe`."""


class _SeekError(Exception):
    """A seek did not lead to the frame that was asked for."""


class _Packet(NamedTuple):
    """What is known of a frame before it is decoded; times in the stream's ticks."""

    time: int
    duration: int
    is_key: bool


def open_video(file: MediaFile) -> av.container.InputContainer:
    """Open a file; strange letters in its title do no harm.

    Raises:
        MediaError: what is in it is none of `FORMATS`, whatever its name says.
    """
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        return av.open(file.for_decoder(), metadata_errors="replace", options=options)
    except av.ArgumentError as error:  # of the whitelist
        message = f"{file.name}: cannot be decoded: of a format that is not read, such as a playlist"
        raise MediaError(message, REENCODE, "not a video") from error


def video_stream(container: av.container.InputContainer, file: MediaFile) -> av.VideoStream:
    """The stream that FFmpeg, and so decord, calls the best one; decoded on one thread: loaders run over files.

    Raises:
        MediaError: the file is a picture or a text, or has no video but sound, perhaps with a cover picture.
    """
    if container.format.name in NO_VIDEOS or container.format.name.endswith("_pipe"):
        raise MediaError(
            f"{file.name}: cannot be decoded: it is a picture or a text", "list it as an image", "not a video"
        )
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
        hint, is_cut = "remove its rows, or list it as another kind of file", damage_of(file) == "truncated"
        raise MediaError(f"{file.name}: has no video stream", hint, "truncated" if is_cut else "no video stream")
    stream.codec_context.thread_count = 1
    return stream


def failure(file: MediaFile, num_frames: int, error: Exception) -> MediaError:
    """What to say of a file that PyAV gave up on after `num_frames` frames. Raises MemoryError where that was why."""
    if isinstance(error, av.FFmpegError) and error.errno == errno.ENOMEM:
        raise MemoryError from error
    where = f" after {num_frames} frames" if num_frames else ""
    reason = "truncated" if isinstance(error, av.EOFError) else damage_of(file, is_video=num_frames > 0)
    return MediaError(f"{file.name}: cannot be decoded{where}: {error}", REENCODE, reason)


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
        MediaError: the packets have no times, or a frame is not behind its packet.
    """
    name = file.name
    try:
        with open_video(file) as container:
            stream = video_stream(container, file)
            in_order = container.format.name == "avi"
            packets = _packets(container, stream, name, in_order, sink)
            if num_decodable is not None and len(packets) != num_decodable:
                listed = f"{len(packets)} frames are listed, {num_decodable} can be decoded"
                raise MediaError(f"{name}: {listed}", REENCODE, "damaged")
            tick, rate = float(stream.time_base), float(stream.average_rate or 0)
        starts = np.array([packet.time - packets[0].time for packet in packets]) * tick
        fps = rate or (len(packets) - 1) / max(float(starts[-1]), tick)
        if fps == 0:  # one frame, and no word of a rate
            raise MediaError(f"{name}: the video has no frame rate", REENCODE, "no timestamps")
        duration = float(starts[-1]) + (packets[-1].duration * tick or 1 / fps)
        check_length(name, duration, len(packets), decoding)
        indices = sample_indices(starts, sampling)
        counted = _by_counting(file, indices, packets, in_order, sink)
        if in_order or (np.diff(starts) == 0).any():
            pixels = sink.gather(counted, len(indices))
        else:
            try:
                pixels = sink.gather(_by_seeking(file, indices, packets), len(indices))
            except _SeekError:
                pixels = sink.gather(counted, len(indices))
    except DECODE_ERRORS as error:
        raise failure(file, 0, error) from error
    return Decoded(pixels, indices, fps, starts[indices].tolist(), len(packets), duration, "pyav")


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, name: str, in_order: bool, sink: Sink
) -> list[_Packet]:
    """The packets of all frames that are shown, in order of time."""
    packets = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            time = packet.dts if in_order else packet.pts
            if time is None:
                raise MediaError(f"{name}: frames do not tell their times", REENCODE, "no timestamps")
            packets.append(_Packet(time, packet.duration or 0, packet.is_keyframe))
            sink.progress()
    if not packets:
        raise MediaError(f"{name}: holds no video frame", REENCODE, "no frames")
    return sorted(packets)


def _by_seeking(file: MediaFile, indices: Sequence[int], packets: Sequence[_Packet]) -> Iterator[Pixels]:
    """Frames of these places, ascending, each decoded from the key frame before it."""
    keys = [packet.time for packet in packets if packet.is_key]
    first, size, position = packets[0].time, None, packets[0].time
    with open_video(file) as container:
        stream = video_stream(container, file)
        decoder = container.decode(stream)
        for time in (packets[index].time for index in indices):
            key = keys[bisect_right(keys, time) - 1] if keys and keys[0] <= time else first
            if key > position:
                container.seek(key, stream=stream)
                decoder = container.decode(stream)
            frame = next((frame for frame in decoder if frame.pts is None or frame.pts >= time), None)
            if frame is None or frame.pts != time or frame.is_corrupt:
                raise _SeekError
            position = time
            size = size or (frame.width, frame.height)
            yield _upright(frame, size)


def _by_counting(
    file: MediaFile, indices: Sequence[int], packets: Sequence[_Packet], in_order: bool, sink: Sink
) -> Iterator[Pixels]:
    """Frames of these places, ascending, out of all; every frame must be there, at its time unless `in_order`."""
    wanted, size, count = set(indices), None, 0
    with open_video(file) as container:
        for frame in container.decode(video_stream(container, file)):
            is_listed = count < len(packets) and (in_order or frame.pts == packets[count].time)
            if frame.is_corrupt or not is_listed:
                state = "corrupt" if frame.is_corrupt else "not the one that is listed there"
                reason = damage_of(file, is_video=True)
                raise MediaError(f"{file.name}: damaged video: frame {count} is {state}", REENCODE, reason)
            size = size or (frame.width, frame.height)
            if count in wanted:
                yield _upright(frame, size)
            count += 1
            sink.progress()
    if count != len(packets):
        listed = f"{len(packets)} frames are listed, {count} can be decoded"
        raise MediaError(f"{file.name}: damaged video: {listed}", REENCODE, "damaged")


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> Pixels:
    """Pixels of a frame, turned as it asks for; where their size changes, scaled to the first one's, as by decord."""
    picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    return np.rot90(picture, round(frame.rotation / 90))
