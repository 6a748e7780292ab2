"""The keys of `evs-train eval`, with their types, ranges and defaults; docs/eval.md explains them.

Invariant: options that are built can be meant: no unknown key, no value out of range; all faults are told at once.
Costs nothing: neither torch nor transformers is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from evs_train.config import Layout, Positions, Rate
from evs_train.data_config import DataSection, RowFormatName, Section
from evs_train.errors import RecipeError
from evs_train.pruners import Method, method_name
from evs_train.recipe import parse_value

RATES = (0.0, 0.25, 0.5, 0.7, 0.75, 0.8, 0.9)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_floats(value: Any) -> Any:
    return [float(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in _as_list(value)]


Number = Annotated[float, BeforeValidator(lambda value: float(value) if type(value) is int else value)]


class EvalOptions(Section):
    """One evaluation."""

    model: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="checkpoint folders or hub names, or the http(s)://host:port/v1 of a running server"
    )
    data: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="files of rows; or the folder of a published benchmark, with layout"
    )
    layout: Layout = Field("rows", description="whose layout the folder has; rows: files of rows")
    rates: Annotated[list[Rate], BeforeValidator(_as_floats), Field(min_length=1)] = Field(
        default=list(RATES), description="pruning rates; 0 is always evaluated as well, except on a server"
    )
    methods: Annotated[list[str | dict[str, Any]], Field(min_length=1)] | None = Field(
        None, description="pruners to compare, as evs.method names them; default: the one that each export trained with"
    )
    out: str | None = Field(None, description="folder of the results; default: eval in the run's folder, or eval/NAME")
    tolerance: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.01, description="share of the dense accuracy that the recommended rate may lose"
    )
    match: Literal["exact", "contains"] = Field("exact", description="when a free answer counts as right")
    max_new_tokens: int = Field(32, ge=1, description="longest free answer")
    choices: Literal["letters", "texts"] = Field(
        "letters", description="of rows with options: list them and choose a letter, or choose between their texts"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many questions")
    seed: int = Field(0, ge=0, description="of the resampling that intervals come from")
    timed: int = Field(8, ge=0, description="questions on which each process measures prefill and memory")
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="a question that cannot be asked ends the evaluation, or is left out and listed"
    )

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of weights, computation and scores")
    device: str | None = Field(None, description="default: the GPU if there is one")
    attn_implementation: Literal["sdpa", "eager"] = Field("sdpa", description="attention kernel of transformers")
    positions: Positions | None = Field(None, description="of retained tokens; default: as the export was trained")
    revision: str | None = Field(None, description="hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")

    fps: Annotated[Number, Field(gt=0)] | None = Field(None, description="frames sampled per second")
    num_frames: int | None = Field(None, ge=1, description="frames sampled per video")
    min_frames: int | None = Field(None, ge=1, description="at least so many frames")
    max_frames: int | None = Field(None, ge=1, description="at most so many frames")
    video_kwargs: dict[str, Any] | None = Field(None, description="options of the video processor")
    image_kwargs: dict[str, Any] | None = Field(None, description="options of the image processor")
    template_kwargs: dict[str, Any] | None = Field(None, description="variables of the chat template")
    media_root: str | None = Field(None, description="folder of relative media paths of rows")
    format: RowFormatName = Field("auto", description="format of the rows")
    frames_fps: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="frames per second of videos that are folders or lists of frames"
    )
    verify: bool = Field(True, description="decode each video from end to end before its first use")

    processor: str | None = Field(
        None, description="of a server: checkpoint whose processor says how many tokens a prompt must have"
    )
    served: str | None = Field(None, description="of a server: name of the model; default: the first it lists")
    parallel: int = Field(4, ge=1, description="of a server: requests at a time")
    timeout: Annotated[Number, Field(gt=0)] = Field(600.0, description="of a server: seconds for one answer")
    request: dict[str, Any] = Field(default_factory=dict, description="of a server: further fields of each request")

    @field_validator("rates")
    @classmethod
    def _in_order(cls, rates: list[float]) -> list[float]:
        return sorted(set(rates))

    @model_validator(mode="after")
    def _fit_together(self) -> EvalOptions:
        if any(map(is_server, self.model)):
            if len(self.model) > 1:
                raise ValueError("model: a server is evaluated alone")
            if len(self.rates) > 1:
                raise ValueError(
                    "rates: a server prunes at the one rate that it was started with: say it, as in rates=[0.75]; "
                    "evaluations of one rate after the other join in the same out"
                )
            if self.methods:
                raise ValueError("methods: a server prunes in its own way")
        for method in self.methods or ():
            try:
                method_name(method, "methods")
            except RecipeError as error:
                raise ValueError(str(error)) from error
        if self.layout != "rows" and len(self.data) > 1:
            raise ValueError(f"data: {self.layout} is one folder")
        return self

    @property
    def server(self) -> str | None:
        """Address of the server that is evaluated, if it is one."""
        return self.model[0] if is_server(self.model[0]) else None

    @property
    def all_rates(self) -> list[float]:
        """The rates with 0, to which they are compared; of a server the one it serves."""
        return self.rates if self.server else sorted({0.0, *self.rates})

    @property
    def sides(self) -> list[tuple[str, Method | None]]:
        """What is compared: each model with each method. The first one is what the others are compared with."""
        return [(model, method) for model in self.model for method in self.methods or (None,)]

    @property
    def sampled(self) -> dict[str, Any]:
        """What was said of how videos are sampled and prompts written, as keys of a recipe's `data`."""
        keys = ("fps", "num_frames", "min_frames", "max_frames", "video_kwargs", "image_kwargs", "template_kwargs")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    def rows_section(self) -> DataSection:
        """How the rows are read."""
        return DataSection(rows=self.data, media_root=self.media_root, format=self.format, frames_fps=self.frames_fps)

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return Path(self.out)
        if self.server:
            raise RecipeError("out=... is missing", "name the folder in which the points of a server's curve are kept")
        from evs_train.checkpoint import RECORD_FILE  # noqa: PLC0415 (it brings torch; bad options are told before)

        checkpoint = Path(self.model[0])
        in_run = (checkpoint.parent / RECORD_FILE).is_file()
        return checkpoint.parent / "eval" if in_run else Path("eval") / checkpoint.name


def is_server(model: str) -> bool:
    """Whether a model is named by the address of a server."""
    return model.startswith(("http://", "https://"))


def parse_options(words: Sequence[str]) -> EvalOptions:
    """Options from `key=value` words, whose values are YAML.

    Raises:
        RecipeError: all that is wrong with them.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"'{word}' is not of the form key=value")
        plain = key in ("model", "data") and not value.startswith("[")  # an address is no YAML mapping
        given[key] = value if plain else parse_value(key, value)
    try:
        return EvalOptions.model_validate(given)
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
    raise RecipeError("\n  ".join(["evs-train eval:", *faults]) if len(faults) > 1 else faults[0])


def _fault(fault: Any) -> str:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, EvalOptions.model_fields, n=1)
        return f"unknown key '{key}'" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] == "missing":
        return f"{key}=... is missing"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"{key}: {str(fault['msg']).replace('Input should', 'must')}, got {fault['input']!r}"
