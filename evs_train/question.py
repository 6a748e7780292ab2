"""PruneVid's part two (arXiv 2412.16117): behind a layer of the language model only the video tokens that the question
looks at go on. For generation and evaluation, one prompt at a time.

A token's score is the attention that the question's tokens pay it in that layer, the largest of all heads and tokens,
taken as the published code is described to do it: queries and keys before rotation, softmax in float32 over the whole
prompt, no causal mask. The highest scores of the whole prompt stay, as the paper's formula has it (its code
takes a share of each group). The rest is cut out of the hidden states, so of the later layers' caches, and out of the
caches of the earlier layers. Positions keep their gaps, and new tokens are numbered on from the prompt's last one.

It hangs on hooks of the model's own layers and follows whatever calls the model, transformers' `generate` included.

Invariant: keeping all changes nothing; dropping a token equals masking it, in the layers behind for the prompt and in
all layers for what is generated. Cost: heads x question x prompt numbers once; the earlier layers run on all tokens.
Not here: training, flash attention, recurrent layers, several prompts in one batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from evs_train.errors import RecipeError
from evs_train.models.base import Family
from evs_train.pruners.base import Selection, highest

ATTENTION = {
    "qwen2": ("q_proj", "k_proj"),
    "qwen2_5_vl_text": ("q_proj", "k_proj"),
    "qwen3_vl_text": ("q_norm", "k_norm"),
    "qwen3_vl_moe_text": ("q_norm", "k_norm"),
}
"""Of each text model that is known here, the modules of its attention that say queries and keys, before rotation."""


@dataclass(frozen=True)
class Asked:
    """Where a pruned prompt has its video and its question.

    Attributes:
        video: (V,) int64 places of its video tokens, ascending.
        question: (Q,) int64 places of the text behind the last video.
        length: tokens of the prompt.
    """

    video: Tensor
    question: Tensor
    length: int


def check_selection(selection: Selection, family: Family) -> None:
    """Raise RecipeError where the language model is not one that can be cut, or not behind that layer."""
    config = family.config.get_text_config()
    if config.model_type not in ATTENTION:
        raise RecipeError(
            f"evs.method.alpha: not with {family.model_type}, whose language model is {config.model_type}",
            f"known: {', '.join(ATTENTION)}",
        )
    if "sliding_attention" in (config.to_dict().get("layer_types") or ()):
        raise RecipeError("evs.method.alpha: not with layers whose attention slides", "leave alpha out")
    layer, depth = selection.layer(config.num_hidden_layers), config.num_hidden_layers
    deepstack = len(family.config.vision_config.to_dict().get("deepstack_visual_indexes") or ())
    if not deepstack <= layer + 1 < depth:
        least = max(deepstack - 1, 0)
        raise RecipeError(
            f"evs.method.layer: tokens cannot be dropped behind layer {layer} of {depth} (counted from 0)",
            f"name a share that gives one from {least} to {depth - 2}: layer={least}/{depth} or more",
        )


@contextlib.contextmanager
def selecting(model: PreTrainedModel, selection: Selection, asked: Asked) -> Iterator[None]:
    """Within, a call of the model on the prompt drops video tokens behind a layer; decoding goes on from there."""
    decoder = model.get_decoder()
    layers: Any = decoder.layers
    number = selection.layer(len(layers))
    cut = _Cut(selection, asked, number)
    names = ATTENTION[decoder.config.model_type]
    handles = [layers[number].self_attn.get_submodule(name).register_forward_hook(cut.listen) for name in names]
    handles.append(layers[number + 1].register_forward_pre_hook(cut.drop, with_kwargs=True))
    handles += [layer.register_forward_pre_hook(cut.follow, with_kwargs=True) for layer in layers[number + 2 :]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Cut:
    """The hooks. `heard` are queries and keys of the layer, `kept` the places that go on from a call on the prompt."""

    selection: Selection
    asked: Asked
    number: int
    heard: list[Tensor] = field(default_factory=list)
    kept: Tensor | None = None

    def listen(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.heard.append(output)

    def drop(self, layer: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], Any] | None:
        (hidden,), heard = args, self.heard
        self.kept, self.heard = None, []
        if hidden.shape[1] < self.asked.length:  # a step of decoding
            return None
        queries, keys = (one[0].view(hidden.shape[1], -1, layer.self_attn.head_dim) for one in heard)
        self.kept = self._places(attention_paid(queries, keys, self.asked), hidden.shape[1])
        if kwargs["past_key_values"] is not None:
            for before in kwargs["past_key_values"].layers[: self.number + 1]:
                if type(before) is not DynamicLayer:
                    raise RecipeError("evs.method.alpha: needs a cache that grows", "leave cache_implementation out")
                before.keys, before.values = (one.index_select(2, self.kept) for one in (before.keys, before.values))
        return (hidden[:, self.kept],), self._shorter(kwargs, self.kept)

    def follow(self, layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        return None if self.kept is None else (args, self._shorter(kwargs, self.kept))

    def _places(self, paid: Tensor, length: int) -> Tensor:
        """(L',) places that go on, ascending, of `length` tokens with attention `paid` (V,) to those of the video."""
        dropped = len(paid) - self.selection.num_selected(len(paid))
        scores = paid.new_full((length,), math.inf).index_copy(0, self.asked.video, paid)
        return highest(scores, length - dropped)

    def _shorter(self, kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
        cos, sin = kwargs["position_embeddings"]
        shorter = {**kwargs, "position_embeddings": (cos[:, kept], sin[:, kept])}
        if kwargs["position_ids"] is not None:
            shorter["position_ids"] = kwargs["position_ids"][:, kept]
        if kwargs["attention_mask"] is not None:  # (B, 1, L, L)
            shorter["attention_mask"] = kwargs["attention_mask"][:, :, kept][..., kept]
        return shorter


def attention_paid(queries: Tensor, keys: Tensor, asked: Asked) -> Tensor:
    """(V,) float32: the most that any head of any token of the question attends to each video token.

    Args:
        queries: (L, heads, head_dim), not rotated.
        keys: (L, fewer heads, head_dim), not rotated; each serves as many neighbouring heads.
    """
    asking, heads = queries[asked.question].float(), queries.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(heads, dim=1)
    products = torch.einsum("qhd,khd->hqk", asking, keys) * queries.shape[-1] ** -0.5
    paid: Tensor = products.softmax(-1).amax((0, 1))  # (L,)
    return paid[asked.video]
