"""The recipe's schema: every key of a run with its type, range, default and meaning.

Invariant: a `Recipe` has no unknown key and no value of a wrong type or range. What needs files or a model (does the
checkpoint exist, is its architecture supported) is checked by whoever opens them. Nothing of torch or transformers is
imported here. The `data` section is in `data_config.py`; `recipe.py` reads recipes from YAML and reports what is wrong
with one; docs/recipe.md lists the keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evs_train import pruners, samplers
from evs_train.data_config import DataSection, Section, as_list
from evs_train.errors import RecipeError

Part = Literal["vision", "projector", "language_model"]
PARTS: tuple[Part, ...] = get_args(Part)
Positions = Literal["preserve", "sequential", "engine"]
"""Of retained tokens: those of the unpruned video; 0, 1, 2, ... without gaps; those that a serving engine gives."""
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Layout = Literal["rows", "videomme", "mvbench", "tempcompass", "longvideobench", "mlvu", "egoschema"]
"""Of questions (docs/eval.md): files of rows, or the folder of a published benchmark."""


class ModelSection(Section):
    """Which checkpoint is trained."""

    path: str = Field(description="directory or hub name of the base checkpoint")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    trust_remote_code: bool = Field(
        False,
        description="run code that comes with the checkpoint, for the few families that need it (adding-a-family.md)",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of the computation, and of the scores: serve in the same one"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention kernel of transformers"
    )


class DemoSection(Section):
    """Build the inputs of a run that needs no download: a small random checkpoint and rendered clips."""

    family: str = Field(description="family of the checkpoint written to `model.path`")
    num_clips: int = Field(64, ge=1, description="rendered clips written beside `data.rows`")
    size: int = Field(96, ge=32, description="pixels of a clip's side")
    num_frames: int = Field(16, ge=1, description="frames of a clip")


class EvsSection(Section):
    """How videos are pruned while training."""

    method: str | dict[str, Any] = Field(
        "evs", description="which tokens stay: a pruner's name, or that as `kind` with its options (docs/pruners.md)"
    )
    rate: float | dict[str, Any] = Field(
        0.75, description="a fixed rate, or a sampler, such as {kind: beta, mode: 0.75}"
    )
    scope: Literal["batch", "sample"] = Field("batch", description="one rate per optimizer step, or one per sample")
    cap: bool = Field(True, description="keep drawn rates low enough that more than the first unit is left")
    positions: Positions = Field(
        "preserve",
        description="retained tokens keep their positions, or are numbered anew (sequential: families with 1-D "
        "positions), or text after a video stands where vLLM puts it when it prunes (engine: Qwen2.5-VL)",
    )
    score: Literal["engine", "embeds"] = Field(
        "engine", description="score the tensor that serving scores for this family, or the plain embeddings"
    )
    score_dtype: Literal["model", "float32"] = Field("model", description="dtype of the scores")

    @field_validator("method", mode="plain")
    @classmethod
    def _pruner_is_known(cls, value: Any) -> str | dict[str, Any]:
        try:
            pruners.method_name(value)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        method: str | dict[str, Any] = value
        return method

    @field_validator("rate", mode="plain")  # plain: it alone judges, or a union would report each of its members
    @classmethod
    def _sampler_is_known(cls, value: Any) -> float | dict[str, Any]:
        try:
            samplers.build_sampler(value)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        rate: float | dict[str, Any] = value
        return rate


class ObjectiveSection(Section):
    """What a step minimises (docs/objectives.md)."""

    kind: Literal["uptrain", "teacher", "sandwich"] = Field(
        "uptrain",
        description="cross-entropy at the drawn rate; that and KL to the model's own dense pass; or the mean "
        "cross-entropy at the lowest, the highest and the drawn rate",
    )
    teacher_weight: float = Field(1.0, gt=0, description="teacher: loss = cross-entropy + teacher_weight * KL")
    temperature: float = Field(1.0, gt=0, description="teacher: of both distributions; KL is multiplied by its square")
    lowest: Rate = Field(0.0, description="sandwich: rate of the first pass")
    highest: Rate = Field(0.9, description="sandwich: rate of the second pass, lowered by evs.cap as drawn ones are")

    @property
    def further_passes(self) -> dict[str, float]:
        """Name and rate of each pass beside the drawn one."""
        if self.kind == "sandwich":
            return {"lowest": self.lowest, "highest": self.highest}
        return {"teacher": 0.0} if self.kind == "teacher" else {}

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> ObjectiveSection:
        for name, kind in _OBJECTIVE_OF.items():
            if self.kind != kind and getattr(self, name) != ObjectiveSection.model_fields[name].default:
                raise ValueError(f"{name} is of kind {kind}; the kind is {self.kind}")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be below highest ({self.highest})")
        return self


_OBJECTIVE_OF = {"teacher_weight": "teacher", "temperature": "teacher", "lowest": "sandwich", "highest": "sandwich"}


class LoraSection(Section):
    """Low-rank adapters (PEFT). Used when `tuning.method` is lora."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale: adapters are multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on the adapters' inputs")
    parts: list[Part] = Field(["language_model"], min_length=1, description="parts that get adapters")
    targets: list[str] | None = Field(
        None, min_length=1, description="names of linear layers; default: the family's list"
    )


