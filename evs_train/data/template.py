"""Chat templates followed: what the row says as the template renders it, and which tokens of it are trained on.

An assistant's turn is located in the expanded ids by its own token sequence, header included, and by how often the same
text stands before it, so nothing is assumed about how a processor expands placeholders. What the row says must stand in
the rendering, and a template that cannot be followed is an error instead of a wrong label.

Cost: three renderings and one tokenization per assistant turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from evs_train.data.manifest import Sample
from evs_train.errors import DataError

IGNORE_INDEX = -100


_OF_TEMPLATES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What the code of a template can raise in its sandbox."""


class Renderer(Protocol):
    """What this module needs of a family's adapter (see `models/base.py`)."""

    processor: Any

    @property
    def end_of_turn(self) -> str: ...

    def normalized(self, text: str) -> str: ...


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in the rendered text.

    Attributes:
        header: what prompts it, such as "<|im_start|>assistant" and a newline.
        answer: what is trained on, the end-of-turn token included.
        earlier: how often header + answer stands before the turn: in a like turn, or written out in a user's text.
    """

    header: str
    answer: str
    earlier: int


def as_the_template_reads(
    sample: Sample, renderer: Renderer, template_kwargs: Mapping[str, Any], last_only: bool
) -> list[Mapping[str, Any]]:
    """The messages with turns of text as lists of parts or, for templates that print such a list, as strings.

    Raises:
        DataError: either way something that the row says is not in the rendering.
    """
    plain: list[Mapping[str, Any]] = [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if all(part["type"] == "text" for part in message["content"])
        else message
        for message in sample.messages
    ]
    lost: tuple[int, str] | None = None
    as_given: list[Mapping[str, Any]] = list(sample.messages)
    for messages in (as_given, plain):
        text = render(renderer, messages, template_kwargs, sample.source)
        missing = _left_out(text, sample.messages, last_only)
        if missing is None:
            return messages
        lost = lost or missing
    assert lost is not None
    raise DataError(
        f"{sample.source}: the chat template leaves out what turn {lost[0]} says: {lost[1][:60]!r}",
        "if it rewrites earlier answers (as templates of thinking models do), set data.supervise: last",
        "template",
    )


def _left_out(text: str, messages: Sequence[Mapping[str, Any]], last_only: bool) -> tuple[int, str] | None:
    """Number and words of the first turn whose words are not in the rendered `text`, or only as a printed list.

    Answers before the last may be missing where only the last is trained on.
    """
    for number, message in enumerate(messages, start=1):
        optional = last_only and message["role"] == "assistant" and number < len(messages)
        for part in message["content"]:
            if part["type"] == "text":
                words = part["text"].strip()
                if str(part) in text or (words not in text and not optional):
                    return number, words
    return None


def assistant_turns(
    renderer: Renderer,
    messages: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    source: str,
    *,
    last_only: bool = False,
) -> list[Turn]:
    """Header and answer of every assistant's turn, read off the template by rendering up to and past the turn.

    Where the template ends an answer with nothing, the family's `end_of_turn` ends it: without it a model would not
    learn to stop.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = []
    for index in answers[-1:] if last_only else answers:
        if index == 0:
            raise DataError(f"{source}: the conversation starts with the assistant", "a user's turn must come first")
        before = render(renderer, messages[:index], template_kwargs, source)
        prompt = render(renderer, messages[:index], template_kwargs, source, add_generation_prompt=True)
        after = render(renderer, messages[: index + 1], template_kwargs, source)
        if not (prompt.startswith(before) and after.startswith(prompt)):
            raise DataError(
                f"{source}: the chat template renders turn {index + 1} unlike the prompt that generation would see",
                "set data.template_kwargs (such as enable_thinking: false) so that prompt + answer is the rendering, "
                "or data.supervise: last if only earlier answers are rendered otherwise",
                "template",
            )
        header, answer = prompt[len(before) :], after[len(prompt) :].rstrip()
        content = messages[index]["content"]
        said = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if answer.strip() == said.strip():
            answer += renderer.end_of_turn
        turns.append(Turn(header, answer, earlier=before.count(header + answer)))
    return turns


def label_turns(input_ids: Tensor, turns: Sequence[Turn], tokenizer: Any, source: str) -> Tensor:
    """Labels that train on the answers of `turns` and on nothing else.

    Args:
        input_ids: (L,) int64 with placeholders expanded.

    Returns:
        (L,) int64, a copy of `input_ids` in the answers (end-of-turn token included), `IGNORE_INDEX` elsewhere.

    Raises:
        DataError: a turn's tokens are not found in `input_ids`, or nothing would be supervised.
    """
    ids = input_ids.numpy()
    labels = np.full_like(ids, IGNORE_INDEX)
    done = 0
    for number, turn in enumerate(turns, start=1):
        encoded = tokenizer(turn.header + turn.answer, add_special_tokens=False, return_offsets_mapping=True)
        block = np.asarray(encoded["input_ids"], dtype=ids.dtype)
        # A token that begins in the header but ends in the answer is part of what generation must produce.
        supervised = np.asarray([end > len(turn.header) for _, end in encoded["offset_mapping"]])
        start = _find(ids, block, turn.earlier)
        if start is None or start < done:
            raise DataError(
                f"{source}: the tokens of assistant turn {number} are not found in the rendered conversation",
                "the chat template changes earlier turns; see data.template_kwargs and data.supervise",
                "template",
            )
        done = start + len(block)
        labels[start:done][supervised] = block[supervised]
    if not (labels != IGNORE_INDEX).any():
        raise DataError(f"{source}: no token would be trained on", "the answers are empty")
    return torch.from_numpy(labels)


def _find(ids: np.ndarray, block: np.ndarray, earlier: int) -> int | None:
    """Where `block` stands in `ids` after `earlier` other, not overlapping places."""
    end = 0
    for begin in np.flatnonzero(ids[: len(ids) - len(block) + 1] == block[0]).tolist():
        if begin >= end and np.array_equal(ids[begin : begin + len(block)], block):
            if earlier == 0:
                return int(begin)
            earlier, end = earlier - 1, begin + len(block)
    return None


def render(
    renderer: Renderer,
    messages: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    source: str,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the template writes it. Raises DataError if the template refuses it."""
    try:
        text: str = renderer.processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except _OF_TEMPLATES as error:
        raise DataError(f"{source}: the chat template refuses the conversation: {error}", reason="template") from error
    return renderer.normalized(text)
