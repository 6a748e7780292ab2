"""Published benchmarks, written as they are published with small clips, are asked as their authors ask them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evs_train.data.sources import FrameList
from evs_train.errors import DataError, MediaError
from evs_train.evaluate.data import Question
from evs_train.evaluate.layouts import LAYOUTS, read_questions
from evs_train.evaluate.options import EvalOptions, Layout
from tests.conftest import write_noise


def questions(folder: Path, layout: Any, **keys: Any) -> list[Question]:
    return read_questions(EvalOptions(model=["m"], data=[str(folder)], layout=layout, **keys))[0]


def text_of(question: Question) -> str:
    (message,) = question.sample.messages
    assert [part["type"] for part in message["content"]] == ["video", "text"]
    return str(message["content"][1]["text"])


def clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_noise(path, num_frames=4)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def videomme(folder: Path) -> None:
    """Columns of lmms-lab/Video-MME's parquet, as its page lists them."""
    for name in ("fFjv93ACGo8.mp4", "N1cdUjctpG8.mkv"):
        clip(folder / "data" / name)
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
        "task_type": "Counting Problem", "question": "How many?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The same."], "answer": "C",
    }  # fmt: skip
    rows = [row, row | {"videoID": "N1cdUjctpG8", "question_id": "002-1", "duration": "long", "answer": "D"}]
    (folder / "videomme").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videomme" / "test-00000-of-00001.parquet")


def mvbench(folder: Path) -> None:
    clip(folder / "video/star/Charades_v1_480/ZS9XR.mp4")
    frames = folder / "video/tvqa/frames_fps3_hq/castle_s01e01"
    frames.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(1, 13):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(frames / f"{number:05d}.jpg")
    row = {
        "video": "ZS9XR.mp4", "question": "What happened after the person took the food?",
        "candidates": ["Ate the medicine.", "Tidied up the blanket."], "answer": "Tidied up the blanket.",
        "start": 0.1, "end": 0.4, "accurate_start": 0.1, "accurate_end": 0.4,
    }  # fmt: skip
    write_json(folder / "json/action_sequence.json", [row])
    shown = {"video": "castle_s01e01", "question": "Why?", "candidates": ["a", "b", "c"], "answer": "a"}
    write_json(folder / "json/episodic_reasoning.json", [shown | {"fps": 3, "start": 1.0, "end": 2.5}])


def tempcompass(folder: Path) -> None:
    clip(folder / "videos/1021488277.mp4")
    files = {
        "multi-choice": ("What is it doing?\nA. flying\nB. swimming\nC. running", "B. swimming"),
        "yes_no": ("Is it swimming?", "yes"),
        "caption_matching": (
            "Which caption matches the video better?\nCaption A: It flies.\nCaption B: It swims: slowly.",
            "Caption B: It swims: slowly.",
        ),
    }
    for task, (question, answer) in files.items():
        asked = {"1021488277": {"action": [{"question": question, "answer": answer}]}}
        write_json(folder / f"questions/{task}.json", asked)
    described = {"question": "Describe it.", "mc_question": "?", "mc_answer": "A. x"}
    write_json(folder / "questions/captioning.json", {"1021488277": {"action": [described]}})


def longvideobench(folder: Path) -> None:
    clip(folder / "videos/86CxyhFV9MI.mp4")
    row = {
        "video_id": "86CxyhFV9MI", "question": "What is on the screen?",
        "candidates": ["one", "two", "three", "four", "five"], "correct_choice": 4, "question_category": "TOS",
        "topic_category": "KG", "level": "L2-Relation", "id": "86CxyhFV9MI_0", "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json", "duration_group": 600, "duration": 190.16,
        "starting_timestamp_for_subtitles": 0, "view_count": 1, "position": [1],
    }  # fmt: skip
    write_json(folder / "lvb_val.json", [row])


def mlvu(folder: Path) -> None:
    clip(folder / "video/1_plotQA/movie101_66.mp4")
    clip(folder / "video/2_needle/needle_32.mp4")
    row = {
        "video": "movie101_66.mp4", "duration": 246, "question": "What color?",
        "candidates": ["Yellow", "Red", "Green", "Blue"], "answer": "Yellow", "question_type": "plotQA",
    }  # fmt: skip
    write_json(folder / "json/1_plotQA.json", [row])
    found = row | {"video": "needle_32.mp4", "answer": "Blue", "question_type": "findNeedle"}
    write_json(folder / "json/2_needle.json", [found])
    write_json(folder / "json/9_summary.json", [{"video": "x.mp4", "question": "Sum up.", "answer": "It is long."}])


def egoschema(folder: Path) -> None:
    uids = ["0074f737-11cb-497d-8d07-77c3a8127391", "00faf954-74f7-4aa3-8b29-4a5dff4f9518"]
    clip(folder / f"videos/{uids[0]}.mp4")
    options = {f"option {place}": f"C does {place}." for place in range(5)}
    asked = [{"q_uid": uid, "google_drive_id": "1Z", "question": "What is done?", **options} for uid in uids]
    write_json(folder / "questions.json", asked)
    write_json(folder / "subset_answers.json", {uids[0]: 3})


WRITERS: dict[str, Callable[[Path], None]] = {
    "videomme": videomme,
    "mvbench": mvbench,
    "tempcompass": tempcompass,
    "longvideobench": longvideobench,
    "mlvu": mlvu,
    "egoschema": egoschema,
}


def test_every_layout_is_read_and_tested() -> None:
    assert set(LAYOUTS) == set(get_args(Layout)) == {"rows", *WRITERS}


