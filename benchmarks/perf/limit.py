"""The least that a training step can cost, from the model's shapes: what pruning can gain at most.

A step has a vision side V (tower and projector, which see all tokens), a language side L(r) (which sees the retained
share r) and the update of the weights U, which pruning leaves alone. The limit of the speed-up at retention r is

    (V + L(1) + U) / (V + L(r) + U)        seconds at the machine's peaks (`machine.py`)

How each is counted (a multiplication and an addition are two operations):
- a matrix of n weights costs 2 n a token forward, as much again for the gradient of its weights if they are trained,
  and again for the gradient of its input if anything before it is trained (Kaplan et al. 2020, arXiv 2001.08361,
  section 2.1, has 2 N and 4 N for a model trained whole). So a frozen tower with nothing trained before it costs its
  forward alone, and a frozen matrix behind an adapter two thirds of a trained one. Adapters are matrices of their own;
- attention of width w costs 4 w for each pair of a query and a key that it may see, forward (scores and weighted sum),
  and twice that backward: S (S + 1) / 2 pairs in a row of S tokens, P^2 in a temporal unit of P patches;
- of a mixture of experts each token meets the router and its chosen experts;
- a Mamba layer's recurrence costs 4 operations for each element of its state and token (one update, one reading, as in
  Dao and Gu 2024, arXiv 2405.21060, section 6), whatever its kernel does;
- the head counts at supervised tokens alone;
- with gradient checkpointing each layer that has a backward pass is computed once more, up to its last matrix.

Bytes: each matrix is read or written once in each of those passes, and where that takes longer than its products, it
counts instead; an AdamW update moves 32 bytes for each trained float32 weight (weight, gradient and two moments in,
weight and two moments out, and the gradient once more for the norm that it is clipped by). Activations, norms,
softmax, padding and the choice of tokens count nothing: it is a limit. Not for models with layers of other kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from benchmarks.perf.machine import Machine
from evs_train.collate import BatchPlan
from evs_train.config import PARTS, Part
from evs_train.data.chat import MediaItem
from evs_train.models.base import Family
from evs_train.models.tuning import part_of

UPDATE_BYTES = 32
_SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj")
_LAYER = re.compile(r".*\.(layers|layer|blocks)\.\d+\.")
_NOT_FOR_VIDEO = ".patch_projection"  # RADIO has another one for images


@dataclass(frozen=True)
class Tokens:
    """What one step shows to each part.

    Attributes:
        of_part: tokens that run through each part; of the vision tower, patches.
        pairs: pairs of tokens that attention joins, by part.
        supervised: tokens whose logits are needed.
    """

    of_part: dict[Part, int]
    pairs: dict[Part, float]
    supervised: int


@dataclass(frozen=True)
class Product:
    """One matrix, one attention or one recurrence of a step.

    Attributes:
        name: of the module that it belongs to.
        flops: of the forward pass.
        bytes: of its weights.
        passes: how often it is computed, the forward pass included.
    """

    part: Part
    name: str
    flops: float
    bytes: float
    passes: float

    def seconds(self, machine: Machine) -> float:
        """At the machine's peaks."""
        return self.passes * max(self.flops / machine.flops, self.bytes / machine.bytes)


@dataclass(frozen=True)
class Cost:
    """Least seconds of a step's parts, and its operations."""

    vision: float
    language: float
    update: float
    flops: float

    @property
    def seconds(self) -> float:
        return self.vision + self.language + self.update


def tokens_of(plans: Sequence[BatchPlan], family: Family) -> Tokens:
    """What the micro-batches of one step show, by their plans. Padding counts nothing."""
    items = [planned.item for plan in plans for planned in plan.items]
    lengths = [length for plan in plans for length in plan.num_tokens]
    patches = [_patches(item, family.config) for item in items for _ in range(item.num_units)]
    return Tokens(
        of_part={
            "vision": sum(patches),
            "projector": sum(item.num_tokens for item in items),
            "language_model": sum(lengths),
        },
        pairs={
            "vision": sum(count**2 for count in patches),
            "projector": 0,
            "language_model": sum(length * (length + 1) / 2 for length in lengths),
        },
        supervised=sum(count for plan in plans for count in plan.num_supervised),
    )


