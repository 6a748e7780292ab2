"""What a step minimises: losses of supervised tokens, which passes it makes, and the KL to a dense teacher.

All passes of a step run over one encoding of its media (`prune.EvsHook`) and have the same supervised tokens in the
same order, so logits of two passes can be compared token by token. docs/objectives.md has the formulas.

Invariant: sums over supervised tokens only; the trainer divides by their number over all ranks and micro-batches. Cost:
one float32 copy of the logits (S, V) of each pass and its gradient; for the KL two more.
This module does not run a model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train.config import ObjectiveSection
from evs_train.data.template import IGNORE_INDEX
from evs_train.rates import Rates
from evs_train.samplers import Fixed


def further_rates(objective: ObjectiveSection, rates: Rates) -> tuple[Rates, ...]:
    """Rates of the passes beside the drawn one, under the same cap."""
    return tuple(dataclasses.replace(rates, sampler=Fixed(rate)) for rate in objective.further_passes.values())


def supervised_places(labels: Tensor, num_supervised: int) -> tuple[Tensor, Tensor]:
    """Where the supervised tokens of a batch are predicted.

    Found by a sort rather than a boolean mask: their number is known on the host, so nothing waits for the device.

    Args:
        labels: (B, L) int64 of the pruned batch.
        num_supervised: how many of them are not `IGNORE_INDEX`.

    Returns:
        (S,) int64 places in B * L whose logits predict them, in reading order, and (S,) the tokens.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()  # of the token that each place predicts
    places = torch.argsort((targets == IGNORE_INDEX).int(), stable=True)[:num_supervised]
    return places, targets[places]


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(S,) float32 losses of S supervised tokens; logits (S, V).

    Taken in float32 whatever the model's dtype, as transformers does (read: `ForCausalLMLoss`).
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def teacher_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) summed over tokens, a float32 scalar; logits (S, V) each.

    The factor keeps the gradient's size independent of the temperature (Hinton, Vinyals and Dean, arXiv 1503.02531,
    section 2).
    """
    expected = F.log_softmax(teacher.float() / temperature, dim=-1)
    found = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(found, expected, reduction="sum", log_target=True) * temperature**2
