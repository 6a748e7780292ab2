"""Whether a run may go on from another one's checkpoint: every key of a recipe is judged by one table.

A key is *fixed* (a checkpoint fits no other value), *named* (another value changes what is trained, so the run goes on
only where `train.resume_allow` names the key), or *free*. Facts that several keys make together, such as the rows of a
step, are judged in their stead: `train.batch_size` is free, and `step` is named.

Invariant: every key of `Recipe` has exactly one place (a test fails for a new one), and a run that goes on in spite of
a difference says so in its record for good. Cost: none to speak of.
This module finds and reads no files; `checkpoint.py` does.

Records of earlier versions: a recipe key that the version did not have counts as its default, because the default of a
new key is what was done before; a fact that it did not record counts as different, since nobody knows it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from evs_train.config import Recipe
from evs_train.errors import RecipeError
from evs_train.recipe import parse_recipe

Record = Mapping[str, Any]

_OTHER_TENSORS = "the checkpoint holds the tensors of what was trained, and their optimizer state"
FIXED = {
    "tuning.method": _OTHER_TENSORS,
    "tuning.freeze": _OTHER_TENSORS,
    "tuning.lora.r": _OTHER_TENSORS,
    "tuning.lora.parts": _OTHER_TENSORS,
    "tuning.lora.targets": _OTHER_TENSORS,
    "lora_targets": _OTHER_TENSORS,
    "zero_stage": "DeepSpeed's checkpoints are of one stage, and none of a run without it",
    "zero_shards": "DeepSpeed keeps its optimizer state in one piece per process: start as many as before",
}
"""Keys and facts that must be the same, and why."""

NAMED_KEYS = (
    "seed",  # order of rows, rates
    # What a row shows, and which rows are refused.
    "data.frames_fps", "data.fps", "data.num_frames", "data.min_frames", "data.max_frames", "data.video_kwargs",
    "data.image_kwargs", "data.template_kwargs", "data.supervise", "data.max_length", "data.verify", "data.backend",
    "data.decode_timeout", "data.decode_memory_mb", "data.max_pixels", "data.max_video_seconds",
    "data.max_video_frames",
    # What a step computes, and in which arithmetic.
    "model.dtype", "model.attn_implementation", "train.packing", "tuning.lora.alpha", "tuning.lora.dropout",
    "evs.method", "evs.rate", "evs.scope", "evs.cap", "evs.positions", "evs.score", "evs.score_dtype",
    "objective.kind", "objective.teacher_weight", "objective.temperature", "objective.lowest", "objective.highest",
    "optim.lr", "optim.lr_by_part", "optim.weight_decay", "optim.betas", "optim.warmup_ratio", "optim.scheduler",
    "optim.max_grad_norm",
)  # fmt: skip
NAMED_FACTS = ("base_files", "data_fingerprint", "num_steps", "step", "cached_features", "deepspeed_config")

FREE = (
    # What the base is and what the rows say is compared by content, wherever it lies.
    "model.path", "model.revision", "model.trust_remote_code", "demo", "data.rows", "data.media_root",
    "data.allow_outside", "data.format", "data.index", "deepspeed", "data.cache_features",
    # What a step reads, and how many there are, is compared as `step` and `num_steps`.
    "train.steps", "train.epochs", "train.batch_size", "train.grad_accumulation", "data.max_tokens_per_batch",
    "data.max_media_tokens_per_batch", "data.over_budget",
    # What another machine needs: the same computation, but for rounding at most.
    "train.gradient_checkpointing", "data.num_workers",
    # When a run ends because of what is bad or slow, which changes nothing before.
    "data.on_error", "data.max_bad_share", "data.max_bad_in_a_row", "train.max_skipped_steps", "train.timeout_minutes",
    # Names, and what is written, shown or asked beside training.
    "recipe", "output_dir", "dry_run", "train.log_every", "train.save_every", "train.keep_checkpoints",
    "train.pictures_every", "train.resume", "train.resume_allow", "tracking.wandb", "tracking.timeout",
    "tracking.project", "tracking.name", "tracking.tags", "eval.every", "eval.data", "eval.layout", "eval.rates",
    "eval.limit", "eval.choices", "eval.match", "eval.max_new_tokens", "export.enabled", "export.rate", "export.dir",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Values of one key or fact, in the run that made the checkpoint and in the one that would go on."""

    was: Any
    now: Any

    def __str__(self) -> str:
        return f"was {self.was}, is {self.now}"


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a recipe; a section that may be null is one key."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from recipe_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def differences(before: Record, now: Record) -> dict[str, Difference]:
    """What is fixed or named and differs between two records, by key or fact.

    Raises:
        RecipeError: another version's recipe stands in `before`, which this one cannot read.
    """
    try:
        recipe = parse_recipe(before["recipe"], "the recipe in the record").model_dump()
    except RecipeError as error:
        raise RecipeError(
            f"train.resume: {error.message}", "another version of evs_train wrote it; go on with that one"
        ) from error
    found: dict[str, Difference] = {}
    for key in recipe_keys():
        if key in FIXED or key in NAMED_KEYS:
            was, wanted = _value(recipe, key), _value(now["recipe"], key)
            if was != wanted:
                found[key] = Difference(was, wanted)
    for fact in (*NAMED_FACTS, *(name for name in FIXED if name in now)):
        was, wanted = before.get(fact, "not recorded"), now[fact]
        if was != wanted:
            found[fact] = _where_they_differ(was, wanted)
    return found


