"""A finished run to a checkpoint that serving engines load: weights merged, and the pruning rate in config.json.

Everything but weights comes from the base checkpoint unchanged (config.json, tokenizer, processor, templates), with
`video_pruning_rate` added at the top level of config.json; engines that know the base model then know the export.
Where tokens were not chosen by EVS the key is left out, or 0, since engines would take it for EVS's.

Invariant: the tensors of the export have the names of the base checkpoint's, or there is no export. It is written
beside its destination and renamed, so a torn one is never seen. Cost: the model once in memory, on the CPU.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from evs_train.checkpoint import EXPORT_RECORD, RECORD_FILE, read_record
from evs_train.config import Recipe
from evs_train.errors import ModelError, RecipeError
from evs_train.models.base_files import BESIDE_WEIGHTS, base_folder
from evs_train.models.loading import adapter_of, load_config, load_weights
from evs_train.pruners import method_name
from evs_train.recipe import parse_recipe
from evs_train.redaction import redact
from evs_train.serving import ServingLine, caveat, launch_lines

_NAMES_SHOWN = 10
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by their names in safetensors


@dataclass(frozen=True)
class Export:
    """What was written, and how to serve it."""

    path: Path
    pruning_rate: float
    serving: list[ServingLine]


def export_run(run_dir: str | Path, rate: float | None = None, out: str | Path | None = None) -> Export:
    """Export the final model of a run.

    Args:
        run_dir: `output_dir` of a finished run.
        rate: `video_pruning_rate` to write, 0 <= rate < 1; default: the recipe's `export.rate`.
        out: destination; default: the recipe's `export.dir`, or `export` in the run's folder. An older export there is
            replaced, anything else is not.

    Raises:
        RecipeError: the run is not finished, or `rate` is out of range.
        ModelError: the base cannot be read, the destination is taken, or tensor names differ from the base's.
    """
    run = Path(run_dir)
    record = read_record(run)
    if not (run / "final").is_dir():
        raise RecipeError(f"{run} holds no finished run", "training writes final/ there when it is done")
    recipe = parse_recipe(record["recipe"], str(run / RECORD_FILE))
    rate = recipe.export.rate if rate is None else rate
    if not 0.0 <= rate < 1.0:
        raise RecipeError(f"rate must be in [0, 1), got {rate}")
    destination = Path(out or recipe.export.dir or run / "export")
    if destination.exists() and not (destination / EXPORT_RECORD).is_file():
        raise ModelError(f"{destination} exists and is not an export", "name another folder with out=DIR")

    base = base_folder(recipe.model, record["base_commit"])
    model = _trained_model(recipe, run / "final", base)
    staging = destination.with_name(destination.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{staging.name}-") as saved:
        model.save_pretrained(saved)
        _write_like_base(model, Path(saved), base, staging)
    _copy_files(base, staging)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    method = method_name(recipe.evs.method)
    if method == "evs" or "video_pruning_rate" in config:  # what an engine reads there it prunes by EVS
        config["video_pruning_rate"] = rate if method == "evs" else 0.0
    _write_json(staging / "config.json", config)
    _write_json(staging / EXPORT_RECORD, redact({**record, "video_pruning_rate": rate}))
    serving = launch_lines(model.config.model_type, str(destination), rate, method)
    (staging / "README.md").write_text(redact(_model_card(recipe, record, rate, serving)), encoding="utf-8")
    if destination.exists():
        shutil.rmtree(destination)
    staging.rename(destination)
    return Export(destination, rate, serving)


def tensor_names(folder: Path) -> dict[str, Path]:
    """Names of all tensors in the safetensors files of `folder`, each with its file."""
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    return names


def _trained_model(recipe: Recipe, final: Path, base: Path) -> PreTrainedModel:
    """The trained model on the CPU in the dtype of most of the base's weights, adapters merged."""
    elements = dict.fromkeys(_DTYPES, 0)
    for name, file in tensor_names(base).items():
        with safe_open(file, framework="pt") as tensors:
            header = tensors.get_slice(name)  # the shape and dtype alone: no tensor is read
            if header.get_dtype() in elements:
                elements[header.get_dtype()] += math.prod(header.get_shape())
    dtype = _DTYPES[max(elements, key=lambda one: elements[one])]
    config = load_config(str(base), trust_remote_code=recipe.model.trust_remote_code)
    if recipe.tuning.method == "full":
        return load_weights(recipe.model.model_copy(update={"path": str(final), "revision": None}), config, dtype)
    model = load_weights(recipe.model.model_copy(update={"path": str(base), "revision": None}), config, dtype)
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(final)).merge_and_unload(safe_merge=True)
    return merged


