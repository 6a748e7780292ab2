"""What a training step holds beside weights and optimizer: counted from the shapes of a model's modules.

Autograd keeps what the backward pass reads again. Of the layers of transformers 5.23 that is, for each token (counted
with torch's hooks on saved tensors: tests/test_activations.py):
- norms: the input in float32; of an RMS norm whose weight is trained also what that multiplies;
- matrices that are trained or have an adapter: the input. Those that read the same share it, unless autocast or
  dropout makes a copy for each of them;
- attention: queries, keys and values as its kernel takes them, and its output. Where one matrix makes all three, its
  output stays beside the queries and keys that were turned, since the values are a part of it;
- an MLP: the outputs of its first matrices, of a gated one the activation, and what a trained last one reads;
- routed experts: the same for each expert that a token is sent to, and what they return;
- recurrent layers: the outputs of their matrices, as with fused kernels. The plain paths keep several times that;
- where autocast makes bfloat16 copies of float32 weights: those.
A layer that recomputes keeps its input alone, and all of this while its gradient is found. Where nothing is trained up
to a layer it keeps nothing, and takes memory only while it runs.

Counted too often: pixels in float32 of a tower that is trained, where a family hands them on without a copy (Qwen).
Left out: tensors of a few numbers a token (factors of norms, indices, sums of softmax), attention masks, and what a
part does outside of its matrices and norms. Cost: one walk over the modules. Optimizer and GPUs are in `memory.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from evs_train.config import PARTS, Part, Recipe
from evs_train.models.base import Family
from evs_train.models.tuning import part_of

_LAYER = re.compile(r".*?\.(?:layers|layer|blocks)\.\d+\.")
_ENDS = ("o_proj", "out_proj", "proj", "projection_layer", "down_proj", "fc2", "linear_fc2", "linear_2", "2", "3")
"""Names of the matrix that ends an attention, an MLP or a projector."""
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_MATRICES = (nn.Linear, LoraLayer, *_CONVOLUTIONS)
_FLOAT = 4


@dataclass(frozen=True)
class Layer:
    """One layer, or what a part has before or behind its layers. Bytes for one token, unless it says otherwise.

    Attributes:
        recomputes: it keeps its input alone.
        input: what goes into it.
        kept: for the backward pass, where it does not recompute.
        running: the most that one of its modules reads and makes.
        working: beside what is kept, while gradients are found.
        made: what it returns.
        casts: of weights that autocast has copied; in all.
        trained: number of trained parameters.
    """

    part: Part
    recomputes: bool
    input: float
    kept: float
    running: float
    working: float
    made: float
    casts: float
    trained: int


def pixels_of_patch(model: nn.Module, family: Family) -> int:
    """Numbers that the processor gives for each patch: what the widest of the tower's first matrices reads."""
    plain = _plain(model)
    first = (p for n, p in plain.named_parameters() if part_of(n, family) == "vision" and "patch" in n and p.ndim > 1)
    return max((parameter[0].numel() for parameter in first), default=0)


def layers_of(model: nn.Module, family: Family, recipe: Recipe) -> list[Layer]:
    """The layers of a model as it is trained (meta tensors will do), in the order of the forward pass."""
    groups: dict[tuple[int, str], list[nn.Module]] = {}
    with_layers: set[Part] = set()
    for name, module in _outside_of_adapters("", _plain(model)):
        contents = [*_norms(module), *_matrices(module), *(own for own, _ in module.named_parameters(recurse=False))]
        path = f"{name}{contents[0]}." if contents else ""
        part = part_of(path, family) if contents else None
        if part is None:
            continue
        found = None if part == "projector" else _LAYER.match(path)
        if found is not None:
            with_layers.add(part)
        place = found[0] if found is not None else "behind" if part in with_layers else ""
        groups.setdefault((PARTS.index(part), place), []).append(module)
    counting = _Counting(_plain(model), family, recipe)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    # From the last one, since a matrix that embeds and predicts has its gradient from where it predicts.
    return [counting.layer(PARTS[part], place, modules) for (part, place), modules in ordered[::-1]][::-1]


