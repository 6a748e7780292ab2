"""Questions about videos: what is asked, between which answers, and which of them is right.

Rows are those of training (`data/formats.py`), or say `question` beside their media, with three keys more: `options`,
`answer` and `question_type`; docs/eval.md shows them. `layouts.py` reads published benchmarks into the same form.

Invariant: a `Question` can be asked as it stands: its media exist, its right answer is one of its choices, and nothing
of the answer is in its messages. All faults are told at once. Cost: one look-up a media file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evs_train.data.formats import kind_of, listed, read_row
from evs_train.data.manifest import Problem, Sample, all_faults, fingerprint, of_row
from evs_train.data.media import MediaFinder
from evs_train.data.mixture import sources
from evs_train.data.sources import name_of
from evs_train.data_config import DataSection
from evs_train.errors import DataError, MediaError
from evs_train.redaction import redact

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
"""How lmms-eval asks for a letter in most of its tasks (read)."""


@dataclass(frozen=True)
class Asked:
    """A question as its file has it: media by the names they have there.

    Attributes:
        id: unique in the data.
        source: file and place, for messages.
        messages: chat in Hugging Face form up to the user's last turn.
        videos, images: what names each media part, as `MediaFinder` takes it.
        choices: texts between which is chosen by likelihood; none where the answer is generated.
        answers: the right choice, or all texts that are right.
        types: what the accuracy is given by, beside the whole.
        prefix: how the answer opens, before the choice.
        whole: a choice is a whole answer, so that its end is scored as well.
        segment: the seconds of the video that are shown, from and to.
    """

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    videos: tuple[Any, ...]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()
    types: tuple[str, ...] = ()
    prefix: str = ""
    whole: bool = False
    segment: tuple[float, float] | None = None


@dataclass(frozen=True)
class Question:
    """A question that can be asked; see `Asked` for what is not said here.

    Attributes:
        video: the cluster that intervals and processes go by: the name of its media.
        sample: its messages and media.
        correct: place of the right answer among `choices`; 0 where there are none.
    """

    id: str
    video: str
    sample: Sample
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    correct: int
    types: tuple[str, ...]
    prefix: str
    whole: bool
    segment: tuple[float, float] | None


def assemble(found: Iterable[tuple[Asked | Problem, MediaFinder]]) -> tuple[list[Question], list[Problem]]:
    """Questions whose media are there, and what is wrong with the others."""
    questions: list[Question] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for asked, finder in found:
        if isinstance(asked, Asked):
            try:
                questions.append(_question(asked, finder, seen))
            except (DataError, MediaError) as error:
                problems.append(of_row(error, asked.source))
        else:
            problems.append(asked)
    return questions, problems


def _question(asked: Asked, finder: MediaFinder, seen: dict[str, str]) -> Question:
    if asked.id in seen:
        raise DataError(f'the question is called "{asked.id}", like that of {seen[asked.id]}', "give each its own id")
    seen[asked.id] = asked.source
    if asked.choices and asked.answers[0] not in asked.choices:
        raise DataError(f"the answer {asked.answers[0]!r} is none of {', '.join(map(repr, asked.choices))}")
    videos = tuple(finder.video(one) for one in asked.videos)
    images = tuple(finder.image(one) for one in asked.images)
    return Question(
        id=asked.id,
        video=redact(" + ".join(map(name_of, [*videos, *images]))) or asked.id,
        sample=Sample(asked.id, asked.source, asked.messages, videos, images),
        answers=asked.answers,
        choices=asked.choices,
        correct=asked.choices.index(asked.answers[0]) if asked.choices else 0,
        types=asked.types,
        prefix=asked.prefix,
        whole=asked.whole,
        segment=asked.segment,
    )


def rows_of(section: DataSection, spoken: bool) -> Iterator[tuple[Asked | Problem, MediaFinder]]:
    """The questions of data files in any format that training reads.

    Args:
        section: names the files.
        spoken: choose between the texts of the options as whole answers, without listing them in the question; else
            they are listed with letters, and a letter is chosen.
    """
    for source in sources(section):
        root = None if source.media_root is None else str(source.media_root)
        confined = root is not None and not section.allow_outside
        for path, number, row in source.rows():
            finder = MediaFinder(root or str(path.parent), confined, source.frames_fps)
            where = f"{path} row {number}"
            try:
                yield _asked(row, f"{path.name}:{number}", where, source.row_format, spoken), finder
            except DataError as error:
                yield of_row(error, where), finder


def _asked(row: Any, row_id: str, where: str, row_format: str, spoken: bool) -> Asked:
    if isinstance(row, DataError):
        raise row
    if isinstance(row, dict) and "question" in row:
        row = {**row, "conversations": [{"from": "human", "value": _with_placeholders(row)}]}
    draft, _ = read_row(row, row_format)
    messages, answers = draft.messages, _answers(row)
    if messages[-1]["role"] == "assistant":
        said = "".join(part["text"] for part in messages[-1]["content"]).strip()
        messages, answers = messages[:-1], answers or (said,)
    if not messages or messages[-1]["role"] != "user":
        raise DataError("no turn of the user to answer")
    if not answers:
        raise DataError('no answer: neither "answer" nor a last turn of the assistant', "it is what is compared with")
    options = _options(row)
    right = options[_place(answers, options)] if options else ""
    if options and not spoken:
        right = LETTERS[options.index(right)]
        messages = (*messages[:-1], with_text(messages[-1], f"\n{lettered(options)}\n{LETTER_REQUEST}"))
    return Asked(
        id=row_id if row.get("id") is None else str(row["id"]),
        source=where,
        messages=messages,
        videos=draft.videos,
        images=draft.images,
        answers=(right,) if options else tuple(map(str, answers)),
        choices=tuple(options if spoken else LETTERS[: len(options)]),
        types=_texts(row, "question_type"),
        whole=spoken,
    )


def _with_placeholders(row: dict[str, Any]) -> str:
    if not isinstance(row["question"], str):
        raise DataError(f'"question" is {kind_of(row["question"])}', "it must be text")
    if "<video>" in row["question"] or "<image>" in row["question"]:
        return row["question"]
    return "".join(f"<{kind}>\n" * len(listed(row, kind)) for kind in ("video", "image")) + row["question"]


def _answers(row: dict[str, Any]) -> tuple[str | int, ...]:
    value = row.get("answer")
    found = value if isinstance(value, list) else [] if value is None else [value]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, str | int):
            raise DataError(f'"answer" is {kind_of(one)}', "it must be text, or with options a number from 0 as well")
    return tuple(found)


def _options(row: dict[str, Any]) -> tuple[str, ...]:
    options = _texts(row, "options")
    if len(options) == 1 or len(options) > len(LETTERS) or len(set(options)) < len(options):
        raise DataError(f'"options" has {len(options)} texts', f"two to {len(LETTERS)}, all different, are needed")
    return options


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) and one for one in found):
        raise DataError(f'"{key}" must be text or a list of texts')
    return tuple(found)


def _place(answers: Sequence[str | int], options: Sequence[str]) -> int:
    """Which option the answer is: by its text, its letter, or its number from 0."""
    (answer, *others) = answers
    if others:
        raise DataError('"answer" is a list, but there are options', "one of them must be right")
    if isinstance(answer, int):
        places = {answer} if 0 <= answer < len(options) else set[int]()
    else:
        letter = answer.strip().strip("().").upper()
        places = {place for place, option in enumerate(options) if option.strip() == answer.strip()}
        places |= (
            {LETTERS.index(letter)} & set(range(len(options))) if len(letter) == 1 and letter in LETTERS else set()
        )
    if len(places) != 1:
        raise DataError(
            f"the answer {answer!r} is {'none' if not places else 'more than one'} of {len(options)} options",
            "name it by its text, its letter (A, B, ...) or its number from 0",
        )
    return places.pop()


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options one below the other, each behind its letter."""
    return "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))


def with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A user's turn with `text` behind it."""
    return {**message, "content": [*message["content"], {"type": "text", "text": text}]}


def data_fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 (hex) of what is asked: messages, names and sizes of media, choices, right answers, types, segments.

    Raises:
        MediaError: a media file is gone.
    """
    digest = hashlib.sha256(fingerprint([question.sample for question in questions]).encode())
    for one in questions:
        fields = [one.answers, one.choices, one.types, one.prefix, one.whole, one.segment]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one error for all `problems`, if there are any."""
    if problems:
        raise all_faults(list(problems))
