"""An estimate of the memory that training takes on each GPU, and its checkpoints on disk, from counts alone.

Weights, gradients and optimizer states follow from the number of parameters, the tuning and the DeepSpeed stage.
Activations are a rough term: 34 bytes per token, hidden unit and layer in bfloat16 (Korthikanti et al. 2022, "Reducing
Activation Recomputation", without the scores of attention, which fused kernels do not store), or 2 of them plus one
whole layer with gradient checkpointing. Logits are computed for supervised tokens only and take 12 bytes per
vocabulary entry: log-probabilities and two gradients in float32. A teacher's pass is taken for another such one, and
has 8 bytes more (tests/test_memory.py counts both).

Not counted: the vision tower's activations, gathered layers and buckets of DeepSpeed, the mixture's routing, Mamba's
states, fragmentation, and the CUDA context (together often several GiB). Nothing of it was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from evs_train.config import Recipe
from evs_train.models.base import Family
from evs_train.models.tuning import part_of, part_sizes

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on each GPU. `activations` is for `num_tokens` tokens of one micro-batch, logits for `num_logits`; rough."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    num_tokens: int
    num_logits: int
    num_processes: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: nn.Module,
    family: Family,
    recipe: Recipe,
    deepspeed: Mapping[str, Any] | None,
    *,
    num_tokens: int,
    num_logits: int,
    num_processes: int,
) -> MemoryEstimate:
    """Estimate for a model without weights.

    Args:
        model: as it would be trained (`Run.planned_model`).
        deepspeed: the DeepSpeed configuration, or None.
        num_tokens: of one micro-batch, after pruning.
        num_logits: supervised tokens of one micro-batch, in all passes that it makes.
    """
    parts = part_sizes(model, family)
    total, trained = sum(part.total for part in parts), sum(part.trainable for part in parts)
    lora = recipe.tuning.method == "lora"
    halves = recipe.model.dtype == "bfloat16" and (lora or deepspeed is not None)  # as in `Run.load_model`
    of_trained = 4 if recipe.model.dtype == "float32" or deepspeed is None else 2  # adapters are kept in float32
    weights = (2 if halves else 4) * (total - trained) + of_trained * trained
    gradients = of_trained * trained
    optimizer = (8 if of_trained == 4 else 12) * trained  # two moments; beside bfloat16 weights their float32 masters
    zero = (deepspeed or {}).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    return MemoryEstimate(
        weights=0.0 if "offload_param" in zero else weights / (num_processes if stage >= 3 else 1) / GIB,
        gradients=gradients / (num_processes if stage >= 2 else 1) / GIB,
        optimizer=0.0 if "offload_optimizer" in zero else optimizer / (num_processes if stage >= 1 else 1) / GIB,
        activations=_activations(model, family, recipe, num_tokens, num_logits) / GIB,
        num_tokens=num_tokens,
        num_logits=num_logits,
        num_processes=num_processes,
    )


def checkpoint_bytes(model: nn.Module, *, deepspeed: bool) -> tuple[int, int]:
    """Bytes of the trained weights as they are saved, and of a whole checkpoint: the files' sizes to 2 % (seen, tiny).

    Beside the weights, or the adapters alone, lie two float32 moments of each trained parameter; DeepSpeed adds
    float32 masters, and the weights a second time (under ZeRO-3 only parts of them: then it is an upper limit).
    """
    saved = trained = 0
    for parameter in model.parameters():
        count = parameter.numel() or math.prod(getattr(parameter, "ds_shape", (0,)))
        trained += count if parameter.requires_grad else 0
        if parameter.requires_grad or not isinstance(model, PeftModel):
            saved += count * parameter.element_size()
    return saved, (2 * saved + 12 * trained if deepspeed else saved + 8 * trained)


def _activations(model: nn.Module, family: Family, recipe: Recipe, num_tokens: int, num_logits: int) -> float:
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary, hidden = plain.get_input_embeddings().weight.shape
    num_layers = max(
        len(module)
        for name, module in plain.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.endswith("layers")
        and part_of(name + ".", family) == "language_model"
    )
    halves = 1 if recipe.model.dtype == "bfloat16" else 2
    per_layer = 34 * halves * hidden
    checkpointing = recipe.train.gradient_checkpointing
    recomputes = checkpointing is True or (checkpointing and "language_model" in checkpointing)
    stored = 2 * halves * hidden * num_layers + per_layer if recomputes else None
    of_layers = per_layer * num_layers if stored is None else stored
    return float(num_tokens * of_layers + 12 * num_logits * vocabulary)
