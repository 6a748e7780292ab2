"""Tests of `evs_train.data.video` on recorded clips, and on files written or damaged here."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.nemotron_h_omni.processing_nemotron_h_omni import NemotronH_Omni_Reasoning_V3Processor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from evs_train.data.decode import check_video
from evs_train.data.decoded import Sink
from evs_train.data.decoding import DEFAULTS, Decoding
from evs_train.data.sampling import FrameSampling, sample_indices
from evs_train.data.video import read_image, read_video, video_metadata
from evs_train.errors import MediaError, RecipeError
from tests.conftest import write_noise

VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"
recorded = pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"the recorded clips are not there: {VIDEOS}")
EVERY_FRAME = FrameSampling(num_frames=10_000)
VARIABLE_MS = [*range(0, 2000, 100), *range(2000, 10_000, 400)]  # 20 frames at 10 per second, then 20 at 2.5


def write_video(
    path: Path, times_ms: Sequence[int], size: tuple[int, int] = (128, 96), options: dict[str, str] | None = None
) -> Path:
    """A counter of frames: frame i shows brightness 4 i over a fixed pattern."""
    width, height = size
    pattern = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "15", "g": "12", "threads": "1", "bf": "0", **(options or {})}
        for index, time_ms in enumerate(times_ms):
            picture = pattern.copy()
            picture[height // 2 :] = 4 * index
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def counters(frames: np.ndarray) -> list[int]:
    height = frames.shape[1]
    return [round(float(frame[height // 2 + 4 :].mean()) / 4) for frame in frames]


@recorded
@pytest.mark.parametrize(
    ("name", "total", "height", "width", "fps"),
    [
        ("flipping_a_pancake.mkv", 310, 240, 426, 30.0),
        ("nasa_13013.mp4", 390, 270, 480, 30000 / 1001),  # of its two video streams, the default one
        ("av1_video.mkv", 125, 360, 640, 25.0),
        ("h265_video.mp4", 10, 128, 128, 10.0),
        ("video_0.mov", 3, 320, 568, 30.0),
        ("video_90.mov", 3, 568, 320, 30.0),  # turned by its rotation flag
    ],
)
def test_recorded_clips_are_read(name: str, total: int, height: int, width: int, fps: float) -> None:
    clip = read_video(VIDEOS / name, FrameSampling(num_frames=8))
    count = min(total, 8)
    assert clip.frames.shape == (count, height, width, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.timestamps.dtype == np.float64
    assert clip.total_frames == total
    assert clip.frame_indices[0] == 0
    assert clip.frame_indices[-1] == total - 1
    assert clip.fps == pytest.approx(fps)
    assert clip.duration == pytest.approx(total / fps, abs=0.002)
    assert clip.timestamps == pytest.approx(np.array(clip.frame_indices) / fps, abs=0.001)
    assert clip.path == str(VIDEOS / name)


@recorded
def test_pixels_and_times_are_those_of_another_decoder() -> None:
    path = VIDEOS / "nasa_13013.mp4"
    clip = read_video(path, FrameSampling(fps=2))
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = list(container.decode(stream))
    for index, picture, timestamp in zip(clip.frame_indices, clip.frames, clip.timestamps, strict=True):
        assert np.abs(frames[index].to_ndarray(format="rgb24").astype(int) - picture).mean() < 2
        assert timestamp == pytest.approx(frames[index].time, abs=1e-4)


@recorded
def test_rotated_clip_is_upright() -> None:
    clip = read_video(VIDEOS / "video_90.mov", EVERY_FRAME)
    with av.open(str(VIDEOS / "video_90.mov")) as container:
        frames = list(container.decode(video=0))
    assert [frame.rotation for frame in frames] == [-90, -90, -90]
    stored = np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(int)
    assert np.abs(np.rot90(stored, -1, axes=(1, 2)) - clip.frames).mean() < 2


@recorded
@pytest.mark.parametrize("num_frames", [1, 5, 50])
def test_damaged_recording_is_refused_even_where_sampled_frames_are_sound(num_frames: int) -> None:
    with pytest.raises(MediaError, match=r"corrupted\.mp4: .*decoded"):
        read_video(VIDEOS / "corrupted.mp4", FrameSampling(num_frames=num_frames))


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 80, 96, 98, 112, 128, 144, 426])
def test_every_width_is_decoded_unpadded(tmp_path: Path, width: int) -> None:
    path = write_video(tmp_path / "clip.mp4", [0, 100, 200], size=(width, 34))
    clip = read_video(path, FrameSampling(num_frames=2))
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert clip.frames.shape == (2, 34, width, 3)
    assert np.abs(clip.frames.astype(int) - np.stack([expected[0], expected[2]])).mean() < 2


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_variable_rate_gives_true_times(tmp_path: Path, suffix: str, b_frames: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", VARIABLE_MS, options={"bf": b_frames})
    clip = read_video(path, EVERY_FRAME)
    assert clip.timestamps == pytest.approx(np.array(VARIABLE_MS) / 1000, abs=1e-3)
    assert np.abs(np.array(counters(clip.frames)) - np.arange(40)).max() <= 1
    by_time = read_video(path, FrameSampling(fps=1))
    assert by_time.timestamps == pytest.approx([0, 1, 2, 2.8, 4, 5.2, 6, 6.8, 8, 9.2], abs=0.41)
    assert by_time.frame_indices == sample_indices(np.array(VARIABLE_MS) / 1000, FrameSampling(fps=1))


def test_a_late_start_is_not_part_of_the_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", [2500 + 100 * index for index in range(10)])
    clip = read_video(path, EVERY_FRAME)
    assert clip.timestamps == pytest.approx(np.arange(10) / 10, abs=1e-3)
    assert clip.duration == pytest.approx(1.0, abs=1e-3)


def qwen_times(metadata: object, frames: int) -> list[float]:
    pairs = Qwen3VLProcessor._calculate_timestamps(None, metadata.frames_indices, metadata.fps, merge_size=1)
    assert len(pairs) == frames
    return pairs


def nemotron_times(metadata: object, frames: int) -> list[float]:
    processor = SimpleNamespace(image_start_token="", image_token="", image_end_token="", video_temporal_patch_dim=1)
    text = NemotronH_Omni_Reasoning_V3Processor.replace_video_token(
        processor, {"num_tokens": [1]}, 0, num_frames=frames, video_metadata=metadata
    )
    return [float(line.split(" at ")[1].split()[0]) for line in text.splitlines()]


def test_processors_compute_true_times_of_variable_rate(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4", VARIABLE_MS), FrameSampling(num_frames=9))
    metadata = video_metadata(clip)
    assert metadata.fps == 1000
    assert qwen_times(metadata, 9) == pytest.approx(clip.timestamps, abs=0.001)
    assert nemotron_times(metadata, 9) == pytest.approx(clip.timestamps, abs=0.006)  # it prints two decimals
    assert metadata.total_num_frames / metadata.fps == pytest.approx(clip.duration, abs=0.001)


def test_constant_rate_keeps_rate_and_indices(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4", range(0, 4000, 100)), FrameSampling(fps=2))
    metadata = video_metadata(clip)
    assert (metadata.fps, metadata.frames_indices) == (10.0, [0, 5, 10, 15, 20, 25, 30, 35])
    assert (metadata.total_num_frames, metadata.width, metadata.height) == (40, 128, 96)
    assert (metadata.duration, metadata.video_backend) == (pytest.approx(4.0, abs=0.001), "decord")
    assert qwen_times(metadata, 8) == pytest.approx(clip.timestamps, abs=0.001)
    assert nemotron_times(metadata, 8) == pytest.approx(clip.timestamps, abs=0.006)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (FrameSampling(fps=2), [0, 5, 10, 15]),
        (FrameSampling(fps=3), [0, 3, 7, 10, 13, 17]),
        (FrameSampling(fps=50), list(range(20))),
        (FrameSampling(fps=0.1), [0]),
        (FrameSampling(fps=0.1, min_frames=3), [0, 10, 19]),
        (FrameSampling(fps=0.1, min_frames=30), list(range(20))),
        (FrameSampling(fps=10, max_frames=2), [0, 19]),
        (FrameSampling(num_frames=1), [0]),
        (FrameSampling(num_frames=5), [0, 5, 10, 14, 19]),
        (FrameSampling(num_frames=20), list(range(20))),
        (FrameSampling(num_frames=21), list(range(20))),
    ],
)
def test_sample_indices_of_two_seconds_at_ten(sampling: FrameSampling, expected: list[int]) -> None:
    times = np.arange(20, dtype=np.float32).astype(np.float64) * np.float64(np.float32(0.1))
    assert sample_indices(times, sampling) == expected


def test_sample_indices_follow_time_not_index() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.3, 5.0, 6.0])
    assert sample_indices(times, FrameSampling(fps=1)) == [0, 3, 4, 5]


def test_rounded_times_do_not_lose_the_last_frame() -> None:
    times = np.array([0.0, 0.49999997, 0.99999994])
    assert sample_indices(times, FrameSampling(fps=1)) == [0, 2]


def test_sample_indices_never_repeat() -> None:
    for total in range(1, 60):
        for count in range(1, 61):
            indices = sample_indices(np.arange(total) / 10, FrameSampling(num_frames=count))
            assert len(indices) == min(total, count)
            assert all(a < b for a, b in pairwise(indices))
            assert indices[-1] == (total - 1 if count > 1 else 0)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (FrameSampling(fps=5, segment=(0.5, 1.0)), [5, 7, 9]),
        (FrameSampling(num_frames=3, segment=(0.5, 1.5)), [5, 10, 15]),
        (FrameSampling(fps=1, min_frames=2, segment=(0.45, 0.75)), [5, 7]),
        (FrameSampling(num_frames=4, segment=(0.61, 0.69)), [6]),  # between two frames: the one on screen
        (FrameSampling(num_frames=2, segment=(5.0, 9.0)), [19]),  # behind the end
        (FrameSampling(num_frames=2, segment=(0.0, 9.0)), [0, 19]),
    ],
)
def test_sample_indices_of_a_segment_of_two_seconds_at_ten(sampling: FrameSampling, expected: list[int]) -> None:
    assert sample_indices(np.arange(20) / 10, sampling) == expected
    assert sample_indices(np.arange(20) / 10 + 3.0, sampling) == expected


def test_a_segment_is_read_with_its_times(tmp_path: Path) -> None:
    write_noise(tmp_path / "clip.mp4", num_frames=16)
    whole = read_video(tmp_path / "clip.mp4", EVERY_FRAME)
    for backend in ("decord", "pyav"):
        sampling = FrameSampling(num_frames=10_000, segment=(0.5, 1.0))
        part = read_video(tmp_path / "clip.mp4", sampling, decoding=Decoding(backend=backend))
        assert part.frame_indices == [4, 5, 6, 7, 8]
        np.testing.assert_allclose(part.timestamps, whole.timestamps[4:9])
        np.testing.assert_array_equal(part.frames, whole.frames[4:9])


@pytest.mark.parametrize("segment", [(1.0, 1.0), (-1.0, 2.0), (3.0, 2.0)])
def test_a_senseless_segment_is_refused(segment: tuple[float, float]) -> None:
    with pytest.raises(RecipeError, match="a segment must"):
        FrameSampling(fps=1, segment=segment)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({}, "data.fps"),
        ({"fps": 1.0, "num_frames": 2}, "data.num_frames"),
        ({"fps": 0.0}, "data.fps"),
        ({"fps": float("nan")}, "data.fps"),
        ({"num_frames": 0}, "data.num_frames"),
        ({"fps": 1.0, "min_frames": 9, "max_frames": 8}, "data.min_frames"),
    ],
)
def test_senseless_sampling_is_refused(arguments: dict[str, float], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        FrameSampling(**arguments)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    for name, reason in [
        ("gone.mp4", "not found"),
        (".", "not a file"),
        ("empty.mp4", "file is empty"),
        ("text.mp4", "decoded"),
    ]:
        with pytest.raises(MediaError, match=f"{(tmp_path / name).name}.*{reason}"):
            read_video(tmp_path / name, EVERY_FRAME)


def test_sound_alone_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        read_video(path, EVERY_FRAME)


@pytest.mark.parametrize("damage", ["zeroed", "overwritten", "cut", "cut between packets"])
def test_damage_that_decord_hides_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_video(tmp_path / "clip.mp4", range(0, 6000, 100))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pos]
    middle = packets[24].pos  # a key frame; the samples below are far from it
    if damage == "zeroed":
        data[middle + 200 : middle + 500] = bytes(300)
    elif damage == "overwritten":
        data[middle + 200 : middle + 500] = np.random.default_rng(1).bytes(300)
    else:
        del data[middle + (100 if damage == "cut" else 0) :]
    assert read_video(path, FrameSampling(num_frames=2)).frame_indices == [0, 59]
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"clip\.mp4: (damaged|cut off|cannot be decoded)"):
        read_video(path, FrameSampling(num_frames=2))


@pytest.mark.parametrize(
    ("first_kept", "reason"), [(13, "27 frames are listed, 16 can be decoded"), (37, "holds no video frame")]
)
def test_frames_without_their_key_frame_are_refused(tmp_path: Path, first_kept: int, reason: str) -> None:
    """FFmpeg skips such frames without an error, where decord returns repeats for them."""
    whole, headless = write_video(tmp_path / "whole.mp4", range(0, 4000, 100)), tmp_path / "headless.mp4"
    with av.open(str(whole)) as source, av.open(str(headless), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if index >= first_kept and packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(MediaError, match=f"headless.mp4: {reason}"):
        read_video(headless, FrameSampling(num_frames=2))


def test_check_counts_frames_and_notices_a_changed_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", range(0, 1000, 100))
    assert check_video(str(path), DEFAULTS, Sink()) == 10
    assert check_video(str(write_video(path, range(0, 700, 100))), DEFAULTS, Sink()) == 7


def test_images_are_upright_rgb(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (30, 20), (200, 10, 10, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (20, 30), (200, 10, 10))


def test_bad_images_are_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    for name, reason in [("gone.png", "not found"), ("cut.png", "decoded"), ("text.png", "decoded")]:
        with pytest.raises(MediaError, match=f"{name}.*{reason}"):
            read_image(tmp_path / name)
