"""An estimate of the memory that training takes on each GPU, and its checkpoints on disk, from counts alone.

Weights, gradients and optimizer states follow from the number of parameters, the tuning and the DeepSpeed stage;
activations of tower, projector and language model from the shapes of their modules (`activations.py`). Logits are
computed for supervised tokens only and take 12 bytes per vocabulary entry: log-probabilities and two gradients in
float32. A teacher's pass is taken for another such one, and has 8 bytes more (tests/test_memory.py counts both).
The pixels of a micro-batch are there all the time, four bytes each, as processors return them.

Gradients are found while activations are let go, so both together are less than each at its most, unless gradients
stay: with DeepSpeed, and from one micro-batch to the next.

Not counted: gathered layers and buckets of DeepSpeed and DDP, what plain paths of recurrent layers keep, fragmentation,
and the CUDA context (together often several GiB). Nothing of it was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from evs_train.activations import Layer, layers_of, pixels_of_patch
from evs_train.config import Part, Recipe
from evs_train.models.base import Family
from evs_train.models.tuning import part_sizes

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on each GPU, for one micro-batch.

    Attributes:
        gradients, activations: each at its most.
        step: both together at their most; the tower's and the language model's activations are in it.
        inputs: pixels of the micro-batch.
        num_patches: that the vision tower sees.
        num_tokens: that the language model sees, after pruning.
        num_logits: supervised tokens of all passes.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    step: float
    inputs: float
    num_patches: int
    num_tokens: int
    num_logits: int
    num_processes: int

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.step + self.inputs


def estimate_memory(
    model: nn.Module,
    family: Family,
    recipe: Recipe,
    deepspeed: Mapping[str, Any] | None,
    *,
    num_tokens: int,
    num_video_tokens: int,
    num_image_tokens: int,
    num_logits: int,
    num_processes: int,
) -> MemoryEstimate:
    """Estimate for a model without weights.

    Args:
        model: as it would be trained (`Run.planned_model`).
        deepspeed: the DeepSpeed configuration, or None.
        num_tokens: of one micro-batch, after pruning.
        num_video_tokens, num_image_tokens: of one micro-batch, before pruning.
        num_logits: supervised tokens of one micro-batch, in all passes that it makes.
    """
    parts = part_sizes(model, family)
    total, trained = sum(part.total for part in parts), sum(part.trainable for part in parts)
    lora = recipe.tuning.method == "lora"
    halves = recipe.model.dtype == "bfloat16" and (lora or deepspeed is not None)  # as in `Run.load_model`
    of_trained = 4 if recipe.model.dtype == "float32" or deepspeed is None else 2  # adapters are kept in float32
    weights = (2 if halves else 4) * (total - trained) + of_trained * trained
    optimizer = (8 if of_trained == 4 else 12) * trained  # two moments; beside bfloat16 weights their float32 masters
    zero = (deepspeed or {}).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    of_gradient = of_trained / (num_processes if stage >= 2 else 1)
    patches = num_video_tokens * family.patches_per_token("video") + num_image_tokens * family.patches_per_token(
        "image"
    )
    most = most_of_step(
        layers_of(model, family, recipe),
        {
            "vision": round(patches),
            "projector": num_video_tokens + num_image_tokens,
            "language_model": num_tokens,
        },
        logits=12.0 * num_logits * _vocabulary(model),
        gradient_bytes=of_gradient,
        gradients_stay=deepspeed is not None or recipe.train.grad_accumulation > 1,
    )
    return MemoryEstimate(
        weights=0.0 if "offload_param" in zero else weights / (num_processes if stage >= 3 else 1) / GIB,
        gradients=of_gradient * trained / GIB,
        optimizer=0.0 if "offload_optimizer" in zero else optimizer / (num_processes if stage >= 1 else 1) / GIB,
        activations=most.activations / GIB,
        step=most.step / GIB,
        inputs=4 * patches * pixels_of_patch(model, family) / GIB,
        num_patches=round(patches),
        num_tokens=num_tokens,
        num_logits=num_logits,
        num_processes=num_processes,
    )


@dataclass(frozen=True)
class Most:
    """Bytes at the worst moment of a step: of activations alone, and of gradients together with them."""

    activations: float
    step: float


def most_of_step(
    layers: Sequence[Layer],
    tokens: Mapping[Part, int],
    *,
    logits: float,
    gradient_bytes: float,
    gradients_stay: bool,
) -> Most:
    """Go through a step: forward through the layers, over the loss, and back.

    Args:
        layers: in the order of the forward pass.
        tokens: that each part sees.
        logits: bytes of logits and their gradients.
        gradient_bytes: of one parameter, on this GPU.
        gradients_stay: those of all parameters are there all the time, not only once they are found.
    """
    gradients = gradient_bytes * sum(layer.trained for layer in layers) if gradients_stay else 0.0
    features = sum(tokens[layer.part] * layer.made for layer in layers if layer.part == "projector")
    held, reached = [0.0], False  # up to each layer; something up to here is trained
    moments: list[tuple[float, float]] = []
    for layer in layers:
        reached = reached or layer.trained > 0
        kept = layer.input if layer.recomputes else layer.kept
        beside = 0.0 if layer.part == "language_model" else features
        moments.append((held[-1] + beside + tokens[layer.part] * (layer.input + layer.running), gradients))
        held.append(held[-1] + (tokens[layer.part] * kept + layer.casts if reached else 0.0))
    moments.append((held[-1] + logits, gradients))
    for layer, up_to in zip(reversed(layers), reversed(held), strict=False):
        if up_to == 0:
            break
        again = layer.kept if layer.recomputes else 0.0
        gradients += 0.0 if gradients_stay else gradient_bytes * layer.trained
        moments.append((up_to + tokens[layer.part] * (again + layer.working), gradients))
    return Most(max(one for one, _ in moments), max(sum(both) for both in moments))


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


def _vocabulary(model: nn.Module) -> int:
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return len(plain.get_input_embeddings().weight)
