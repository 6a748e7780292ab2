"""Rows to questions: what is asked, between which choices, and which is right; every fault by its row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evs_train.data_config import DataSection
from evs_train.errors import DataError, EvsTrainError, MediaError
from evs_train.evaluate.data import LETTER_REQUEST, Question, assemble, data_fingerprint, refuse, rows_of
from tests.conftest import write_noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions")
    write_noise(path / "a.mp4", num_frames=4)
    write_noise(path / "b.mp4", num_frames=4)
    return path


def read(folder: Path, *rows: dict[str, Any], spoken: bool = False, **keys: Any) -> list[Question]:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    questions, problems = assemble(rows_of(DataSection(rows=[str(path)], **keys), spoken))
    refuse(problems)
    return questions


def text_of(question: Question) -> str:
    return "".join(part.get("text", f"<{part['type']}>") for part in question.sample.messages[-1]["content"])


def test_a_row_with_options_asks_for_a_letter(folder: Path) -> None:
    row = {"id": "x", "video": "a.mp4", "question": "What?", "options": ["left", "right"], "answer": "right"}
    (one,) = read(folder, row | {"question_type": "motion"})
    assert (one.id, one.choices, one.correct, one.answers, one.whole) == ("x", ("A", "B"), 1, ("B",), False)
    assert one.types == ("motion",)
    assert text_of(one) == f"<video>What?\nA. left\nB. right\n{LETTER_REQUEST}"
    assert one.video == str(folder / "a.mp4") == one.sample.videos[0]


def test_choices_as_texts_are_not_listed(folder: Path) -> None:
    row = {"video": "a.mp4", "question": "What?", "options": ["left", "right"], "answer": "B"}
    (one,) = read(folder, row, spoken=True)
    assert (one.choices, one.correct, one.answers, one.whole) == (("left", "right"), 1, ("right",), True)
    assert text_of(one) == "<video>What?"


@pytest.mark.parametrize("answer", ["two", "B", "b", "(B)", "B.", 1])
def test_an_answer_is_a_text_a_letter_or_a_number(folder: Path, answer: Any) -> None:
    (one,) = read(folder, {"video": "a.mp4", "question": "?", "options": ["one", "two"], "answer": answer})
    assert one.correct == 1


def test_without_options_the_answer_is_free(folder: Path) -> None:
    (one,) = read(folder, {"video": "a.mp4", "question": "Where?", "answer": ["left", "to the left"]})
    assert (one.choices, one.answers) == ((), ("left", "to the left"))
    assert text_of(one) == "<video>Where?"


def test_a_training_row_is_a_question_whose_last_answer_is_hidden(folder: Path) -> None:
    talk = [
        {"from": "human", "value": "<video>\nWhat moves?"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "Where to?"},
        {"from": "gpt", "value": "Left."},
    ]
    (one,) = read(folder, {"video": "a.mp4", "conversations": talk})
    assert one.answers == ("Left.",)
    assert [message["role"] for message in one.sample.messages] == ["user", "assistant", "user"]
    (other,) = read(folder, {"video": "a.mp4", "conversations": talk[:3], "answer": "Left"})
    assert other.answers == ("Left",)
    assert other.sample.messages == one.sample.messages
    (chosen,) = read(folder, {"video": "a.mp4", "conversations": talk, "options": ["Left.", "Right."]})
    assert (chosen.correct, chosen.choices) == (0, ("A", "B"))


def test_openai_s_form_and_several_videos(folder: Path) -> None:
    content = [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "Which is longer?"},
    ]
    (one,) = read(folder, {"messages": [{"role": "user", "content": content}], "answer": "neither"})
    assert one.video == f"{folder / 'a.mp4'} + {folder / 'b.mp4'}"
    (listed,) = read(folder, {"video": ["a.mp4", "b.mp4"], "question": "Which?", "answer": "a"})
    assert text_of(listed) == "<video><video>Which?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "options": ["a", "b"], "answer": "c"}, "'c' is none of 2 options"),
        ({"question": "?", "options": ["a", "b"], "answer": 2}, "2 is none of 2 options"),
        ({"question": "?", "options": ["B", "A"], "answer": "B"}, "'B' is more than one of 2 options"),
        ({"question": "?", "options": ["a", "b"], "answer": ["a", "b"]}, "is a list, but there are options"),
        ({"question": "?", "options": ["a"], "answer": "a"}, '"options" has 1 texts'),
        ({"question": "?", "options": ["a", "a"], "answer": 0}, "all different"),
        ({"question": "?", "options": "ab", "answer": 0}, '"options" has 1 texts'),
        ({"question": "?", "options": [1, 2], "answer": 0}, '"options" must be text'),
        ({"question": "?"}, "no answer"),
        ({"question": 3, "answer": "x"}, '"question" is a number'),
        ({"question": "?", "answer": True}, '"answer" is a boolean'),
        ({"question": "?", "answer": "x", "question_type": 3}, '"question_type" must be text'),
        ({"prompt": "?", "answer": "x"}, "the row has no"),
        ({"conversations": [{"from": "gpt", "value": "Yes."}]}, "no turn of the user"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_row(folder: Path, row: dict[str, Any], message: str) -> None:
    media = {} if "conversations" in row else {"video": "a.mp4"}
    with pytest.raises(DataError, match=message) as raised:
        read(folder, row | media)
    assert f"{folder / 'rows.json'} row 1" in raised.value.message


def test_all_faults_are_told_at_once(folder: Path) -> None:
    good = {"video": "a.mp4", "question": "?", "answer": "x", "id": "twice"}
    with pytest.raises(EvsTrainError) as raised:
        read(folder, good, good, {"video": "gone.mp4", "question": "?", "answer": "x"}, {"question": "?"})
    for part in ("3 bad rows", 'called "twice"', "gone.mp4", "row 4: no answer"):
        assert part in raised.value.message
    with pytest.raises(MediaError, match="row 1: video file not found"):
        read(folder, {"video": "gone.mp4", "question": "?", "answer": "x"})


def test_the_fingerprint_follows_what_is_asked_and_not_where_it_lies(folder: Path, tmp_path: Path) -> None:
    row = {"video": "a.mp4", "question": "What?", "options": ["left", "right"], "answer": "A"}
    first = data_fingerprint(read(folder, row))
    os.link(folder / "a.mp4", tmp_path / "a.mp4")
    assert data_fingerprint(read(tmp_path, row)) == first
    for change in ({"answer": "B"}, {"question_type": "x"}, {"question": "Who?"}, {"video": "b.mp4"}):
        assert data_fingerprint(read(folder, row | change)) != first
    assert data_fingerprint(read(folder, row, spoken=True)) != first