def _patches(item: MediaItem, config: Any) -> int:
    """Patches that the tower sees of one temporal unit, and what it puts before them."""
    if config.model_type == "nemotron_h_omni":
        vision = config.vision_config
        merge: int = round(1 / config.downsample_ratio)
        before = int(vision.num_cls_tokens + vision.num_registers)
        return item.tokens_per_unit * merge * merge + before
    merge = int(config.vision_config.spatial_merge_size)
    return item.tokens_per_unit * merge * merge


def cost_of(model: nn.Module, family: Family, tokens: Tokens, machine: Machine, *, checkpointing: bool = False) -> Cost:
    """The least that a step of these tokens costs. `model`: as it is trained (meta tensors will do)."""
    seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    flops = 0.0
    for product in products(model, family, tokens, checkpointing=checkpointing):
        seconds[product.part] += product.seconds(machine)
        flops += product.passes * product.flops
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(
        vision=seconds["vision"] + seconds["projector"],
        language=seconds["language_model"],
        update=UPDATE_BYTES * trained / machine.bytes,
        flops=flops,
    )


def products(model: nn.Module, family: Family, tokens: Tokens, *, checkpointing: bool = False) -> Iterator[Product]:
    """All products of a step, in the order of the forward pass."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = family.output_embeddings(plain)
    modules = [
        (part, name, module)
        for name, module in model.named_modules()
        if not name.endswith(_NOT_FOR_VIDEO) and _owns_weights(module)
        for part in [part_of(name + ".weight", family)]
        if part is not None
    ]
    modules.sort(key=lambda entry: (PARTS.index(entry[0]), entry[2] is head))
    recomputed = _but_the_last([name for _, name, _ in modules])
    reached = False  # something before is trained, so gradients reach this place
    for _, found in groupby(modules, key=lambda entry: _block_of(entry[1])):
        block = list(found)
        trained = any(p.requires_grad for _, _, module in block for p in module.parameters(recurse=False))
        for part, name, module in block:
            count = tokens.supervised if module is head else tokens.of_part[part]
            again = checkpointing and (reached or trained) and name in recomputed
            behind_adapter = ".lora_B." in name
            for flops, weight in _matrices(module, name, count, plain.config):
                passes = 1 + again + (reached or behind_adapter) + weight.requires_grad
                yield Product(part, name, flops, weight.numel() * weight.element_size(), passes)
            for flops in _without_weights(module, name, tokens.pairs[part], count, plain.config):
                yield Product(part, name, flops, 0, 1 + again + 2 * (reached or trained))
        reached = reached or trained


def _owns_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _but_the_last(names: Sequence[str]) -> set[str]:
    """Those of layers, without the last one of each layer with a matrix: nothing needs its output again."""
    layers: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        if found and "norm" not in name.rpartition(".")[2]:
            layers.setdefault(found[0], []).append(name)
    return {name for of_layer in layers.values() for name in of_layer[:-1]}


def _block_of(name: str) -> str:
    """Modules that read one input together: a layer with its adapters, and the three projections of attention."""
    name = name.partition(".base_layer")[0].partition(".lora_")[0]
    parent, _, last = name.rpartition(".")
    return parent if last in _SIDE_BY_SIDE else name


def _matrices(module: nn.Module, name: str, count: int, config: Any) -> Iterator[tuple[float, Tensor]]:
    """Forward operations of `count` tokens for each of a module's own matrices."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d):
        yield 2.0 * module.weight.numel() * count, module.weight
    elif name.endswith((".gate", ".experts")):
        text = config.get_text_config()
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1:
                used = text.num_experts_per_tok / len(weight) if weight.dim() == 3 else 1
                yield 2.0 * weight.numel() * count * used, weight


def _without_weights(module: nn.Module, name: str, pairs: float, count: int, config: Any) -> Iterator[float]:
    """Forward operations of attention and of recurrences, found by the layer that stands before each."""
    layer = name.removesuffix(".base_layer")
    if isinstance(module, nn.Linear) and layer.endswith(".q_proj"):
        yield 4.0 * module.out_features * pairs
    elif isinstance(module, nn.Linear) and layer.endswith(".qkv"):
        yield 4.0 * module.out_features / 3 * pairs
    elif isinstance(module, nn.Linear) and layer.endswith(".mixer.in_proj"):
        text = config.get_text_config()
        yield 4.0 * text.mamba_num_heads * text.mamba_head_dim * text.ssm_state_size * count
