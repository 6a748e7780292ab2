"""Likelihoods equal plain forwards, whatever else is in the batch; answers are matched as people would."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.video_utils import VideoMetadata

from evs_train.data.video import read_video, video_metadata
from evs_train.data_config import DataSection
from evs_train.errors import DataError
from evs_train.evaluate import score
from evs_train.evaluate.data import Question, assemble, rows_of
from evs_train.evaluate.score import continuations, extended, is_right, letter_said, log_likelihoods, normalized
from evs_train.generation import PrunedModel
from tests.plain import is_release, plain_model, plain_processor

RATES = (0.0, 0.75)
OPTIONS = ["A red circle moves left.", "A red circle", "Nothing moves at all; it is a still picture."]
_LOADED: dict[str, PrunedModel] = {}


def loaded(family: str, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    if family not in _LOADED:
        _LOADED[family] = PrunedModel.load(tiny_checkpoint(family), dtype="float32", device="cpu", data={"fps": 8.0})
    return _LOADED[family]


@pytest.fixture
def model(family_name: str, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    return loaded(family_name, tiny_checkpoint)


@pytest.fixture(scope="module")
def clip(world: Path) -> Path:
    return world.parent / "clips" / "000000.mp4"


def question(clip: Path, tmp_path: Path, spoken: bool = False, **keys: Any) -> Question:
    row = {"video": str(clip), "question": "What happens?", "options": OPTIONS, "answer": "B", **keys}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    questions, problems = assemble(rows_of(DataSection(rows=[str(tmp_path / "rows.json")]), spoken))
    assert not problems
    return questions[0]


def prompt_of(model: PrunedModel, asked: Question) -> Any:
    return model.prompt(with_files(asked))


def with_files(asked: Question) -> list[dict[str, Any]]:
    files = iter(asked.sample.videos)
    parts = [p if p["type"] == "text" else {**p, "video": next(files)} for p in asked.sample.messages[0]["content"]]
    return [{"role": "user", "content": parts}]


def alone(model: PrunedModel, prompt: Any, rate: float, shared: list[int], rest: list[int]) -> float:
    """The score of one choice from a full forward over its own row, without batch, padding or kept places."""
    with torch.inference_mode():
        logits = model.model(**model.inputs(extended(prompt, [*shared, *rest]), rate)).logits[0].float()
    steps = logits.log_softmax(-1)[-len(rest) - 1 : -1]
    return float(steps[torch.arange(len(rest)), torch.tensor(rest)].sum())


@pytest.mark.parametrize("rate", RATES)
def test_choices_score_as_each_does_alone(model: PrunedModel, clip: Path, tmp_path: Path, rate: float) -> None:
    """Several tokens, of several lengths, one the beginning of another: every family, dense and pruned."""
    asked = question(clip, tmp_path, spoken=True)
    prompt, choices = prompt_of(model, asked), continuations(model, asked)
    encoded = model.encode(prompt)
    found = log_likelihoods(model, prompt, encoded, rate, choices)
    shared = score._shared(choices)
    assert len({len(choice) for choice in choices}) == len(choices)
    expected = [alone(model, prompt, rate, shared, choice[len(shared) :]) for choice in choices]
    assert found == pytest.approx(expected, abs=2e-4)
    pair = log_likelihoods(model, prompt, encoded, rate, choices[:2])
    more = [
        alone(model, prompt, rate, score._shared(choices[:2]), c[len(score._shared(choices[:2])) :])
        for c in choices[:2]
    ]
    assert pair == pytest.approx(more, abs=2e-4)


@pytest.mark.parametrize("rate", RATES)
def test_letters_score_as_the_log_softmax_of_one_forward(
    model: PrunedModel, clip: Path, tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(clip, tmp_path)
    prompt, choices = prompt_of(model, asked), continuations(model, asked)
    assert [len(choice) for choice in choices] == [1, 1, 1]
    with torch.inference_mode():
        expected = model.model(**model.inputs(prompt, rate)).logits[0, -1].float().log_softmax(-1)
    encoded, rows = model.encode(prompt), []
    plain = model.inputs_of_rows
    monkeypatch.setattr(model, "inputs_of_rows", lambda *args: rows.append(len(args[0])) or plain(*args))
    monkeypatch.setattr(model.family, "encode", None)  # it is not run again
    found = log_likelihoods(model, prompt, encoded, rate, choices)
    assert rows == [1]
    assert found == pytest.approx([float(expected[choice[0]]) for choice in choices], abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "llava_onevision"])
def test_rate_0_is_the_plain_model(
    family: str, tiny_checkpoint: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    """The whole way around: transformers' own processor on the chat, its own forward, its own log-softmax."""
    model = loaded(family, tiny_checkpoint)
    path = tiny_checkpoint(family)
    assert not is_release(path)
    asked = question(clip, tmp_path, spoken=True)
    prompt = prompt_of(model, asked)
    found = log_likelihoods(model, prompt, model.encode(prompt), 0.0, choices := continuations(model, asked))
    processor, plain = plain_processor(path), plain_model(path, torch.float32).eval()
    decoded = read_video(clip, model.sampling)
    metadata: VideoMetadata = video_metadata(decoded)
    shared = len(score._shared(choices))
    for choice, option, likelihood in zip(choices, OPTIONS, found, strict=True):
        chat = [{"role": "user", "content": asked.sample.messages[0]["content"]}]
        chat.append({"role": "assistant", "content": [{"type": "text", "text": option}]})
        text = processor.apply_chat_template(chat, tokenize=False)
        frames = torch.from_numpy(decoded.frames).permute(0, 3, 1, 2)
        inputs = processor(
            text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        ids = inputs["input_ids"][0].tolist()
        end = max(i for i in range(len(ids)) if ids[i : i + len(choice)] == choice)
        with torch.inference_mode():
            steps = plain(**inputs).logits[0].float().log_softmax(-1)
        scored = [float(steps[end + i - 1, token]) for i, token in enumerate(choice) if i >= shared]
        assert likelihood == pytest.approx(sum(scored), abs=2e-4)


def test_a_whole_choice_ends_the_turn_and_a_letter_does_not(
    tiny_checkpoint: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    model = loaded("qwen3_vl", tiny_checkpoint)
    decode = model.family.processor.tokenizer.decode
    assert [decode(c) for c in continuations(model, question(clip, tmp_path))] == ["A", "B", "C"]
    spoken = continuations(model, question(clip, tmp_path, spoken=True))
    assert [decode(c) for c in spoken] == [f"{option}<|im_end|>" for option in OPTIONS]


def test_what_the_answer_opens_with_stands_before_each_choice(
    tiny_checkpoint: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    model = loaded("qwen3_vl", tiny_checkpoint)
    asked = dataclasses.replace(question(clip, tmp_path), prefix="Best option: (")
    choices = continuations(model, asked)
    assert [model.family.processor.tokenizer.decode(c) for c in choices] == [f"Best option: ({x}" for x in "ABC"]
    prompt = prompt_of(model, asked)
    found = log_likelihoods(model, prompt, model.encode(prompt), 0.5, choices)
    shared = score._shared(choices)
    expected = [alone(model, prompt, 0.5, shared, choice[len(shared) :]) for choice in choices]
    assert found == pytest.approx(expected, abs=2e-4)


def test_a_choice_that_another_one_begins_with_keeps_a_token_to_score(
    tiny_checkpoint: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    model = loaded("qwen3_vl", tiny_checkpoint)
    prompt = prompt_of(model, question(clip, tmp_path))
    found = log_likelihoods(model, prompt, model.encode(prompt), 0.5, [[300, 301], [300, 301, 302]])
    expected = [alone(model, prompt, 0.5, [300], rest) for rest in ([301], [301, 302])]
    assert found == pytest.approx(expected, abs=2e-4)


def test_choices_that_cannot_be_told_apart(tiny_checkpoint: Callable[[str], Path], clip: Path, tmp_path: Path) -> None:
    model = loaded("qwen3_vl", tiny_checkpoint)
    asked = dataclasses.replace(question(clip, tmp_path), choices=("A", "A"))
    with pytest.raises(DataError, match="the same tokens"):
        continuations(model, asked)


@pytest.mark.parametrize(
    ("said", "answers", "exact", "contains"),
    [
        ("A red circle.", ["red circle"], True, True),
        ("The Red Circle", ["a red circle!"], True, True),
        ("It is a red circle that moves.", ["red circle"], False, True),
        ("It is a redder circle", ["red"], False, False),
        ("3.5 m", ["35 m"], False, False),
        ("3.5 m.", ["3.5 m"], True, True),
        ("left", ["right", "left"], True, True),
        ("", ["left"], False, False),
    ],
)
def test_answers_are_matched_in_normal_form(said: str, answers: list[str], exact: bool, contains: bool) -> None:
    assert is_right(said, answers, "exact") == exact
    assert is_right(said, answers, "contains") == contains


def test_normal_form() -> None:
    assert normalized("  The (first) answer: 1,000.5, an apple! ") == "first answer 1,000.5 apple"


@pytest.mark.parametrize(
    ("text", "choices", "found"),
    [
        ("B", "ABCD", "B"),
        ("(C) because A is wrong", "ABCD", "C"),
        ("b.", "ABCD", "B"),
        ("The answer is D.", "ABCD", "D"),
        ("A dog", "ABCD", "A"),
        ("I cannot tell", "BCD", None),
        ("Yes, it does", ["yes", "no"], "yes"),
        ("Option 2: the ball", ["Option 1", "Option 2"], "Option 2"),
        ("", "ABCD", None),
    ],
)
def test_the_choice_that_an_answer_names(text: str, choices: Any, found: str | None) -> None:
    assert letter_said(text, list(choices)) == found
