"""Answers of a checkpoint to all held-out questions at every rate, by the likelihood of the choices.

The facts of a clip are independent, so all its questions are scored in one forward over its caption: at the place of a
fact, the choice of highest probability is the answer, behind the name of the fact that is asked for and the true
answers to those before. Each choice is one token. Videos are encoded once for all rates.

Invariant: rates are applied as serving does, not capped. Cost: a forward over the retained tokens for each clip and
rate; at 400 clips and 9 rates half a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.proof import world
from benchmarks.proof.runs import ExampleCache
from evs_train import evs
from evs_train.collate import Collator
from evs_train.data.batches import Examples
from evs_train.data.chat import Example
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import DataError
from evs_train.generation import EncodedHook
from evs_train.models.base import Family
from evs_train.prune import KINDS, to_device
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS
from evs_train.rates import Rates
from evs_train.samplers import build_sampler

BATCH = 32


@dataclass(frozen=True)
class Slots:
    """Where the choices stand among a row's supervised tokens, by fact in the order of `world.FACTS`."""

    places: Tensor  # (facts,) int64
    tokens: Tensor  # (facts,) int64, the right choices


@torch.inference_mode()
def answers(
    family: Family, model: PreTrainedModel, rows: ExampleCache, rates: Sequence[float], pruner: Pruner = EVS
) -> dict[str, list[str]]:
    """For each rate, for each row, one character a question (in the order of `world.FACTS`): 1 if it is right."""
    model.eval()
    choices = choice_tokens(family)
    hook = EncodedHook(family, model, pruner)
    found: dict[str, list[str]] = {f"{rate:g}": [] for rate in rates}
    for start in range(0, len(rows), BATCH):
        examples = [rows.read(number) for number in range(start, min(start + BATCH, len(rows)))]
        slots = [slots_of(family, example, choices) for example in examples]
        media = to_device(family.merge_media([example.media for example in examples]), model.device)
        hook.encoded = {
            kind: family.encode(model, media, kind) if family.num_encoder_calls(media, kind) else [] for kind in KINDS
        }
        for rate in rates:
            collator = Collator(
                Rates(build_sampler(rate), cap=False), family.pad_token_id, lambda media: {}, pruner=pruner
            )
            inputs = hook.prune(to_device(collator([Examples(0, list(examples))]), model.device))
            labels = inputs.pop("labels").cpu()
            logits = model(**inputs, use_cache=False).logits.cpu()  # (B, L', V)
            found[f"{rate:g}"] += [_verdicts(logits[row], labels[row], slot, choices) for row, slot in enumerate(slots)]
    return found


def choice_tokens(family: Family) -> list[Tensor]:
    """For each question the token ids of its choices.

    Raises:
        DataError: a choice is not one token.
    """
    tokenizer = family.processor.tokenizer
    found = []
    for name, choices in world.FACTS.items():
        ids = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in choices]
        if any(len(one) != 1 for one in ids):
            raise DataError(
                f"{name}: of {', '.join(choices)} some are more than one token", "say texts() to the builder"
            )
        found.append(torch.tensor([one[0] for one in ids]))
    return found


def slots_of(family: Family, example: Example, choices: Sequence[Tensor]) -> Slots:
    """Where the facts of a row are told. Raises DataError where its caption does not tell each of them once."""
    supervised = example.labels[example.labels != IGNORE_INDEX]
    told = family.processor.tokenizer.decode(supervised, skip_special_tokens=True).strip()
    order = list(world.parse_caption(told))
    places = torch.nonzero(torch.isin(supervised, torch.cat(list(choices))))[:, 0]
    if sorted(order) != sorted(world.FACTS) or len(places) != len(order):
        raise DataError(f"{example.sample_id}: the caption {told!r} does not tell each fact once")
    back = torch.tensor([order.index(name) for name in world.FACTS])
    return Slots(places[back], supervised[places[back]])


def _verdicts(logits: Tensor, labels: Tensor, slots: Slots, choices: Sequence[Tensor]) -> str:
    positions = torch.nonzero(labels != IGNORE_INDEX)[:, 0][slots.places]  # supervised tokens keep their order
    said = [ids[logits[place - 1, ids].argmax()] for place, ids in zip(positions, choices, strict=True)]
    return "".join(str(int(one == right)) for one, right in zip(said, slots.tokens, strict=True))


def only_first_unit(rate: float, tokens_per_unit: int) -> bool:
    """Whether nothing but the first unit is left of the world's clips."""
    return evs.retained_tokens(world.NUM_UNITS, tokens_per_unit, rate) == tokens_per_unit