class _Counting:
    """Counts what the modules of one layer after the other keep."""

    def __init__(self, plain: Any, family: Family, recipe: Recipe) -> None:
        halves = recipe.model.dtype == "bfloat16"
        self.full = recipe.tuning.method == "full"
        self.autocast = halves and recipe.deepspeed is None
        self.number = 2 if halves else _FLOAT  # bytes of one where matrices are multiplied,
        self.stream = _FLOAT if self.autocast and self.full else self.number  # and between layers
        self.drops = recipe.tuning.lora.dropout > 0
        checkpointing = recipe.train.gradient_checkpointing
        self.recomputing: Sequence[Part] = PARTS if checkpointing is True else checkpointing or ()
        self.head = family.output_embeddings(plain)
        self.text = family.config.get_text_config()
        self._counted: set[nn.Parameter] = set()

    def layer(self, part: Part, place: str, modules: Sequence[nn.Module]) -> Layer:
        """What `modules` keep, which are all of one layer, or of what a part has outside of its layers."""
        mixers = [
            _Mixer({n: one for n, one in _matrices(module).items() if one is not self.head}) for module in modules
        ]
        width = next((_reads(one) for mixer in mixers for one in mixer.matrices.values()), 0)
        kept = sum(self._of_mixer(mixer) for mixer in mixers)
        least = width if part == "projector" else 0  # its norm may be of patches, of which its matrix reads several
        for module, mixer in zip(modules, mixers, strict=True):
            kept += self._of_vectors(module, mixer, least) + self._of_experts(module)
        own = {p for module in modules for one in (module, *_leaves(module)) for p in _own(one)}
        cast = sum(p.numel() for p in own if p.ndim > 1 and (self.full or p.requires_grad))
        new = own - self._counted
        self._counted |= own
        in_layers = _LAYER.match(place) is not None
        return Layer(
            part,
            recomputes=in_layers and part in self.recomputing,
            input=self.stream * width if in_layers else 0,
            kept=kept,
            running=self.number * max(mixer.running for mixer in mixers),
            working=self.number * max(mixer.working for mixer in mixers),
            made=self.number * sum(mixer.returned for mixer in mixers),
            casts=2 * cast if self.autocast else 0,
            trained=sum(p.numel() for p in new if p.requires_grad),
        )

    def _of_mixer(self, mixer: _Mixer) -> float:
        trained = [one for one in mixer.firsts if _trains(one)]
        copied = [one for one in trained if self._copies(one)]
        inputs = sum({_reads(one) for one in trained} if not copied else map(_reads, copied))
        end_trains = mixer.end is not None and _trains(mixer.end)
        if mixer.joins:
            of_end = mixer.read * (1 + end_trains)
        elif mixer.has_kernel:
            of_end = mixer.read * (1 + (isinstance(mixer.end, LoraLayer) and self._copies(mixer.end)))
        else:
            of_end = mixer.read * end_trains
        beside = sum(self.number * one.r["default"] + self.drops * _reads(one) for one in mixer.adapters)
        return float(self.number * (mixer.made + inputs + of_end) + beside)

    def _copies(self, matrix: nn.Module) -> bool:
        """Whether a matrix reads a copy of its own."""
        return self.autocast or self.drops if isinstance(matrix, LoraLayer) else self.stream != self.number

    def _of_vectors(self, module: nn.Module, mixer: _Mixer, least: int) -> float:
        """Of the norms in a module, and of what scales its outputs."""
        kept = 0.0
        for name, norm in _norms(module).items():
            of_heads = {"q_norm": mixer.read, "k_norm": mixer.keys}.get(name, 0)
            width = max(norm.weight.numel(), least, of_heads)
            scaled = 0 if isinstance(norm, nn.LayerNorm) else self.number if of_heads else self.stream
            kept += width * (_FLOAT + scaled * _trains(norm))
        scales = [p for name, p in module.named_parameters(recurse=False) if p.ndim == 1 and name != "weight"]
        return kept + self.number * sum(p.numel() for p in scales if p.requires_grad)

    def _of_experts(self, module: nn.Module) -> float:
        """Of routed experts, whose matrices are one tensor (experts, width, width) each."""
        stacked = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if "down_proj" not in stacked:
            return 0.0
        down = stacked.pop("down_proj")
        width = down[0].numel() // self.text.hidden_size
        gates = sum(p.numel() for p in stacked.values()) // down.numel() - 1
        trains = down.requires_grad
        kept = self.text.hidden_size * (1 + trains) + width * (1 + 2 * gates + trains)
        return self.number * float(self.text.num_experts_per_tok * kept)