def _write_like_base(model: PreTrainedModel, saved: Path, base: Path, out: Path) -> None:
    """Write the tensors that `model` saved into `saved` as the base has them: files, names, shapes, dtypes and index.

    A tensor that training did not change is the base's own, to the bit. Tensors of the base that were not saved are
    either repetitions of a tied weight or not loaded by the architecture, and are then passed on.

    Raises:
        ModelError: names or shapes differ from the base's in any other way.
    """
    expected, written = tensor_names(base), tensor_names(saved)
    state = model.state_dict()
    not_loaded = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["$^"]))
    not_stored = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["$^"]))
    family = adapter_of(model.config)
    missing = [
        n
        for n in expected
        if not (n in written or n in state or not_loaded.search(n) or n.startswith(family.not_loaded))
    ]
    surplus = [n for n in written if not (n in expected or not_stored.search(n) or n.endswith(family.not_stored))]
    if missing or surplus:
        raise ModelError(
            f"the tensor names differ from the base checkpoint's ({base}): "
            f"{len(missing)} missing: {_shown(missing)}; {len(surplus)} too many: {_shown(surplus)}",
            "nothing was exported; the run's final/ is intact",
        )
    for file in sorted(base.glob("*.safetensors")):
        tensors = {}
        for name, original in _tensors(file):
            trained = _tensor(written[name], name) if name in written else state.get(name, original)
            trained = _in_shape(trained, original.shape, name)
            unchanged = torch.equal(original.to(trained.dtype), trained)
            tensors[name] = (original if unchanged else trained.to(original.dtype)).contiguous()
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)


def _in_shape(tensor: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """`tensor` in the base's shape, its last two dimensions swapped if need be.

    transformers 5.23 swaps those of Qwen3-VL-MoE's experts when it loads them, and leaves them so when it saves;
    engines read them as released. Square ones could not be told apart; no released model has them.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.ndim < 2 or tensor.transpose(-1, -2).shape != shape:
        raise ModelError(
            f"the tensor {name} has shape {list(tensor.shape)}, the base checkpoint's {list(shape)}",
            "nothing was exported; the run's final/ is intact",
        )
    return tensor.transpose(-1, -2)


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            yield name, tensors.get_tensor(name)


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _copy_files(base: Path, staging: Path) -> None:
    for pattern in BESIDE_WEIGHTS:
        for file in base.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, staging / file.name)


def _model_card(recipe: Recipe, record: dict[str, Any], rate: float, serving: list[ServingLine]) -> str:
    rates = record["pruning_rates"]
    commands = "\n\n".join(f"# {line.engine} (reads: {line.reads}). {line.note}\n{line.command}" for line in serving)
    warning = f"**{caveat(serving)}**\n\n" if caveat(serving) else ""
    return f"""---
base_model: {recipe.model.path}
library_name: transformers
pipeline_tag: video-text-to-text
tags: [efficient-video-sampling, video-token-pruning]
---

# {recipe.model.path}, uptrained for Efficient Video Sampling

Uptrained with stochastic video-token pruning ([arXiv 2510.14624](https://arxiv.org/abs/2510.14624)) by evs_train.
{_of_config(recipe, rate)}

| | |
|---|---|
| recipe | {recipe.recipe} ({recipe.tuning.method}), {record["num_steps"]} steps of {record["step"]} |
| pruning rates in training | mean {rates["mean"]:.3f}; percentiles {rates["percentiles"]} |
| scores computed in | {recipe.model.dtype if recipe.evs.score_dtype == "model" else "float32"} |
| rows | {record["num_samples"]}, fingerprint {record["data_fingerprint"][:16]} |
| versions | {", ".join(f"{name} {version}" for name, version in record["versions"].items())} |

The whole record is in `{EXPORT_RECORD}`. No accuracy is claimed here: measure it at the rate you serve.

## Serving

{warning}```
{commands}
```
"""


def _of_config(recipe: Recipe, rate: float) -> str:
    if method_name(recipe.evs.method) == "evs":
        return f"`config.json` says `video_pruning_rate: {rate}`: the share of video tokens that serving should drop."
    return (
        f"Its tokens were chosen by `evs.method: {json.dumps(recipe.evs.method)}`; rate {rate} is recorded for serving."
        " `config.json` does not say it, since engines would take it for EVS's."
    )


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_NAMES_SHOWN]) + (" ..." if len(ordered) > _NAMES_SHOWN else "") or "none"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
