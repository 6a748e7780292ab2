"""Device half of pruning: a forward pre-hook that encodes a batch's media, has tokens chosen, and shortens the batch.

It runs on the model that the trainer was given, inside forward, hence inside DDP, DeepSpeed and FSDP, and leaves the
model's class, `state_dict` and `save_pretrained` alone. Ids, labels, positions and features are moved together by one
index, into the shapes that the host half planned (`collate.py`). The output layer is handed the hidden states that
predict supervised tokens, and no others: with a large vocabulary, logits are the largest tensor of a step.

Invariants: the number of supervised tokens never changes; at rate 0 the batch is the unpruned one; attention is always
told where rows begin and end (`_attention`), since without it transformers takes the position gaps that pruning leaves
for document boundaries; selection and compaction have fixed shapes and no host-device synchronisation (the encoders of
transformers have theirs; under ZeRO-3 `_num_calls` adds one).
Cost: a sort of the retained indices and one gather per tensor; a packed batch outside flash attention needs a mask of
its length squared.
This module does not decode, tokenize or compute a loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from evs_train.collate import BatchPlan, PlannedItem
from evs_train.data.chat import Kind, Media, MediaItem
from evs_train.data.template import IGNORE_INDEX
from evs_train.encoder_cache import EncoderCache
from evs_train.models.base import Encoding, Family, Features
from evs_train.objectives import supervised_places
from evs_train.pruners.base import Choice, Pruner, Video
from evs_train.pruners.evs import EVS
from evs_train.timing import Stopwatch

KINDS: tuple[Kind, ...] = ("image", "video")
INPUTS = ("input_ids", "labels", "media", "plan", "index", "position_ids", "sequential_ids", "further", "changes")


def compact(batch: dict[str, Any], choices: Sequence[Choice], pad_token_id: int) -> dict[str, Tensor]:
    """Move ids, labels and positions of the retained tokens together.

    Args:
        batch: a batch of `Collator`, on the device.
        choices: of each video of the batch.

    Returns:
        `input_ids`, `labels`, `documents` of shape `plan.shape`, int64; `documents` is the row that a token comes from,
        -1 where there is padding or a token that attention does not see. Where the batch has positions, `position_ids`
        (P, *plan.shape), or plan.shape if P is 1.
    """
    plan: BatchPlan = batch["plan"]
    index: dict[str, Tensor] = batch["index"]
    of_videos = index["video"].split([planned.item.num_tokens for planned in plan.videos])
    kept = [places[choice.index] for places, choice in zip(of_videos, choices, strict=True)]
    source = torch.cat([index["always"], *kept]).sort().values  # (sum of retained lengths,)

    def moved(values: Tensor, fill: int) -> Tensor:  # (..., B, L) -> (..., *plan.shape)
        kept: Tensor = values.flatten(-2).index_select(-1, source)
        if kept.shape[-1] < plan.shape[0] * plan.shape[1]:  # there is padding
            flat = values.new_full((*kept.shape[:-1], plan.shape[0] * plan.shape[1]), fill)
            kept = flat.index_copy(-1, index["target"], kept)
        return kept.view(*kept.shape[:-1], *plan.shape)

    ids: Tensor = batch["input_ids"]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    for places, choice in zip(kept, choices, strict=True):
        if choice.seen is not None:
            flat = rows.flatten()
            rows = flat.index_copy(0, places, flat[places].where(choice.seen, -1)).view_as(rows)
    out = {
        "input_ids": moved(ids, pad_token_id),
        "labels": moved(batch["labels"], IGNORE_INDEX),
        "documents": moved(rows, -1),
    }
    if "sequential_ids" in batch:
        out["position_ids"] = batch["sequential_ids"]
    elif "position_ids" in batch:
        positions = moved(batch["position_ids"], 0)
        out["position_ids"] = positions if len(positions) > 1 else positions[0]
    return out


@dataclass(frozen=True)
class Pass:
    """What a further pass over a batch's encoding gave: its plan, and the outputs of the model, logits (1, S, V)."""

    plan: BatchPlan
    outputs: Any


