"""Which parameters are trained: parts of a model, freezing, adapters, optimizer groups.

Invariant: exactly the parameters that the recipe names require a gradient, and each belongs to one part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from evs_train.config import PARTS, LoraSection, OptimSection, Part, TuningSection
from evs_train.errors import ModelError, RecipeError
from evs_train.models.base import Family

_PEFT_PREFIX = "base_model.model."


def part_of(name: str, family: Family | type[Family]) -> Part | None:
    """Part that the parameter or module `name` of the plain or adapted model belongs to; None for unused ones."""
    plain = name.removeprefix(_PEFT_PREFIX)
    if plain.startswith(family.unused) or plain.endswith(family.not_stored):
        return None
    for part, prefixes in family.parts.items():
        if plain.startswith(prefixes):
            return part
    raise ModelError(
        f"the tensor {plain} belongs to no part of {family.model_type}", "its adapter in evs_train/models needs it"
    )


def apply_tuning(model: nn.Module, family: Family, tuning: TuningSection) -> nn.Module:
    """Freeze parts or add adapters, as the recipe says; returns the module to train.

    Raises:
        RecipeError: a chosen part has no linear layer of the wanted names, or one of `tuning.lora.targets` names none,
            or a layer that the family refuses to adapt.
    """
    if tuning.method == "full":
        for name, parameter in model.named_parameters():
            part = part_of(name, family)
            parameter.requires_grad_(part is not None and part not in tuning.freeze)
        return model
    lora = tuning.lora
    names = _lora_layers(model, family, lora)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none")
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _lora_layers(model: nn.Module, family: Family, lora: LoraSection) -> list[str]:
    """Full names of the linear layers that get adapters. Raises RecipeError as `apply_tuning` says."""
    targets = tuple(lora.targets or family.lora_targets)
    for target, reason in family.lora_refused.items():
        if target in targets:
            raise RecipeError(
                f"tuning.lora.targets: {target} cannot get an adapter in {family.model_type}: {reason}", "leave it out"
            )
    layers: dict[Part, dict[str, list[str]]] = {part: {} for part in lora.parts}  # part: short name: full names
    for name, module in model.named_modules():
        part = part_of(name + ".", family) if isinstance(module, nn.Linear) else None
        if part in layers:
            layers[part].setdefault(name.rsplit(".", 1)[-1], []).append(name)
    for part, found in layers.items():
        if not set(targets) & set(found):
            raise RecipeError(
                f"tuning.lora.targets: no linear layer of {part} is called {', '.join(targets)}",
                f"the linear layers of {part} are {', '.join(sorted(found))}",
            )
    for target in lora.targets or ():
        if not any(target in found for found in layers.values()):
            raise RecipeError(
                f"tuning.lora.targets: no linear layer of {', '.join(lora.parts)} is called {target}",
                f"they are {', '.join(sorted(set().union(*layers.values())))}",
            )
    return [name for found in layers.values() for target in targets for name in found.get(target, ())]


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part, in numbers."""

    part: str
    trainable: int
    total: int


def part_sizes(model: nn.Module, family: Family) -> list[PartSize]:
    """Trainable and total parameters by part, unused modules last."""
    sizes: dict[str, list[int]] = {part: [0, 0] for part in (*PARTS, "unused")}
    for name, parameter in model.named_parameters():
        size = sizes[part_of(name, family) or "unused"]
        count = parameter.numel() or int(torch.tensor(getattr(parameter, "ds_shape", (0,))).prod())
        size[0] += count if parameter.requires_grad else 0
        size[1] += count
    return [PartSize(part, *counts) for part, counts in sizes.items() if counts[1]]


def recompute_only(model: nn.Module, family: Family, parts: Collection[Part]) -> None:
    """Of a model in which all layers recompute their activations, let only those of `parts` do so.

    Raises:
        RecipeError: one of `parts` has no layer that can.
    """
    able: set[Part] = set()
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and (part := part_of(name + ".", family)):
            able.add(part)
            module.gradient_checkpointing = part in parts
    for part in parts:
        if part not in able:
            raise RecipeError(
                f"train.gradient_checkpointing: {part} of {family.model_type} has no layer that recomputes",
                f"name some of {', '.join(sorted(able))}",
            )


def encoder_trains(model: nn.Module, family: Family) -> bool:
    """Whether the vision tower or the projector has parameters that are trained."""
    return any(p.requires_grad and part_of(n, family) in ("vision", "projector") for n, p in model.named_parameters())


def parameter_groups(model: nn.Module, family: Family, optim: OptimSection) -> Iterator[dict[str, Any]]:
    """Optimizer groups by part and decay; biases, norms and other vectors are not decayed.

    The name of a group is `part` or `part_no_decay`.
    """
    grouped: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name, family)
        if parameter.requires_grad and part is not None:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor with its old shape
            grouped.setdefault((part, len(shape) > 1), []).append(parameter)
    for (part, decays), parameters in grouped.items():
        yield {
            "name": part if decays else f"{part}_no_decay",
            "params": parameters,
            "lr": optim.lr_by_part.get(part, optim.lr),
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