def test_videomme(tmp_path: Path) -> None:
    videomme(tmp_path)
    first, second = questions(tmp_path, "videomme")
    assert text_of(first) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nHow many?\nA. Apples.\nB. Candles.\nC. Berries.\n"
        "D. The same.\nThe best answer is:"
    )
    assert (first.id, first.choices, first.correct) == ("001-1", ("A", "B", "C", "D"), 2)
    assert first.types == ("Counting Problem", "short")
    assert second.video.endswith("N1cdUjctpG8.mkv")


def test_mvbench_has_segments_and_frames(tmp_path: Path) -> None:
    mvbench(tmp_path)
    segment, frames = questions(tmp_path, "mvbench")
    assert text_of(segment) == (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
        "objects, and the action and pose of persons. Based on your observations, select the best option that "
        "accurately addresses the question.\nQuestion: What happened after the person took the food?\nOptions:\n"
        "(A) Ate the medicine.\n(B) Tidied up the blanket.\nOnly give the best option."
    )
    assert (segment.prefix, segment.choices, segment.correct) == ("Best option:(", ("A", "B"), 1)
    assert (segment.segment, segment.types) == ((0.1, 0.4), ("action_sequence",))
    (source,) = frames.sample.videos
    assert isinstance(source, FrameList)
    assert (len(source.paths), source.fps, frames.segment) == (12, 3.0, (1.0, 2.5))
    assert source.paths[0].endswith("castle_s01e01/00001.jpg")


def test_tempcompass_has_three_kinds_of_choices(tmp_path: Path) -> None:
    tempcompass(tmp_path)
    letters, yes_no, captions = questions(tmp_path, "tempcompass")
    assert text_of(letters).endswith("C. running\nPlease directly give the best option:")
    assert (letters.choices, letters.correct) == (("A", "B", "C"), 1)
    assert text_of(yes_no) == "Is it swimming?\nPlease answer yes or no:"
    assert (yes_no.choices, yes_no.correct) == (("yes", "no"), 0)
    assert (captions.choices, captions.correct) == (("Caption A", "Caption B"), 1)
    assert captions.types == ("caption_matching", "action")
    assert len({one.video for one in (letters, yes_no, captions)}) == 1


def test_longvideobench(tmp_path: Path) -> None:
    longvideobench(tmp_path)
    (one,) = questions(tmp_path, "longvideobench")
    assert text_of(one) == (
        "Question: What is on the screen?\nA. one\nB. two\nC. three\nD. four\nE. five\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (one.id, one.correct, one.types) == ("86CxyhFV9MI_0", 4, ("TOS", "up to 600 s"))


def test_mlvu_leaves_out_what_another_model_would_judge(tmp_path: Path) -> None:
    mlvu(tmp_path)
    plot, needle = questions(tmp_path, "mlvu")
    assert text_of(plot) == (
        "Carefully watch this video and pay attention to every detail. Based on your observations, select the best "
        "option that accurately addresses the question.\nQuestion: What color?\nOptions:\n(A) Yellow\n(B) Red\n"
        "(C) Green\n(D) Blue\nOnly give the best option."
    )
    assert (plot.prefix, plot.correct, plot.types) == ("Best option:(", 0, ("plotQA",))
    assert needle.video.endswith("video/2_needle/needle_32.mp4")


def test_egoschema_asks_what_has_an_answer(tmp_path: Path) -> None:
    egoschema(tmp_path)
    (one,) = questions(tmp_path, "egoschema")
    assert text_of(one).startswith("What is done?\nA. C does 0.\nB. C does 1.")
    assert (one.correct, len(one.choices)) == (3, 5)


@pytest.mark.parametrize("layout", WRITERS)
def test_what_is_missing_or_another_benchmark_is_told(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match="is no folder"):
        questions(tmp_path / "nowhere", layout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        questions(tmp_path / "empty", layout)
    WRITERS[layout](tmp_path / "full")
    videos = [path for path in (tmp_path / "full").rglob("*") if path.suffix in (".mp4", ".mkv")]
    videos[0].unlink()
    with pytest.raises(MediaError, match=videos[0].stem):
        questions(tmp_path / "full", layout)
    if len(videos) > 1:
        found, skipped = read_questions(
            EvalOptions(model=["m"], data=[str(tmp_path / "full")], layout=layout, on_error="skip")
        )
        assert len(found) >= 1
        assert any(videos[0].stem in reason for reason in skipped.values())


def test_a_field_of_another_form_is_named(tmp_path: Path) -> None:
    longvideobench(tmp_path)
    rows = json.loads((tmp_path / "lvb_val.json").read_text())
    write_json(tmp_path / "lvb_val.json", [rows[0] | {"candidates": "one, two"}])
    with pytest.raises(DataError, match=r'lvb_val.json row 1: "candidates" is text'):
        questions(tmp_path, "longvideobench")
    write_json(tmp_path / "lvb_val.json", [rows[0] | {"correct_choice": None}])
    with pytest.raises(DataError, match="'None' is none of"):
        questions(tmp_path, "longvideobench")


def test_only_so_many(tmp_path: Path) -> None:
    videomme(tmp_path)
    assert [one.id for one in questions(tmp_path, "videomme", limit=1)] == ["001-1"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no question")
    options = EvalOptions(model=["unused"], data=[str(tmp_path)], layout="videomme")
    with pytest.raises(DataError, match=r"no question is there \(docs/eval\.md says what each layout expects\)"):
        read_questions(options)
