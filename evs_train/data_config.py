"""The schema of a recipe's `data` section: which rows and media are read, and how videos are sampled.

Evaluations and pictures of single videos read data by the same keys, without a recipe. Invariant: as in `config.py`,
which has the rest of the schema. Nothing of torch or transformers is imported here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

RowFormatName = Literal["auto", "qwen", "llava_video", "swift", "openai", "videochat2", "caption"]
"""Formats of rows (`data/formats.py`); auto recognises each row by its keys."""

# Arguments of processors and templates that must stay ours: frames sampled twice would get wrong timestamps, silently.
OWN_KWARGS = (
    "do_sample_frames", "video_metadata", "fps", "num_frames", "return_tensors", "tokenize", "add_generation_prompt",
)  # fmt: skip


def as_list(value: Any) -> Any:
    """One text as a list of it; anything else as it is."""
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    """Base of all sections: no unknown keys, no coercion, never changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FeatureCacheSection(Section):
    """Keep what a frozen vision tower says of each medium, so that later epochs need neither it nor the pixels."""

    path: str = Field(description="folder, which several runs may share")
    max_gib: float = Field(100.0, gt=0, description="GiB of all files in it; what does not fit is computed each time")


class DataSection(Section):
    """Which rows and media are read, and how videos are sampled."""

    rows: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)] = Field(
        description="files of rows (.json, .jsonl, .parquet, .arrow, .tar), patterns of them, or .yaml listings"
    )
    media_root: str | None = Field(None, description="folder of relative media paths; default: the rows file's own")
    allow_outside: bool = Field(False, description="take media outside media_root, by links, `..` or absolute paths")
    format: RowFormatName = Field("auto", description="format of the rows (data.md); auto recognises each by its keys")
    frames_fps: float | None = Field(
        None, gt=0, description="frames per second of videos that are folders or lists of frames; needed for them"
    )
    fps: float | None = Field(None, gt=0, description="frames sampled per second (default 2 if num_frames is unset)")
    num_frames: int | None = Field(None, ge=1, description="frames sampled per video, spread evenly")
    min_frames: int = Field(4, ge=1, description="at least so many frames, where the video has them")
    max_frames: int = Field(768, ge=1, description="at most so many frames")
    video_kwargs: dict[str, Any] = Field(default_factory=dict, description="options of the video processor")
    image_kwargs: dict[str, Any] = Field(default_factory=dict, description="options of the image processor")
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="variables of the chat template")
    supervise: Literal["all", "last"] = Field(
        "all", description="train on every answer, or on the last: for templates that rewrite earlier answers"
    )
    max_length: int | None = Field(
        None, ge=1, description="refuse samples longer than this many tokens before pruning; nothing is truncated"
    )
    max_tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="tokens of a micro-batch after pruning, padding included: as many rows as fit, instead of "
        "train.batch_size rows; null: train.batch_size",
    )
    max_media_tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="with max_tokens_per_batch: media tokens of a micro-batch before pruning, which the vision encoder "
        "computes at once; a row alone may have more; null: no limit",
    )
    over_budget: Literal["lose_frames", "refuse"] = Field(
        "lose_frames",
        description="a row that alone has more than max_tokens_per_batch is shown with fewer frames, or refused",
    )
    cache_features: FeatureCacheSection | None = None
    verify: bool = Field(
        True, description="decode each video once from end to end before its first use: finds damage that decord hides"
    )
    num_workers: int = Field(2, ge=0, description="processes that decode and tokenize, per rank")
    on_error: Literal["quarantine", "raise"] = Field(
        "quarantine",
        description="a sample that cannot be read is listed in output_dir/quarantine.jsonl and another one shown in "
        "its place (quarantine), or ends the run (raise)",
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="the run ends when more of the draws were bad than this (from 100 draws on)"
    )
    max_bad_in_a_row: int = Field(
        100, ge=1, description="the run ends when so many samples in a row, tried for one draw, are bad"
    )
    index: str | None = Field(
        None,
        description="file of what `evs-train check` found in the media, which spares decoding them end to end again; "
        "default: .evs_index/media.arrow beside the first rows file",
    )
    backend: Literal["auto", "decord", "pyav"] = Field(
        "auto", description="video decoder; auto: decord, and PyAV for what decord cannot read"
    )
    decode_timeout: float | None = Field(
        60.0, gt=0, description="seconds without progress after which a decoder is killed; null: never"
    )
    decode_memory_mb: int | None = Field(
        8192, ge=64, description="MiB in which a decoder must make do, sampled frames included; null: no limit"
    )
    max_pixels: int | None = Field(100_000_000, ge=1, description="refuse larger frames and images; null: no limit")
    max_video_seconds: float | None = Field(21600.0, gt=0, description="refuse longer videos; null: no limit")
    max_video_frames: int | None = Field(2_000_000, ge=1, description="refuse videos of more frames; null: no limit")

    @field_validator("video_kwargs", "image_kwargs", "template_kwargs")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = [key for key in value if key in OWN_KWARGS]
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set: evs_train passes it (frames are chosen by data.fps)")
        json.dumps(value, allow_nan=False)  # raises ValueError; records are JSON
        return value

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> DataSection:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("set fps or num_frames, not both (null unsets one)")
        if self.max_media_tokens_per_batch is not None and self.max_tokens_per_batch is None:
            raise ValueError("max_media_tokens_per_batch needs max_tokens_per_batch")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) is above max_frames ({self.max_frames})")
        return self
