"""Bad files of every kind, made here: each is refused for the right reason, or read with the right content.

All go through the decoding child, as in a run, within seconds.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from evs_train.data.decoding import DECODER, Decoding
from evs_train.data.media_files import locate
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import Clip, read_image, read_video
from evs_train.errors import MediaError
from tests.data.test_video import VARIABLE_MS, counters, write_video

FOUR = FrameSampling(num_frames=4)
SECONDS = 20.0
"""Far more than any of these needs, far less than a hang would take."""


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SECONDS


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """4 s, 40 frames; frame i has brightness 4 i; its index (moov) comes first."""
    return write_video(tmp_path / "good.mp4", range(0, 4000, 100))


def encode(path: Path, codec: str = "libx264", num_frames: int = 20, **options: object) -> Path:
    """`num_frames` grey pictures, ten per second: frame i has brightness 4 i."""
    width, height = options.pop("size", (128, 96))  # type: ignore[misc]
    pixel_format, form = options.pop("pix_fmt", "yuv420p"), options.pop("form", None)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = {"threads": "1", **options}
        for index in range(num_frames):
            picture = np.full((height, width, 3), 4 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "libmp3lame", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=8000)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return path


def read(path: object, **options: object) -> Clip:
    verify = bool(options.pop("verify", True))
    return read_video(path, FOUR, verify=verify, decoding=Decoding(**options))  # type: ignore[arg-type]


# Each writes one bad file over or beside a good one, and returns it.


def missing(good: Path) -> Path:
    return good.with_name("gone.mp4")


def dangling_link(good: Path) -> Path:
    link = good.with_name("link.mp4")
    link.symlink_to("gone.mp4")
    return link


def folder(good: Path) -> Path:
    return good.parent


def fifo(good: Path) -> Path:
    path = good.with_name("fifo.mp4")
    os.mkfifo(path)
    return path


def device(good: Path) -> Path:
    return Path("/dev/zero")


def empty(good: Path) -> Path:
    good.write_bytes(b"")
    return good


def text(good: Path) -> Path:
    good.write_text("not a video\n" * 500)
    return good


def text_with_its_own_suffix(good: Path) -> Path:
    """FFmpeg plays .txt files as pictures of a terminal."""
    path = good.with_suffix(".txt")
    path.write_text("not a video\n" * 500)
    return path


def html(good: Path) -> Path:
    good.write_text("<!doctype html><html><body><h1>404 Not Found</h1></body></html>\n" * 20)
    return good


def zipped(good: Path) -> Path:
    packed = good.with_name("zip.mp4")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(good)
    return packed


def picture(good: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(good, format="png")
    return good


def photo(good: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(good, format="jpeg")
    return good


def noise(good: Path) -> Path:
    good.write_bytes(np.random.default_rng(0).bytes(20_000))
    return good


def zeros(good: Path) -> Path:
    good.write_bytes(bytes(20_000))
    return good


def head_only(good: Path) -> Path:
    good.write_bytes(good.read_bytes()[:20])
    return good


def index_cut(good: Path) -> Path:
    """Within the moov box, which comes first here."""
    good.write_bytes(good.read_bytes()[:300])
    return good


def index_missing(good: Path) -> Path:
    """As a recorder leaves a file that was switched off: the index would have come last."""
    data = good.read_bytes()
    start = data.index(b"moov") - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    good.write_bytes(data[:start] + data[end:])
    return good


def tail_cut(good: Path) -> Path:
    data = good.read_bytes()
    good.write_bytes(data[: len(data) * 2 // 3])
    return good


def matroska_cut(good: Path) -> Path:
    path = write_video(good.with_suffix(".mkv"), range(0, 4000, 100))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def avi_cut(good: Path) -> Path:
    path = encode(good.with_suffix(".avi"), "mpeg4", num_frames=60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def bits_flipped(good: Path) -> Path:
    data = bytearray(good.read_bytes())
    rng = np.random.default_rng(3)
    first = data.index(b"mdat") + 4
    for place in rng.integers(first + 2000, len(data), 60):
        data[place] ^= 1 << int(rng.integers(8))
    good.write_bytes(data)
    return good


def header_says_ten_hours(good: Path) -> Path:
    """Matroska with a wrong duration; nothing tells it from a file that was cut off."""
    path = write_video(good.with_suffix(".mkv"), range(0, 4000, 100))
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes
    data[place : place + 8] = np.array([18_000_000.0], ">f8").tobytes()
    path.write_bytes(data)
    return path


def sound_alone(good: Path) -> Path:
    return sound(good)


def sound_with_cover(good: Path) -> Path:
    """FFmpeg makes a video stream of the picture on the sleeve (ID3v2.3, APIC)."""
    path = sound(good.with_suffix(".mp3"))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="png")
    body = b"\0image/png\0\3\0" + buffer.getvalue()
    tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes((len(tag) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + tag + path.read_bytes())
    return path


def no_frames(good: Path) -> Path:
    """Some are listed, but not the key frame that they build on."""
    path = good.with_name("headless.mp4")
    with av.open(str(good)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.dts is not None][37:]:
            packet.stream = stream
            target.mux(packet)
    return path


def header_alone(good: Path) -> Path:
    path = good.with_suffix(".mkv")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return path


def bare_stream(good: Path) -> Path:
    """H.264 without a container tells no times."""
    return encode(good.with_suffix(".h264"), form="h264")


REFUSED: list[tuple[Callable[[Path], Path], set[str]]] = [
    (missing, {"missing"}),
    (dangling_link, {"missing"}),
    (folder, {"not a file"}),
    (fifo, {"not a file"}),
    (device, {"not a file"}),
    (empty, {"empty"}),
    (text, {"not a video"}),
    (text_with_its_own_suffix, {"not a video"}),
    (html, {"not a video"}),
    (zipped, {"not a video"}),
    (picture, {"not a video"}),
    (photo, {"not a video"}),
    (noise, {"not a video"}),
    (zeros, {"not a video"}),
    (head_only, {"truncated"}),
    (index_cut, {"truncated"}),
    (index_missing, {"truncated"}),
    (tail_cut, {"truncated"}),
    (matroska_cut, {"truncated", "damaged"}),  # cut inside a frame, it may be either
    (avi_cut, {"truncated"}),
    (header_says_ten_hours, {"truncated"}),
    (bits_flipped, {"damaged"}),
    (sound_alone, {"no video stream"}),
    (sound_with_cover, {"no video stream"}),
    (no_frames, {"no frames"}),
    (header_alone, {"truncated"}),
    (bare_stream, {"no timestamps"}),
]


@pytest.mark.parametrize(("make", "reasons"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_bad_files_are_refused_by_name_and_reason(
    good: Path, make: Callable[[Path], Path], reasons: set[str], backend: str
) -> None:
    path = make(good)
    with pytest.raises(MediaError) as caught:
        read(path, backend=backend)
    assert caught.value.reason in reasons, caught.value
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_permission(tmp_path: Path) -> None:
    """As another user, where the tests run as root, whom nothing is forbidden."""
    path = write_video(tmp_path / "secret.mp4", [0, 100])
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(MediaError) as caught:
            locate(str(path), "video")
    finally:
        if is_root:
            os.seteuid(0)
    assert caught.value.reason == "no permission"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_pixels": 128 * 96 - 1}, "too large"),
        ({"max_seconds": 3.5}, "too long"),
        ({"max_frames": 39}, "too long"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("verify", [True, False])
def test_limits(good: Path, limits: dict[str, float], reason: str, backend: str, verify: bool) -> None:
    with pytest.raises(MediaError) as caught:
        read(good, backend=backend, verify=verify, **limits)
    assert caught.value.reason == reason
    (name,) = limits
    assert f"data.{name}" in caught.value.hint or f"data.{name.replace('max_', 'max_video_')}" in caught.value.hint
    at_the_limit = {"max_pixels": 128 * 96, "max_seconds": 4.2, "max_frames": 40}[name]
    assert read(good, backend=backend, verify=verify, **{name: at_the_limit}).total_frames == 40


def test_length_is_limited_where_no_header_tells_it(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.ts", num_frames=40)
    for limit in ({"max_seconds": 3.5}, {"max_frames": 39}):
        with pytest.raises(MediaError) as caught:
            read(path, **limit)
        assert caught.value.reason == "too long"


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_memory_is_limited(tmp_path: Path, backend: str) -> None:
    """Decoding this takes 700 MB. The next file is read in spite of it."""
    path = encode(tmp_path / "large.mp4", num_frames=3, size=(8192, 4096), preset="ultrafast")
    for memory_mb in (64, 600):
        with pytest.raises(MediaError) as caught:
            read(path, backend=backend, memory_mb=memory_mb)
        assert caught.value.reason == "out of memory"
    assert read(write_video(tmp_path / "small.mp4", [0, 100, 200]), memory_mb=64).total_frames == 3
    assert read(path, backend=backend, memory_mb=None).frames.shape == (3, 4096, 8192, 3)


def test_memory_of_the_sampled_frames_is_limited(tmp_path: Path) -> None:
    """100 frames of 0.9 MB: a frame fits, the clip does not."""
    path = encode(tmp_path / "clip.mp4", num_frames=100, size=(640, 480), preset="ultrafast")
    with pytest.raises(MediaError, match=r"data\.decode_memory_mb = 64") as caught:
        read_video(path, FrameSampling(num_frames=100), decoding=Decoding(memory_mb=64))
    assert caught.value.reason == "out of memory"
    assert read(path, memory_mb=64).total_frames == 100


def test_what_a_decoder_keeps_does_not_change_the_next_verdict(tmp_path: Path) -> None:
    """The decoder keeps the memory of 92 MB of frames: neither is it room for the next file, nor is it missing."""
    path = encode(tmp_path / "clip.mp4", num_frames=100, size=(640, 480), preset="ultrafast")
    everything = FrameSampling(num_frames=100)
    assert len(read_video(path, everything).frames) == 100
    with pytest.raises(MediaError, match=r"data\.decode_memory_mb = 64"):
        read_video(path, everything, decoding=Decoding(memory_mb=64))
    assert len(read_video(path, everything).frames) == 100
    assert read(path, memory_mb=64).total_frames == 100


@pytest.mark.parametrize("times", [1, 2, 3])
def test_memory_that_an_unlimited_file_left_is_no_room(tmp_path: Path, times: int) -> None:
    """Decoders give some of it back during the next file, whose frames then found room beyond their limit."""
    large = encode(tmp_path / "large.mp4", num_frames=3, size=(8192, 4096), preset="ultrafast")
    path = encode(tmp_path / "clip.mp4", num_frames=100, size=(640, 480), preset="ultrafast")
    DECODER.close()
    for _ in range(times):
        read(large, memory_mb=None)
    with pytest.raises(MediaError, match=r"data\.decode_memory_mb = 64"):
        read_video(path, FrameSampling(num_frames=100), decoding=Decoding(memory_mb=64))


def test_a_decoder_that_grew_is_replaced(tmp_path: Path) -> None:
    """A large file leaves heaps behind that are never given back: more than a limit of 64 MiB allows in all."""
    large = encode(tmp_path / "large.mp4", num_frames=30, size=(1920, 1080), preset="ultrafast")
    small = write_video(tmp_path / "small.mp4", [0, 100, 200])
    DECODER.close()
    read(large, memory_mb=None)
    grown = DECODER.pid
    read(small, memory_mb=4096)
    assert DECODER.pid == grown
    read(small, memory_mb=64)
    assert DECODER.pid is None


# Strange files that are good.


def check(clip: Clip, indices: list[int], fps: float = 10.0) -> None:
    assert clip.frame_indices == indices
    assert clip.timestamps == pytest.approx(np.array(indices) / fps, abs=2e-3)
    assert np.abs(np.array(counters(clip.frames)) - indices).max() <= 1


@pytest.mark.parametrize(
    "name", ["Überraschung 猫.mp4", "two  spaces.mp4", 'it\'s "quoted".mp4', "100%d*[a-z]{x}.mp4", "a:b.mp4", "-i.mp4"]
)
@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_any_name_is_read(good: Path, name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(read(good.rename(good.with_name(name)), backend=backend), [0, 13, 26, 39])
    monkeypatch.chdir(good.parent)
    assert read(name, backend=backend).path == name


@pytest.mark.parametrize("suffix", [".txt", ".jpg", ".avi", ".mkv", ""])
def test_the_content_counts_not_the_suffix(good: Path, suffix: str) -> None:
    check(read(good.rename(good.with_suffix(suffix))), [0, 13, 26, 39])


def test_a_link_is_read(good: Path) -> None:
    link = good.with_name("link.mp4")
    link.symlink_to(good)
    check(read(link), [0, 13, 26, 39])


def test_a_header_that_tells_too_short_a_time_does_no_harm(good: Path) -> None:
    path = header_says_ten_hours(good)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3
    data[place : place + 8] = np.array([1000.0], ">f8").tobytes()
    path.write_bytes(data)
    check(read(path), [0, 13, 26, 39])


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_one_frame(tmp_path: Path, backend: str) -> None:
    clip = read(write_video(tmp_path / "one.mp4", [0]), backend=backend)
    assert (clip.total_frames, clip.backend, clip.frames.shape) == (1, backend, (1, 96, 128, 3))


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("verify", [True, False])
def test_variable_rate(tmp_path: Path, backend: str, verify: bool) -> None:
    path = write_video(tmp_path / "clip.mp4", VARIABLE_MS, options={"bf": "2"})
    clip = read(path, backend=backend, verify=verify)
    assert clip.frame_indices == [0, 13, 26, 39]
    assert clip.timestamps == pytest.approx(np.array(VARIABLE_MS)[clip.frame_indices] / 1000, abs=1e-3)
    assert np.abs(np.array(counters(clip.frames)) - clip.frame_indices).max() <= 1


def means(clip: Clip) -> list[float]:
    return [float(frame.mean()) / 4 for frame in clip.frames]


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd.mkv", {"codec": "ffv1", "size": (127, 95), "pix_fmt": "yuv444p"}),
        ("ten_bit.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265-params": "log-level=none"}),
        ("fragments.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("pictures.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
        ("hidden_frames.webm", {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rare_formats(tmp_path: Path, name: str, options: dict[str, object], backend: str) -> None:
    clip = read(encode(tmp_path / name, **options), backend=backend)  # type: ignore[arg-type]
    assert clip.timestamps == pytest.approx([0, 0.6, 1.3, 1.9], abs=2e-3)
    assert means(clip) == pytest.approx([0, 6, 13, 19], abs=0.8)
    width, height = options.get("size", (128, 96))  # type: ignore[misc]
    assert (clip.backend, clip.frames.shape) == (backend, (4, height, width, 3))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("h264.mp4", "libx264", {"x264-params": "open-gop=1:keyint=6:bframes=3"}),
        ("h265.mkv", "libx265", {"x265-params": "log-level=none:keyint=12:bframes=4"}),
    ],
)
def test_open_groups_of_pictures(
    tmp_path: Path, name: str, codec: str, options: dict[str, object], verify: bool
) -> None:
    """decord alone is off by up to eleven frames here, where a seek comes before the frame."""
    path = encode(tmp_path / name, codec, num_frames=40, **options)
    for count in (2, 3, 4, 5, 7, 8, 11, 14, 40):
        clip = read_video(path, FrameSampling(num_frames=count), verify=verify)
        assert clip.backend == "pyav"
        assert means(clip) == pytest.approx(clip.frame_indices, abs=0.8)
    with pytest.raises(MediaError, match="groups of pictures are open"):
        read(path, verify=verify, backend="decord")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b_frames.avi", {"codec": "libx264", "bf": "2"}),  # decord: the same frame at the same time, again and again
        ("b_frames_divx.avi", {"codec": "mpeg4", "bf": "2"}),  # decord: times of 1e17 s
        ("b_frames.mpg", {"codec": "mpeg2video", "bf": "2"}),  # the same
        ("b_frames.ts", {"codec": "libx264", "bf": "2"}),  # decord cannot reach the last frame
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_decord_cannot_read_is_read_by_pyav(
    tmp_path: Path, name: str, options: dict[str, object], verify: bool
) -> None:
    rate = 25 if name.endswith("mpg") else 10
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(options["codec"], rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.options = {"threads": "1", "bf": "2"}
        for index in range(20):
            shown = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 4 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    clip = read(path, verify=verify)
    assert clip.backend == "pyav"
    assert clip.timestamps == pytest.approx(np.array([0, 6, 13, 19]) / rate, abs=2e-3)
    assert means(clip) == pytest.approx([0, 6, 13, 19], abs=0.9)
    with pytest.raises(MediaError, match=r"by decord"):
        read(path, verify=verify, backend="decord")


def test_a_title_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Cafe"
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(4):
            shown = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"Cafe" in data
    path.write_bytes(data.replace(b"Cafe", b"Caf\xe9"))
    assert read(path).total_frames == 4


# Images.


def test_bad_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("png", "jpg"):
        Image.fromarray(pixels).save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[:2000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    bomb = bytearray((tmp_path / "whole.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, without their checksum
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    os.mkfifo(tmp_path / "fifo.png")
    for name, reason in [
        ("gone.png", "missing"),
        ("fifo.png", "not a file"),
        ("empty.png", "empty"),
        ("text.png", "not an image"),
        ("cut.png", "truncated"),
        ("cut.jpg", "truncated"),
        ("bomb.png", "too large"),
    ]:
        with pytest.raises(MediaError) as caught:
            read_image(tmp_path / name)
        assert (name, caught.value.reason) == (name, reason)
    with pytest.raises(MediaError) as caught:
        read_image(tmp_path / "bomb.png", decoding=Decoding(max_pixels=None, memory_mb=256))
    assert caught.value.reason == "out of memory"
    assert np.array_equal(np.asarray(read_image(tmp_path / "whole.png")), pixels)