class TuningSection(Section):
    """What is trained."""

    method: Literal["full", "lora"] = Field("full", description="train the weights, or low-rank adapters on them")
    freeze: list[Part] = Field(["vision"], description="parts that stay as they are (with lora: see lora.parts)")
    lora: LoraSection = Field(default_factory=LoraSection)

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower is trained, or gets adapters."""
        return "vision" not in self.freeze if self.method == "full" else "vision" in self.lora.parts

    @property
    def trains_projector(self) -> bool:
        """Whether the projector is trained, or gets adapters."""
        return "projector" not in self.freeze if self.method == "full" else "projector" in self.lora.parts

    @model_validator(mode="after")
    def _something_is_trained(self) -> TuningSection:
        if self.method == "full" and set(self.freeze) == set(PARTS):
            raise ValueError("freeze names every part: nothing would be trained")
        return self


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-5, gt=0, description="learning rate after warm-up")
    lr_by_part: dict[Part, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="learning rates that differ from `lr`, by part"
    )
    weight_decay: float = Field(0.0, ge=0, description="on matrices only, not on biases and norms")
    betas: list[Rate] = Field([0.9, 0.95], min_length=2, max_length=2, description="of AdamW")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which the rate rises")
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate, as transformers names it"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")


class TrainSection(Section):
    """Length and shape of the run."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the rows, where steps is null")
    batch_size: int = Field(1, ge=1, description="rows per process and micro-batch")
    grad_accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
    packing: bool = Field(False, description="join a micro-batch's rows to one sequence after pruning; no padding")
    gradient_checkpointing: bool | list[Part] = Field(
        False, description="recompute activations to save memory: in all parts, in none, or in those named"
    )
    log_every: int = Field(10, ge=1, description="steps between logs")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; null: only at the end")
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="a step whose loss or gradient is not finite is not taken; the run ends when there were more than "
        "this (reliability.md)",
    )
    keep_checkpoints: int = Field(2, ge=2, description="whole ones; 1 is refused: the newest may turn out damaged")
    pictures_every: int | None = Field(None, ge=1, description="steps between pictures of kept patches; null: none")
    resume: bool | Literal["auto"] = Field(
        False,
        description="go on from the newest whole checkpoint in output_dir; auto: start where there is no checkpoint, "
        "so that the same command starts a run and goes on with it after a kill",
    )
    resume_allow: list[str] = Field(
        [], description="keys or facts that a resumed run may change, such as [optim.lr] (reliability.md)"
    )
    timeout_minutes: float = Field(
        60.0,
        gt=0,
        description="processes that wait so long for another one end the run: above the slowest save or read",
    )


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: bool = Field(True, description="W&B; offline when there is no key")
    project: str = Field("evs-train", description="W&B project")
    name: str | None = Field(None, description="name of the run; default: the recipe's")
    tags: list[str] = Field([], description="W&B tags")
    timeout: float = Field(
        60.0, gt=0, description="seconds that W&B has to answer at the start, and at the end to send what is left"
    )


class EvalSection(Section):
    """Accuracy against pruning rate while training: a small curve every so many steps (docs/eval.md)."""

    every: int | None = Field(None, ge=1, description="steps between curves; one more before training; null: none")
    data: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="files of rows with questions, or with `layout` the folder of a benchmark"
    )
    layout: Layout = Field("rows", description="whose layout the folder has")
    rates: list[Rate] = Field([0.0, 0.5, 0.75, 0.9], min_length=1, description="pruning rates")
    limit: int | None = Field(100, ge=1, description="only the first so many questions; null: all")
    choices: Literal["letters", "texts"] = Field(
        "letters", description="of rows with options: list them and choose a letter, or choose between their texts"
    )
    match: Literal["exact", "contains"] = Field("exact", description="when a free answer counts as right")
    max_new_tokens: int = Field(32, ge=1, description="longest free answer")

    @model_validator(mode="after")
    def _something_is_asked(self) -> EvalSection:
        if self.every is not None and not self.data:
            raise ValueError("eval.every needs eval.data: the questions that are asked")
        return self


class ExportSection(Section):
    """The checkpoint written when training ends."""

    enabled: bool = Field(True, description="export when training ends")
    rate: Rate = Field(0.75, description="video_pruning_rate written into config.json")
    dir: str | None = Field(None, description="default: output_dir/export")


class Recipe(Section):
    """One uptraining run."""

    recipe: str = Field(description="name of the recipe, for records")
    output_dir: str = Field(description="everything the run writes goes here")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of rows, the pruning rates and new weights")
    model: ModelSection
    data: DataSection
    evs: EvsSection = Field(default_factory=EvsSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    tuning: TuningSection = Field(default_factory=TuningSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection = Field(default_factory=TrainSection)
    deepspeed: str | None = Field(None, description="zero2, zero3 or the path of a DeepSpeed JSON file")
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    export: ExportSection = Field(default_factory=ExportSection)
    demo: DemoSection | None = None
    dry_run: bool = Field(False, description="print the resolved recipe, what is trained and the first batches; stop")

    @model_validator(mode="after")
    def _cached_features_stand_still(self) -> Recipe:
        if self.data.cache_features is not None and self.tuning.trains_vision:
            raise ValueError(
                "data.cache_features needs a frozen vision tower: put vision into tuning.freeze (method full), or take "
                "it out of tuning.lora.parts (method lora)"
            )
        return self

    @model_validator(mode="after")
    def _a_hanging_file_costs_one_sample(self) -> Recipe:
        hang, wait = self.data.decode_timeout, self.train.timeout_minutes
        if hang is not None and 60 * wait <= 2 * hang:
            raise ValueError(
                f"train.timeout_minutes ({wait:g}) must be above twice data.decode_timeout ({hang:g} s): all processes "
                "wait while one gives a hanging file up and reads another in its place"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_batch(self) -> Recipe:
        if self.data.max_tokens_per_batch is not None and self.train.batch_size > 1:
            raise ValueError("set train.batch_size (1 unsets it) or data.max_tokens_per_batch, not both")
        if self.data.max_tokens_per_batch is not None and self.objective.kind == "sandwich":
            raise ValueError(
                "objective.kind sandwich holds three passes in memory, and data.max_tokens_per_batch counts one: "
                "set train.batch_size instead"
            )
        return self