def refuse_differences(before: Record, now: Record, place: str) -> None:
    """Judge going on from the run of record `before` with the one of record `now`; `place` names the former.

    Raises:
        RecipeError: something differs that is fixed, or that `train.resume_allow` does not name, both values given; or
            that key names something that is neither.
    """
    allow: Sequence[str] = now["recipe"]["train"]["resume_allow"]
    _check_names(allow)
    found = differences(before, now)
    refused = {name: difference for name, difference in found.items() if name not in allow}
    if not refused:
        return
    fixed = [name for name in refused if name in FIXED]
    restore = "restore these, or start anew with train.resume=false"
    raise RecipeError(
        f"train.resume: {place} was another run: "
        + "; ".join(f"{name} ({difference})" for name, difference in refused.items()),
        f"{restore}; {'; '.join(dict.fromkeys(FIXED[name] for name in fixed))}"
        if fixed
        else f"{restore}, or go on in spite of it, which the record will say: "
        f"train.resume_allow='[{', '.join(refused)}]'",
    )


def resumption(before: Record, now: Record, checkpoint: str) -> dict[str, Any]:
    """What the record keeps of one resumption: from where, by how many processes, and what differs.

    `allowed` are the differences that `train.resume_allow` let pass, `versions` those of the packages.
    """
    versions: Record = before.get("versions", {})
    changed = {
        name: Difference(versions.get(name), version)
        for name, version in now["versions"].items()
        if versions.get(name) != version
    }
    return {
        "from": checkpoint,
        "processes": now["processes"],
        "allowed": {name: vars(difference) for name, difference in differences(before, now).items()},
        "versions": {name: vars(difference) for name, difference in changed.items()},
    }


def _check_names(allow: Sequence[str]) -> None:
    known = [*NAMED_KEYS, *NAMED_FACTS]
    for name in allow:
        if name in FIXED:
            raise RecipeError(f"train.resume_allow: {name} cannot be allowed", FIXED[name])
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = "it may change as it is" if name in FREE else f"did you mean {near[0]}?" if near else ""
            raise RecipeError(f"train.resume_allow: there is nothing to allow called '{name}'", hint)


def _value(recipe: Record, dotted: str) -> Any:
    for name in dotted.split("."):
        recipe = recipe[name]
    return recipe


def _where_they_differ(was: Any, now: Any) -> Difference:
    """Of two mappings, such as the base's files, only what differs."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return Difference(was, now)
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return Difference({name: was.get(name) for name in names}, {name: now.get(name) for name in names})