@dataclass
class EvsHook:
    """Device half: a forward pre-hook that prunes a batch of `Collator` on its way into the model.

    The model is given no labels and returns no loss: its logits (1, S, V) are those that predict the batch's S
    supervised tokens, in reading order (`targets`).
    A forward call without a `plan` (generation, plain evaluation) passes through untouched.
    Further passes of a batch run first, inside the same call of whatever wraps the module: DDP copies buffers at each
    of its own calls, over what an earlier pass has saved for backward.

    Attributes:
        model: the plain transformers model inside whatever wraps it.
        pruner: says which tokens stay; the batch must have been planned with it.
        engine_score: score what serving scores for the family, rather than the pooled embeddings alone.
        float32_score: upcast before scoring. Serving does not.
        encoder_trains: the vision tower or projector has trainable parameters. In training every rank then encodes
            at least one medium (a blank one, of which nothing is kept), or its gradients would be missing elsewhere.
        equal_calls: all ranks must call the tower equally often, as ZeRO-3 needs: its modules gather their weights by
            collectives.
        teacher: the further pass is a teacher: without gradient and dropout.
        cache: encodes media instead, where the vision tower is frozen and what it says is kept.
        autocast: makes the mixed-precision context that the forward runs in.
        targets: (S,) supervised tokens of the last batch, the same in all its passes.
        passes: what the further passes of the last batch gave, in its order.
        hidden: number of kept tokens of the last batch that attention does not see; None where the pruner hides none.
        kept: (planned video, (K,) places that are kept and seen) of every video whose plan carries frames, until
            somebody clears it.
    """

    family: Family
    model: PreTrainedModel
    pruner: Pruner = EVS
    engine_score: bool = True
    float32_score: bool = False
    encoder_trains: bool = False
    equal_calls: bool = False
    teacher: bool = False
    cache: EncoderCache | None = None
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    passes: list[Pass] = field(default_factory=list)
    hidden: Tensor | None = None
    kept: list[tuple[PlannedItem, Tensor]] = field(default_factory=list)

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Register on `module`, the outermost one that the trainer is given (a PEFT model bypasses inner hooks)."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if "plan" not in kwargs:
            return None
        batch: dict[str, Any] = {key: kwargs.pop(key) for key in INPUTS if key in kwargs}
        encoding = self._encode(batch["media"], module.training)
        further = self._teacher_pass if self.teacher else self._further_pass
        self.passes = []
        for of_pass in batch.pop("further", ()):
            self.passes.append(further(module, {**batch, **of_pass}, encoding, kwargs))
        return args, self._for_training(batch, encoding, kwargs)

    def prune(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the plain model's forward, labels included, for a batch of `Collator` (on the device)."""
        return self._pruned(batch, self._encode(batch["media"], self.model.training), {})

    def _further_pass(
        self, module: nn.Module, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]
    ) -> Pass:
        inputs = self._for_training(batch, encoding, others)
        with self.stopwatch.section("further_passes"):
            # Not module(...): frameworks' hooks on the outermost module stand for the whole call, which has begun.
            return Pass(batch["plan"], module.forward(**inputs))

    def _teacher_pass(
        self, module: nn.Module, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]
    ) -> Pass:
        with torch.no_grad(), _without_dropout(module):
            return self._further_pass(module, batch, encoding, others)

    def _for_training(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward whose logits predict supervised tokens only, by a hook on the output layer.

        The hook is for one call of that layer. Not every family's forward takes `logits_to_keep`.
        """
        inputs = self._pruned(batch, encoding, others)
        places, self.targets = supervised_places(inputs.pop("labels"), sum(batch["plan"].num_supervised))

        def gather(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            handle.remove()
            return (args[0].flatten(0, 1).index_select(0, places)[None],)  # (B, L', D) -> (1, S, D)

        handle = self.family.output_embeddings(self.model).register_forward_pre_hook(gather)
        return inputs

    def _pruned(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        plan: BatchPlan = batch["plan"]
        encoded, blanks = encoding
        with self.autocast(), self.stopwatch.section("pruning"):
            changes = batch["changes"] if self.pruner.needs_changes else [None] * len(plan.videos)
            choices = [
                self._choose(planned, features, change)
                for planned, features, change in zip(plan.videos, encoded["video"], changes, strict=True)
            ]
            remaining: dict[Kind, Any] = {
                "image": iter(encoded["image"]),
                "video": iter(
                    [
                        _retained(features, choice, planned.item.num_tokens)
                        for planned, features, choice in zip(plan.videos, encoded["video"], choices, strict=True)
                    ]
                ),
            }
            features = [(planned.item.kind, next(remaining[planned.item.kind])) for planned in plan.items]
            pruned = compact(batch, choices, self.family.pad_token_id)
        attention = self._attention(plan, batch["index"]["boundaries"], pruned.pop("documents"))
        if self.pruner.hides:
            hidden = [(~choice.seen).sum() for choice in choices if choice.seen is not None]
            self.hidden = sum(hidden, start=batch["index"]["always"].new_zeros(()))
        self.kept += [(p, c.visible) for p, c in zip(plan.videos, choices, strict=True) if p.frames is not None]
        with self.autocast():
            return self.family.forward_inputs(self.model, {**others, **pruned, **attention}, features + blanks)

    def _choose(self, planned: PlannedItem, features: Features, change: Tensor | None = None) -> Choice:
        video = Video(self.scored(planned.item, features).detach(), planned.seed, change)
        return self.pruner.choose(video, planned.pruning_rate)

    def scored(self, item: MediaItem, features: Features) -> Tensor:
        """(T, N, D) what decides which tokens of a video are kept, in the dtype of the scores."""
        scored = self.family.score_tensor(features) if self.engine_score else features[0]
        device = scored.device.type
        if self.float32_score:
            scored = scored.float()
        elif torch.is_autocast_enabled(device):  # joined to a float32 weight, as LLaVA's newline, features are float32
            scored = scored.to(torch.get_autocast_dtype(device))
        return scored[: item.num_tokens].view(item.num_units, item.tokens_per_unit, -1)

    def _attention(self, plan: BatchPlan, boundaries: Tensor, documents: Tensor) -> dict[str, Any]:
        """What attention is told: a mask of padding, or for packed rows of the borders between them.

        Flash attention is given the borders of a single sequence, packed or not: transformers drops a mask of ones and
        would then look for documents in the positions.
        """
        attention = self.model.config.get_text_config()._attn_implementation
        if plan.shape[0] == 1 and "flash" in attention and self.family.attention_only:
            longest = max(plan.num_tokens)
            borders = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            return {**borders, "max_length_q": longest, "max_length_k": longest, "attention_mask": None}
        if not plan.packed:
            return {"attention_mask": (documents >= 0).long()}
        visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()  # (1, 1, L', L')
        if attention == "sdpa":
            return {"attention_mask": visible}
        least = torch.finfo(self.model.dtype).min
        return {"attention_mask": torch.zeros_like(visible, dtype=self.model.dtype).masked_fill(~visible, least)}

    def _encode(self, media: Media, training: bool) -> Encoding:
        """Encode all media; also run the tower on blanks as often as `_num_calls` asks, of which nothing is kept."""
        with self.autocast(), self.stopwatch.section("encoder"):
            return self._run_encoder(media, training)

    def _run_encoder(self, media: Media, training: bool) -> Encoding:
        if self.cache is not None:
            return self.cache.encode(media, training)
        encoded: dict[Kind, list[Features]] = {"image": [], "video": []}
        blanks: list[tuple[Kind, Features]] = []
        calls = {kind: self.family.num_encoder_calls(media, kind) for kind in KINDS}
        wanted = self._num_calls(calls) if training else calls
        for kind in KINDS:
            if calls[kind]:
                encoded[kind] = self.family.encode(self.model, media, kind)
            for _ in range(wanted[kind] - calls[kind]):
                device = next(self.model.parameters()).device
                blank = to_device(self.family.blank(kind), device)
                # A slice of length 0 adds no token, and its backward gives the tower exact zeros.
                blanks += [(kind, [layer[:0] for layer in one]) for one in self.family.encode(self.model, blank, kind)]
        return encoded, blanks

    def _num_calls(self, calls: dict[Kind, int]) -> dict[Kind, int]:
        wanted = dict(calls)
        if self.equal_calls:
            counts = torch.tensor([calls[kind] for kind in KINDS], device=next(self.model.parameters()).device)
            torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
            wanted = dict(zip(KINDS, counts.tolist(), strict=True))
        if self.encoder_trains:
            if not self.family.shares_encoder:
                wanted = {kind: max(1, count) for kind, count in wanted.items()}
            elif not any(wanted.values()):
                wanted["video"] = 1
        return wanted


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Switch off its dropout layers; all else stays in training mode, for which layers may have other kernels."""
    active = [layer for layer in module.modules() if isinstance(layer, nn.Dropout) and layer.training]
    for layer in active:
        layer.eval()
    try:
        yield
    finally:
        for layer in active:
            layer.train()


def _retained(features: Features, choice: Choice, num_tokens: int) -> Features:
    """What each layer says of the kept tokens, and all rows that stand behind the video's own tokens."""
    return [
        choice.merged(layer)
        if len(layer) == num_tokens
        else torch.cat([choice.merged(layer[:num_tokens]), layer[num_tokens:]])
        for layer in features
    ]


def to_device(values: Any, device: torch.device) -> Any:
    """Tensors in nested dictionaries and lists moved to `device`; anything else as it is."""
    if isinstance(values, Tensor):
        # On the way to a GPU a copy is staged before the call returns; on the way back the host must wait for it.
        return values.to(device, non_blocking=device.type != "cpu")
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    return [to_device(value, device) for value in values] if isinstance(values, list) else values