class _Mixer:
    """An attention, a recurrence, an MLP or a projector, by its matrices. Numbers are for one token.

    Attributes:
        end: the matrix that ends it; `firsts` are the others.
        read: what `end` reads.
        made: what the others make: outputs, of a gated MLP also the activation, of a `joins` what is turned.
        returned: by `end`.
        keys: width of the keys, where a matrix of their own makes them.
        joins: it makes queries, keys and values in one matrix, and joins the outputs of units that were seen apart.
        has_kernel: the input of `end` is what a kernel returns and keeps.
        running: what it reads and makes.
        working: gradients of the two widest tensors of an MLP, and what adapters add to one.
    """

    def __init__(self, matrices: Mapping[str, Any]) -> None:
        self.matrices = matrices
        self.end = next((one for name, one in reversed(list(matrices.items())) if name in _ENDS), None)
        self.firsts = [one for one in matrices.values() if one is not self.end]
        self.adapters = [one for one in matrices.values() if isinstance(one, LoraLayer)]
        self.read, self.returned = (0, 0) if self.end is None else (_reads(self.end), _makes(self.end))
        self.keys = _makes(matrices["k_proj"]) if "k_proj" in matrices else 0
        self.joins = "qkv" in matrices
        self.has_kernel = self.joins or any("q_proj" in name or "in_proj" in name for name in matrices)
        self.made = sum(map(_makes, self.firsts))
        if self.joins:
            self.made += self.made * 2 // 3
        elif "gate_proj" in matrices or "gate_up_proj" in matrices:
            self.made += self.read
        reads = max(map(_reads, self.firsts), default=0)
        self.running = reads + self.made + self.read * (1 + self.joins) + self.returned
        self.working = self.read * (3 if self.adapters else 2)


def _reads(matrix: Any) -> int:
    """Numbers that a matrix reads for each row that it makes."""
    return int(matrix.weight[0].numel()) if isinstance(matrix, _CONVOLUTIONS) else int(matrix.in_features)


def _makes(matrix: Any) -> int:
    """Numbers of a row that it makes, but for those that the next matrix is counted by."""
    return 0 if isinstance(matrix, _CONVOLUTIONS) else int(matrix.out_features)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Of a matrix or a norm all parameters, of another module those that no module in it has."""
    return module.parameters(recurse=isinstance(module, _MATRICES))


def _matrices(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_children() if isinstance(child, _MATRICES)}


def _norms(module: nn.Module) -> dict[str, Any]:
    return {
        name: child
        for name, child in module.named_children()
        if not isinstance(child, _MATRICES)
        and any(own == "weight" and p.ndim == 1 for own, p in child.named_parameters(recurse=False))
    }


def _leaves(module: nn.Module) -> list[Any]:
    return [*_matrices(module).values(), *_norms(module).values()]


def _outside_of_adapters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but matrices and norms, with the beginning of their contents' names."""
    yield name, module
    leaves = _leaves(module)
    for child_name, child in module.named_children():
        if not any(child is leaf for leaf in leaves):
            yield from _outside_of_adapters(f"{name}{child_name}.", child)


def _plain(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
