"""What the command line of `evs-train inspect` says, checked before anything heavy is imported or loaded.

Invariant: an `InspectOptions` names a video that is there, rates in range, a form of picture that can be written, and a
folder that takes it. Whether the checkpoint and the data keys fit each other is found when the checkpoint is opened.
Cost: one temporary file in the folder of the picture.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evs_train.errors import MediaError, RecipeError
from evs_train.recipe import parse_value

DATA_KEYS = (
    "fps", "num_frames", "min_frames", "max_frames", "frames_fps", "video_kwargs", "backend", "decode_timeout",
    "decode_memory_mb", "max_pixels", "max_video_seconds", "max_video_frames",
)  # fmt: skip
"""Keys of a recipe's `data` section that say how one video is read; docs/recipe.md explains them."""
MODEL_KEYS = ("revision", "trust_remote_code", "attn_implementation")
"""Keys of a recipe's `model` section beside `path` and `dtype`."""
REQUIRED = ("model",)
OPTIONAL = ("rate", "method", "out", "dtype", *DATA_KEYS, *MODEL_KEYS)
Dtype = Literal["bfloat16", "float32"]
DTYPES: dict[str, Dtype] = {"bfloat16": "bfloat16", "float32": "float32"}
SUFFIXES = (".png", ".html", ".mp4")


@dataclass(frozen=True)
class InspectOptions:
    """One call of the command.

    Attributes:
        video: path of a file or of a folder of frames.
        checkpoint: directory or hub name.
        rates: pruning rates in the order in which they are shown, or None for the checkpoint's own.
        out: the picture, page or film to write.
        dtype: of weights and scores; None: the checkpoint's own.
        method: which pruner; None: the one the checkpoint was trained with.
        data, model: keys of a recipe's `data` and `model` sections.
    """

    video: str
    checkpoint: str
    rates: tuple[float, ...] | None
    out: Path
    dtype: Dtype | None
    method: str | dict[str, Any] | None
    data: dict[str, Any]
    model: dict[str, Any]


def read_options(videos: Sequence[str], arguments: Mapping[str, str]) -> InspectOptions:
    """The options of one call: what is no `key=value`, and the pairs, whose keys are known to be right.

    Raises:
        RecipeError: there is not one video, or a rate, dtype, suffix or folder cannot be used.
        MediaError: the video is not there.
    """
    if len(videos) != 1:
        named = f"{len(videos)} videos are named: {', '.join(videos)}" if videos else "no video is named"
        raise RecipeError(named, "evs-train inspect VIDEO model=CHECKPOINT [rate=Q or rate=[Q,Q]] [out=FILE]")
    video = videos[0]
    data = {key: parse_value(key, arguments[key]) for key in DATA_KEYS if key in arguments}
    if not os.path.exists(video):
        raise MediaError(f"video not found: {video}", "check the path", "missing")
    if os.path.isdir(video) and data.get("frames_fps") is None:
        raise RecipeError(
            f"{video} is a folder, and does not tell how many of its frames make a second", "add frames_fps=..."
        )
    if "dtype" in arguments and arguments["dtype"] not in DTYPES:
        raise RecipeError(f"dtype must be {' or '.join(DTYPES)}, got '{arguments['dtype']}'")
    return InspectOptions(
        video,
        arguments["model"],
        _rates(arguments["rate"]) if "rate" in arguments else None,
        _writable(Path(arguments["out"] if "out" in arguments else f"{Path(video).resolve().stem}_kept.png")),
        DTYPES[arguments["dtype"]] if "dtype" in arguments else None,
        parse_value("method", arguments["method"]) if "method" in arguments else None,
        data,
        {key: parse_value(key, arguments[key]) for key in MODEL_KEYS if key in arguments},
    )


def _rates(text: str) -> tuple[float, ...]:
    value = parse_value("rate", text)
    rates = value if isinstance(value, list) else [value]
    fit = [isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < 1 for rate in rates]
    if not rates or not all(fit):
        raise RecipeError(f"rate must be a number in [0, 1), or a list of such, got '{text}'", "rate=[.5,.75,.9]")
    return tuple(float(rate) for rate in rates)


def _writable(out: Path) -> Path:
    if out.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"out={out}: its suffix must be one of {', '.join(SUFFIXES)}, and says what is written")
    if out.is_dir():
        raise RecipeError(f"out={out} is a folder", "name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise RecipeError(
            f"out={out}: its folder cannot be written to: {error.strerror}", "name another place"
        ) from error
    return out
