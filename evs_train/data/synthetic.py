"""A made-up data set of moving shapes: real H.264 files and rows, to train and test on without downloading anything.

In each clip one coloured shape crosses the picture and a second one appears or disappears, early or late, over a
textured background. It stands still in clips with an even number, so that most of the picture is redundant from frame
to frame, which is what pruning looks for; the others have slight sensor noise. The answers are short captions of
several facts: tiny models learn those quickly, and hardly learn single-word targets.
Invariant: rows and files are a function of the arguments and of `_renderer()`: a folder that another version of this
file or of a library has written is written anew. A folder that exists under its final name is complete.

Cost: about 10 ms and 10 kB a clip at the default size.

Not here: realism, sound, and any claim that a model which learns this has learned to see.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageDraw

from evs_train.errors import DataError, EvsTrainError, report

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "white": (245, 245, 245),
    "purple": (150, 50, 190),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CLIP_QUESTIONS = ("Describe the clip.", "What happens in the video?", "What moves, and what changes?")
IMAGE_QUESTIONS = ("Describe the picture.", "What does the image show?")
MIXTURES = (
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "blue", "purple"),
    ("red", "white", "pink"),
)
NOISE_SIGMA = 6.0
"""Standard deviation of the sensor noise, in steps of 256."""

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class World:
    """The arguments that determine a data set; `write_dataset` explains them."""

    num_clips: int
    seed: int
    size: int
    num_frames: int
    fps: float


@dataclass(frozen=True)
class Scene:
    """What happens in one clip.

    Args:
        mover: colour and shape that crosses the picture.
        direction: key of `DIRECTIONS`.
        other: colour and shape that appears or disappears.
        appears: whether it appears; else it disappears.
        late: whether that happens after three quarters of the frames; else after one quarter.
        noisy: whether the background has sensor noise.
        num_frames: 1 for a clip without any change.
    """

    mover: tuple[str, str]
    direction: str
    other: tuple[str, str]
    appears: bool
    late: bool
    noisy: bool
    num_frames: int

    def other_visible(self, frame: int) -> bool:
        """Whether the second shape is to be seen in this frame."""
        change = self.num_frames * (3 if self.late else 1) // 4
        return (frame >= change) == self.appears

    def caption(self) -> str:
        """The answer to a question about the clip."""
        if self.num_frames == 1:
            return self.still_caption()
        change = f"{'appears' if self.appears else 'disappears'} {'late' if self.late else 'early'}"
        return f"{_noun(self.mover).capitalize()} moves {self.direction}; {_noun(self.other)} {change}."

    def still_caption(self) -> str:
        """The answer to a question about the last frame alone."""
        visible = f"with {_noun(self.other)}" if self.other_visible(self.num_frames - 1) else "alone"
        return f"{_noun(self.mover).capitalize()} is shown {visible}."


def write_dataset(
    out_dir: str | Path, *, num_clips: int = 64, seed: int = 0, size: int = 96, num_frames: int = 16, fps: float = 8.0
) -> Path:
    """Write `clips/000000.mp4` ..., `images/*.png`, `train.jsonl` and `world.json` (the arguments) into `out_dir`.

    Of eight rows in `train.jsonl`, six are about a clip (each clip has one row), one is text only and one is about a
    PNG of a clip's last frame. Every 16th clip has a single frame. All is written to a folder next to `out_dir` and
    renamed at the end; a folder with the same `world.json` is left alone, so several processes may call this at once.
    In a folder of the same arguments by another renderer each file is replaced, and other files stay.

    Args:
        out_dir: folder to make.
        num_clips: number of clips.
        seed: other seeds give other scenes.
        size: width and height in pixels, even.
        num_frames: frames of a clip, at least 4.
        fps: frames per second.

    Returns:
        Path of `train.jsonl`.

    Raises:
        DataError: an argument is out of range, or `out_dir` holds something else.
    """
    if num_clips < 1 or size < 32 or size % 2 or num_frames < 4 or not 0 < fps <= 240:
        raise DataError(
            f"no such world: {num_clips} clips of {num_frames} frames of {size} pixels at {fps} per second",
            "at least 1 clip and 4 frames, an even size from 32, and up to 240 frames per second",
        )
    out_dir = Path(out_dir)
    world = World(num_clips, seed, size, num_frames, float(fps))
    if _found_in(out_dir) != _stamp(world):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as staging:
            staged = Path(staging) / "data"
            _write_world(staged, world)
            _publish(staged, out_dir, world)
    return out_dir / "train.jsonl"


def _publish(staged: Path, out_dir: Path, world: World) -> None:
    """Give the staged folder its name, or its files theirs where they are those of another renderer."""
    if asdict(world).items() <= _found_in(out_dir).items():
        for path in sorted(staged.rglob("*.*")):  # `world.json` comes last
            target = out_dir / path.relative_to(staged)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        return
    try:
        staged.rename(out_dir)
    except OSError as error:
        if _found_in(out_dir) != _stamp(world):  # another process may have been faster
            raise DataError(f"{out_dir}: holds something else", "name another folder, or remove it") from error


def _found_in(out_dir: Path) -> dict[str, Any]:
    """What the `world.json` of a folder says; nothing, where there is none."""
    try:
        found = json.loads((out_dir / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(world: World) -> dict[str, Any]:
    return {**asdict(world), "renderer": _renderer()}


def _renderer() -> str:
    """What the files depend on beside the arguments: this file, and the libraries that draw and encode."""
    libraries = f"numpy {np.__version__}, Pillow {PIL.__version__}, PyAV {av.__version__}"
    return hashlib.sha256(Path(__file__).read_bytes() + libraries.encode()).hexdigest()[:16]


def _write_world(folder: Path, world: World) -> None:
    (folder / "clips").mkdir(parents=True)
    (folder / "images").mkdir()
    rows: list[dict[str, Any]] = []
    for clip in range(world.num_clips):
        rng = np.random.default_rng([world.seed, clip])
        scene = _scene(rng, clip, world)
        pictures = _draw(rng, scene, world.size)
        video = f"clips/{clip:06d}.mp4"
        _encode(folder / video, pictures, world.fps)
        rows.append(_row(f"clip-{clip:06d}", _pick(rng, CLIP_QUESTIONS), scene.caption(), video=video))
        if clip % 6 == 2:
            rows.append(_row(f"text-{clip:06d}", *_text_question(rng)))
        if clip % 6 == 5:
            image = f"images/{clip:06d}.png"
            Image.fromarray(pictures[-1]).save(folder / image)
            rows.append(_row(f"image-{clip:06d}", _pick(rng, IMAGE_QUESTIONS), scene.still_caption(), image=image))
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "world.json").write_text(json.dumps(_stamp(world), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scene(rng: np.random.Generator, clip: int, world: World) -> Scene:
    first, second = (str(color) for color in rng.choice(list(COLORS), size=2, replace=False))
    return Scene(
        mover=(first, _pick(rng, SHAPES)),
        direction=_pick(rng, tuple(DIRECTIONS)),
        other=(second, _pick(rng, SHAPES)),
        appears=bool(rng.integers(2)),
        late=bool(rng.integers(2)),
        noisy=clip % 2 == 1,
        num_frames=1 if clip % 16 == 15 else world.num_frames,
    )


def _draw(rng: np.random.Generator, scene: Scene, size: int) -> Picture:
    """(F, size, size, 3) uint8."""
    # Muted colours in soft patches: a texture, without the saturated colours of the shapes.
    patches = Image.fromarray(rng.integers(70, 140, (6, 6, 3), dtype=np.uint8))
    background = patches.resize((size, size), Image.Resampling.BICUBIC)
    step = np.array(DIRECTIONS[scene.direction])
    lane = np.where(step == 0, 0.28, 0.5)  # the mover keeps to one side, the other shape stands on the other
    standing = np.where(step == 0, 0.74, rng.uniform(0.3, 0.7))
    pictures = []
    for frame in range(scene.num_frames):
        progress = frame / max(scene.num_frames - 1, 1) - 0.5
        canvas = background.copy()
        if scene.other_visible(frame):
            _paint(canvas, scene.other, standing * size)
        _paint(canvas, scene.mover, (lane + 0.6 * progress * step) * size)
        picture = np.asarray(canvas).astype(np.float64)
        if scene.noisy:
            picture += rng.normal(0.0, NOISE_SIGMA, picture.shape)
        pictures.append(picture.round().clip(0, 255).astype(np.uint8))
    return np.stack(pictures)


def _paint(canvas: Image.Image, thing: tuple[str, str], center: npt.NDArray[np.float64]) -> None:
    color, shape = thing
    x, y, r = float(center[0]), float(center[1]), 0.14 * canvas.width
    brush = ImageDraw.Draw(canvas)
    if shape == "circle":
        brush.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[color])
    elif shape == "square":
        brush.rectangle((x - r, y - r, x + r, y + r), fill=COLORS[color])
    else:
        brush.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLORS[color])


def _encode(path: Path, pictures: Picture, fps: float) -> None:
    """H.264 without B-frames, a key frame at least every 8 frames.

    One thread and no look-ahead (`zerolatency`): with x264's look-ahead the same pictures give files of varying size.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width = stream.height = pictures.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "g": "8", "bf": "0", "threads": "1", "tune": "zerolatency"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _row(row_id: str, question: str, answer: str, **media: str) -> dict[str, Any]:
    placeholder = "".join(f"<{kind}>\n" for kind in media)
    turns = [{"from": "human", "value": placeholder + question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **media, "conversations": turns}


def _text_question(rng: np.random.Generator) -> tuple[str, str]:
    if rng.integers(2):
        a, b = (int(number) for number in rng.integers(1, 10, size=2))
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    first, second, mixed = MIXTURES[int(rng.integers(len(MIXTURES)))]
    return f"What do {first} and {second} make?", f"{first.capitalize()} and {second} make {mixed}."


def _noun(thing: tuple[str, str]) -> str:
    return f"a {thing[0]} {thing[1]}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m evs_train.data.synthetic --out DIR --clips 64 --seed 0`."""
    parser = argparse.ArgumentParser(description="Write a data set of moving shapes (clips, images and train.jsonl).")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--clips", type=int, default=64, help="number of clips (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default 0)")
    args = parser.parse_args(argv)
    try:
        print(write_dataset(args.out, num_clips=args.clips, seed=args.seed))
    except EvsTrainError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
