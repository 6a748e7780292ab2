"""Rows as published data sets write them, each read to the same sample, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from evs_train.data.formats import FORMATS, read_row
from evs_train.data.manifest import TrainingData, read_data
from evs_train.data.sources import FrameList
from evs_train.data_config import DataSection, RowFormatName
from evs_train.errors import DataError

CLIP = "academic_source/Charades/001YG.mp4"


def read(folder: Path, rows: list[Any], files: tuple[str, ...] = (), **options: Any) -> TrainingData:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not opened here")
    (folder / "rows.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return read_data(DataSection(rows=[str(folder / "rows.json")], **options))


def texts(message: dict[str, Any]) -> list[str]:
    return [part.get("text", f"<{part['type']}>") for part in message["content"]]


def test_every_format_can_be_named() -> None:
    assert get_args(RowFormatName) == ("auto", *FORMATS)


@pytest.mark.parametrize("row_format", ["auto", "llava_video"])
def test_llava_video_178k(tmp_path: Path, row_format: str) -> None:
    row = {
        "id": "001YG",
        "conversations": [
            {"from": "human", "value": "<image>\nPlease provide a detailed description of the video."},
            {"from": "gpt", "value": "The video opens on a kitchen."},
        ],
        "data_source": "0_30_s_academic_v0_1",
        "video": CLIP,
    }
    data = read(tmp_path, [row], (CLIP,), format=row_format)
    [sample] = data.samples
    assert sample.videos == (str(tmp_path / CLIP),)
    assert sample.images == ()
    assert texts(sample.messages[0]) == ["<video>", "Please provide a detailed description of the video."]
    assert data.parts[0].formats == {"llava_video": 1}


def test_an_image_beside_a_video_is_no_llava_video(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\n<video>\nSame?"}, {"from": "gpt", "value": "Yes."}]
    row = {"video": CLIP, "image": "p.png", "conversations": talk}
    data = read(tmp_path, [row], (CLIP, "p.png"))
    assert texts(data.samples[0].messages[0]) == ["<image>", "<video>", "Same?"]
    assert data.parts[0].formats == {"qwen": 1}
    with pytest.raises(DataError, match="the row lists images, but <image> stands for a video"):
        read(tmp_path, [row], format="llava_video")


def test_an_image_placeholder_for_a_video_is_no_qwen_row(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    with pytest.raises(DataError, match=r"0 <video> placeholder\(s\) in the text, but 1 file"):
        read(tmp_path, [{"video": CLIP, "conversations": talk}], (CLIP,), format="qwen")


def test_qwen_finetune(tmp_path: Path) -> None:
    def talk(question: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "Answer: (B) Collision"}]

    files = ("images/001.jpg", "cats/001.jpg", "cats/002.jpg", "videos/005.mp4")
    rows = [
        {"image": files[0], "conversations": talk("<image>\nWhat's the main object in this picture?")},
        {"images": list(files[1:3]), "conversations": talk("<image>\n<image>\nWhat are the differences?")},
        {"video": files[3], "conversations": talk("<video>\nWhat caused it to move?\nOptions:\n(A) Gravity")},
        {"video": [files[3], files[3]], "conversations": talk("<video><video>Same?")},
    ]
    data = read(tmp_path, rows, files, format="qwen")
    assert [(len(sample.videos), len(sample.images)) for sample in data.samples] == [(0, 1), (0, 2), (1, 0), (2, 0)]
    assert data.samples[1].images == tuple(str(tmp_path / name) for name in files[1:3])
    assert texts(data.samples[2].messages[0]) == ["<video>", "What caused it to move?\nOptions:\n(A) Gravity"]


def test_ms_swift(tmp_path: Path) -> None:
    system = {"role": "system", "content": "You are a helpful and harmless assistant."}
    question = {"role": "user", "content": "<image>What is in the image, <video>What is in the video?"}
    answer = {"role": "assistant", "content": "An elephant, and a puppy running on the grass."}
    rows = [
        {"messages": [system, question, answer], "images": ["x.jpg"], "videos": ["x.mp4"]},
        {"messages": [{"role": "user", "content": "<video>What?"}, answer], "videos": [["2.jpg", "1.jpg"]]},
    ]
    data = read(tmp_path, rows, ("x.jpg", "x.mp4", "1.jpg", "2.jpg"), format="swift", frames_fps=2)
    assert texts(data.samples[0].messages[1]) == [
        "<image>",
        "What is in the image, ",
        "<video>",
        "What is in the video?",
    ]
    assert data.samples[1].videos == (FrameList((str(tmp_path / "2.jpg"), str(tmp_path / "1.jpg")), 2.0),)


def test_openai_parts_in_every_spelling(tmp_path: Path) -> None:
    content = [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "b.mp4", "video": None},
        {"type": "video", "url": (tmp_path / "a.mp4").as_uri()},
        {"type": "video_url", "video_url": {"url": "b.mp4"}},
        {"type": "video", "video": ["1.jpg", "2.jpg"]},
        {"type": "image_url", "image_url": {"url": "1.jpg", "detail": "high"}},
        {"type": "text", "text": "All?"},
    ]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]}
    [sample] = read(tmp_path, [row], ("a.mp4", "b.mp4", "1.jpg", "2.jpg"), format="openai", frames_fps=1).samples
    a, b, first, second = (str(tmp_path / name) for name in ("a.mp4", "b.mp4", "1.jpg", "2.jpg"))
    assert sample.videos == (a, b, a, b, FrameList((first, second), 1.0))
    assert sample.images == (first,)


def test_videochat2(tmp_path: Path) -> None:
    told = "Watch the video closely and choose the best option."
    rows = [
        {"video": "v.mp4", "QA": [{"i": told, "q": "What?", "a": "A."}, {"i": told, "q": "Where?", "a": "B."}]},
        {"video": "v.mp4", "QA": [{"q": "What?", "a": "A."}, {"i": "Be brief.", "q": "Where?", "a": "B."}]},
        {"image": "c.png", "QA": [{"i": "Describe the chart.", "q": "", "a": "Two lines."}]},
    ]
    data = read(tmp_path, rows, ("v.mp4", "c.png"))
    assert data.parts[0].formats == {"videochat2": 3}
    talks = [[texts(message) for message in sample.messages] for sample in data.samples]
    assert talks == [
        [["<video>", f"{told}\nWhat?"], ["A."], ["Where?"], ["B."]],
        [["<video>", "What?"], ["A."], ["Be brief.\nWhere?"], ["B."]],
        [["<image>", "Describe the chart."], ["Two lines."]],
    ]
    assert [message["role"] for message in data.samples[0].messages] == ["user", "assistant"] * 2


def test_captions(tmp_path: Path) -> None:
    rows = [{"video": "v.mp4", "caption": " A door opens.\n"}, {"images": ["c.png"], "caption": "Two lines."}]
    data = read(tmp_path, rows, ("v.mp4", "c.png"))
    talks = [[texts(message) for message in sample.messages] for sample in data.samples]
    assert talks == [
        [["<video>", "Describe the video."], ["A door opens."]],
        [["<image>", "Describe the image."], ["Two lines."]],
    ]


QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "This."}
PAIR = [{"i": "", "q": "What?", "a": "This."}]


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("videochat2", {"messages": [QUESTION, ANSWER]}, 'no "QA", which format videochat2 expects'),
        ("qwen", {"messages": [QUESTION, ANSWER]}, 'no "conversations", which format qwen expects'),
        ("swift", {"conversations": []}, 'no "messages", which format swift expects'),
        ("caption", {"QA": PAIR}, 'no "caption", which format caption expects'),
        ("swift", {"messages": [{"role": "user", "content": []}]}, 'turn 1: "content" is a list of parts'),
        ("auto", {"messages": [QUESTION, ANSWER], "QA": PAIR}, 'both "messages" and "QA"'),
        ("auto", {"video": "v.mp4", "QA": PAIR, "start": 1.5, "end": 3}, 'the row has "start" .part of a video.'),
        ("auto", {"messages": [QUESTION, ANSWER], "objects": {"bbox": [[1]]}}, 'the row has "objects" .boxes'),
        ("auto", {"messages": [QUESTION, ANSWER], "audios": ["a.wav"]}, 'the row has "audios"'),
        ("auto", {"messages": [QUESTION, {**ANSWER, "loss": False}]}, 'turn 2: "loss" is False'),
        ("auto", {"messages": [QUESTION, {**ANSWER, "weight": 0}]}, 'turn 2: "weight" is 0'),
        ("auto", {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4", "fps": 1}]}]},
         "has fps"),
        ("auto", {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4", "path": "w.mp4"}]}]},
         "has more than one file"),
        ("auto", {"video": ["v.mp4", "w.mp4"], "conversations": [{"from": "human", "value": "<image><video>"}]},
         r"1 <video> placeholder\(s\) in the text, but 2 file"),
        ("auto", {"QA": []}, '"QA" is empty'),
        ("auto", {"QA": [*PAIR, {"i": "", "q": "", "a": "x"}]}, 'QA item 2: neither "i" nor "q"'),
        ("auto", {"QA": [{"q": "What?"}]}, 'QA item 1: "a" is null'),
        ("auto", {"caption": " "}, '"caption" is empty text'),
        ("auto", {"caption": 3}, '"caption" is a number'),
    ],
)  # fmt: skip
def test_what_is_not_of_the_format_is_refused(row_format: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row, row_format)


def test_a_wrong_format_names_file_row_and_key(tmp_path: Path) -> None:
    rows = [{"video": CLIP, "QA": PAIR}, {"messages": [QUESTION, ANSWER]}]
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows, (CLIP,), format="videochat2")
    assert caught.value.message.startswith(f"{tmp_path / 'rows.json'} row 2: ")
    assert '"QA"' in caught.value.message


def test_keys_without_content_do_no_harm() -> None:
    """Tables give every row all columns."""
    row = {
        "messages": [{**QUESTION, "loss": None}, {**ANSWER, "loss": True}],
        "objects": None,
        "tools": [],
        "audios": [],
    }
    assert read_row(row)[1] == "swift"


def test_what_was_recognised_is_told(tmp_path: Path) -> None:
    rows = [{"video": CLIP, "QA": PAIR}] * 2 + [{"messages": [QUESTION, ANSWER]}]
    [line] = read(tmp_path, rows, (CLIP,)).describe()
    assert line == f"{tmp_path / 'rows.json'}: 3 rows (2 videochat2, 1 swift)"
