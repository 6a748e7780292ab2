"""One question at one pruning rate: which choice is likeliest, or what the model says and whether it is right.

Choices are continued from the same pruned prompt: a choice's score is the sum of the log-probabilities of its tokens,
behind what all choices begin with. Where they then differ in one token (letters), one forward over the prompt scores
them all; else the prompt is continued by each choice in one batch, padded on the right, where no layer can see it.

Invariants: scores equal the log-softmax of plain forwards over each pruned row alone; media are encoded once for all
rates and choices. Cost: at each rate one forward of the retained tokens, times the choices where these are longer than
a token; a free answer costs a prefill and its tokens. Not here: rates, records, files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evs_train.data.chat import Example
from evs_train.data.template import IGNORE_INDEX, as_the_template_reads, assistant_turns
from evs_train.errors import DataError
from evs_train.evaluate.data import Question
from evs_train.generation import Encoded, PrunedModel

Match = Literal["exact", "contains"]


def continuations(model: PrunedModel, question: Question) -> list[list[int]]:
    """Token ids of each choice as the assistant's answer, as the chat template writes it.

    Of a choice that is a whole answer the end of the turn is part; of one that only begins an answer nothing behind it.

    Raises:
        DataError: the template does not say a choice as it is, or two choices have the same tokens.
    """
    sample, family = question.sample, model.family
    found = []
    for choice in question.choices:
        said = question.prefix + choice
        turn = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        answered = dataclasses.replace(sample, messages=(*sample.messages, turn))
        messages = as_the_template_reads(answered, family, model.template_kwargs, last_only=True)
        answer = assistant_turns(family, messages, model.template_kwargs, sample.source, last_only=True)[-1].answer
        place = answer.find(said)
        if place < 0:
            raise DataError(f"{sample.source}: the chat template does not say {said!r} as it is", reason="template")
        text = answer if question.whole else answer[: place + len(said)]
        found.append(list(family.processor.tokenizer(text, add_special_tokens=False)["input_ids"]))
    if len({tuple(ids) for ids in found}) < len(found):
        raise DataError(f"{sample.source}: two choices have the same tokens", "word them otherwise")
    return found


def log_likelihoods(
    model: PrunedModel, prompt: Example, encoded: Encoded, pruning_rate: float, choices: Sequence[Sequence[int]]
) -> list[float]:
    """Log-probability of each choice behind the pruned prompt, less that of what all choices begin with.

    Args:
        prompt: up to where the answer begins.
        encoded: of `PrunedModel.encode`.
        choices: token ids of each, all different.
    """
    shared = _shared(choices)
    if model.selection(pruning_rate) is not None:
        return _behind_the_prompt(model, prompt, encoded, pruning_rate, choices, num_shared=len(shared))
    rests = [list(choice[len(shared) :]) for choice in choices]
    longest = max(map(len, rests))
    if all(len(rest) == 1 for rest in rests):
        logits = last_logits(model, [extended(prompt, shared)], encoded, pruning_rate, 1)  # (1, 1, V)
        return [float(logits[0, 0, rest[0]]) for rest in rests]
    rows = [extended(prompt, [*shared, *rest[:-1]]) for rest in rests]
    logits = last_logits(model, rows, encoded, pruning_rate, longest)  # (choices, longest, V)
    return [float(sum(logits[row, place, token] for place, token in enumerate(rest))) for row, rest in enumerate(rests)]


@torch.no_grad()
def _behind_the_prompt(
    model: PrunedModel,
    prompt: Example,
    encoded: Encoded,
    pruning_rate: float,
    choices: Sequence[Sequence[int]],
    *,
    num_shared: int,
) -> list[float]:
    """`log_likelihoods` from the cache of the prompt, whose video tokens the model has selected, as in generation."""
    with model.prepared(prompt, pruning_rate, encoded) as pruned:
        out = model.model(**pruned, use_cache=True, logits_to_keep=1)
    logits = out.logits[:, -1:].expand(len(choices), -1, -1)  # not every forward looks at logits_to_keep
    longest = max(map(len, choices)) - 1
    if longest:
        ids = [[*choice[:-1], *[0] * (longest + 1 - len(choice))] for choice in choices]  # nothing sees what is behind
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(choices))
        positions = pruned["position_ids"][..., -1:] + torch.arange(1, longest + 1, device=logits.device)
        more = model.model(
            input_ids=torch.tensor(ids, device=logits.device),
            position_ids=positions.expand(*positions.shape[:-2], len(choices), -1),
            attention_mask=logits.new_ones((len(choices), cache.get_seq_length() + longest), dtype=torch.int64),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, more.logits], dim=1)
    found = logits.float().log_softmax(-1).cpu()  # (choices, longest + 1, V)
    return [
        float(sum(found[row, place, token] for place, token in enumerate(choice) if place >= num_shared))
        for row, choice in enumerate(choices)
    ]


@torch.no_grad()
def last_logits(
    model: PrunedModel, rows: Sequence[Example], encoded: Encoded, pruning_rate: float, count: int
) -> Tensor:
    """(rows, count, V) float32 log-softmax at the last `count` places of the batch, padding included, on the CPU."""
    inputs = model.inputs_of_rows(rows, pruning_rate, encoded)
    logits: Tensor = model.model(**inputs, use_cache=False, logits_to_keep=count).logits
    return logits[:, -count:].float().log_softmax(-1).cpu()


def extended(prompt: Example, ids: Sequence[int]) -> Example:
    """A prompt with tokens behind it, numbered on from its last one as generated tokens are."""
    if not ids:
        return prompt
    new = torch.tensor(list(ids), dtype=torch.int64)
    positions = prompt.position_ids
    if positions is not None:
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, len(new) + 1)], dim=1)  # (P, L + new)
    return dataclasses.replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=torch.cat([prompt.labels, torch.full_like(new, IGNORE_INDEX)]),
        position_ids=positions,
    )


def _shared(choices: Sequence[Sequence[int]]) -> list[int]:
    """What all choices begin with, short of a whole choice: each must have a token left to be scored."""
    shared = []
    for tokens in zip(*(choice[:-1] for choice in choices), strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


def said_freely(model: PrunedModel, prompt: Example, encoded: Encoded, pruning_rate: float, **options: Any) -> str:
    """The generated answer, without what stands in front of the end of a thought."""
    new = model.generate(prompt, pruning_rate, encoded, **options)
    text: str = model.family.processor.tokenizer.decode(new, skip_special_tokens=True)
    return text.rsplit("</think>", 1)[-1].strip()


def is_right(said: str, answers: Sequence[str], match: Match) -> bool:
    """Whether an answer is one of `answers`, or contains one as whole words, in normal form."""
    found = normalized(said)
    wanted = [normalized(answer) for answer in answers]
    if match == "exact":
        return found in wanted
    return any(f" {one} " in f" {found} " for one in wanted)


def normalized(text: str) -> str:
    """Small letters, without articles and punctuation, as SQuAD's evaluation has it; a point in a number stays."""
    words = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def letter_said(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a generated answer names: it opens with it, or holds it as a word of its own.

    For servers, which do not tell how likely each choice is.
    """
    words = re.sub(r"[^\w\s]", " ", text)
    opening = [choice for choice in choices if re.match(rf"\W*{re.escape(choice)}\b", text, re.IGNORECASE)]
    if opening:
        return max(opening, key=len)
    places = {choice: re.search(rf"\b{re.escape(choice)}\b", words) for choice in choices}
    named = [(place.start(), choice) for choice, place in places.items() if place is not None]
    return min(named)[1] if named else None
