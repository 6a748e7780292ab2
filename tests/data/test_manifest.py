"""Tests of `evs_train.data.manifest`: both row formats, every refusal, and the fingerprint."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.manifest import Sample, fingerprint, read_rows
from evs_train.errors import DataError, MediaError

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "This."}]
TEXT_TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "p.png", "q.png"):
        (tmp_path / name).write_bytes(b"not opened here")
    return tmp_path


def write(folder: Path, rows: Any, name: str = "rows.json") -> Path:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def read_one(folder: Path, row: Any) -> Sample:
    [sample] = read_rows([write(folder, [row])])
    return sample


def test_llava_row(folder: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *TURNS]
    assert read_one(folder, {"id": 7, "video": "a.mp4", "conversations": turns}) == Sample(
        id="7",
        source=f"{folder / 'rows.json'} row 1",
        messages=(
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        ),
        videos=(str(folder / "a.mp4"),),
        images=(),
    )


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<video>\nWhat?", ["<video>", "What?"]),
        ("What?\n<video>", ["What?", "<video>"]),
        ("<video>", ["<video>"]),
        ("Here: <video> is it\n\nso?", ["Here: ", "<video>", " is it\n\nso?"]),
        ("One\n\n<video>\n\ntwo", ["One\n", "<video>", "\ntwo"]),
    ],
)
def test_one_newline_beside_a_placeholder_goes(folder: Path, text: str, content: list[str]) -> None:
    row = {"video": "a.mp4", "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes"}]}
    parts = read_one(folder, row).messages[0]["content"]
    assert [part.get("text", f"<{part['type']}>") for part in parts] == content


def test_order_of_mixed_media(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\n<video>\n<image>First?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "And <video>?"},
        {"from": "gpt", "value": "No."},
    ]
    row = {"videos": ["b.mp4", "a.mp4"], "image": ["q.png", "p.png"], "conversations": turns}
    sample = read_one(folder, row)
    assert [Path(path).name for path in sample.videos] == ["b.mp4", "a.mp4"]
    assert [Path(path).name for path in sample.images] == ["q.png", "p.png"]
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "video", "image", "text"]


def test_openai_parts_name_their_files(folder: Path) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": f"file://{folder / 'p.png'}"}},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "Same as <video>?"},
        {"type": "video_url", "video_url": {"url": "b.mp4"}},
        {"type": "image"},
    ]
    row = {
        "videos": ["a.mp4"],
        "images": ["q.png"],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}],
    }
    sample = read_one(folder, row)
    assert sample.videos == tuple(str(folder / name) for name in ("b.mp4", "a.mp4", "b.mp4"))
    assert sample.images == tuple(str(folder / name) for name in ("p.png", "q.png"))
    kinds = ["image", "video", "text", "video", "text", "video", "image"]
    assert [part["type"] for part in sample.messages[0]["content"]] == kinds
    assert sample.id == "rows.json:1"


def test_jsonl_numbers_lines_and_keeps_unicode(folder: Path) -> None:
    (folder / "Küche 台所").mkdir()
    (folder / "Küche 台所" / "vidéo.mp4").write_bytes(b"x")
    row = {"video": "Küche 台所/vidéo.mp4", "conversations": [TURNS[0], {"from": "gpt", "value": "Grüße\u2028台所"}]}
    path = folder / "zeilen é.jsonl"
    path.write_text("\ufeff\n" + json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    [sample] = read_rows([str(path)])
    assert sample.id == "zeilen é.jsonl:2"
    assert sample.source == f"{path} row 2"
    assert sample.videos == (str(folder / "Küche 台所" / "vidéo.mp4"),)
    assert sample.messages[1]["content"][0]["text"] == "Grüße\u2028台所"


def test_media_root_and_several_files(folder: Path) -> None:
    (folder / "rows").mkdir()
    row = {"video": "a.mp4", "conversations": TURNS}
    paths = [write(folder / "rows", [row], "one.json"), write(folder / "rows", [row], "two.jsonl")]
    samples = read_rows(paths, media_root=folder)
    assert [sample.id for sample in samples] == ["one.json:1", "two.jsonl:1"]
    assert samples[0].videos == (str(folder / "a.mp4"),)
    with pytest.raises(MediaError, match=r"one\.json row 1: video file not found"):
        read_rows(paths[:1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "the row is text"),
        ([], "the row is a list"),
        (None, "the row is null"),
        ({"conversation": TURNS}, 'has no "conversations" or "messages" or .*; its keys: conversation.*did you mean'),
        ({"text": "x", "id": 1}, "its keys: text, id"),
        ({"conversations": TURNS, "messages": []}, "both"),
        ({"conversations": []}, '"conversations" is empty'),
        ({"conversations": "x"}, '"conversations" is text'),
        ({"conversations": [3]}, "turn 1 is a number"),
        ({"conversations": [{"from": "human", "values": "x"}]}, 'turn 1 has no "value".*did you mean "value" by'),
        ({"messages": [{"from": "human", "value": "x"}]}, 'turn 1 has no "role"; its keys: from, value'),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1: unknown role 'robot'"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "turn 1: unknown role"),
        ({"conversations": [{"from": "human", "value": None}]}, 'turn 1: "value" is null'),
        ({"conversations": TEXT_TURNS[:1]}, "no assistant turn"),
        ({"conversations": TURNS}, r"1 <video> placeholder\(s\) in the text, but 0 file"),
        ({"video": ["a.mp4", "b.mp4"], "conversations": TURNS}, r"1 <video> placeholder.*but 2 file"),
        ({"image": "p.png", "conversations": TEXT_TURNS}, r"0 <image> placeholder\(s\) in the text, but 1 file"),
        ({"video": "", "conversations": TURNS}, "a video is empty text"),
        ({"video": 3, "conversations": TURNS}, "a video is a number"),
        ({"video": "https://x.org/a.mp4", "conversations": TURNS}, "not a local file"),
        ({"video": "a.mp4", "conversations": [TEXT_TURNS[0], {"from": "gpt", "value": "<video>"}]}, "of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "unknown type 'sound'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'without a "text"'),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "turn 1: a part is text"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, *[
            {"role": "assistant", "content": "x"}]]}, "a video is empty text"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(folder: Path, row: Any, message: str) -> None:
    good = {"conversations": TEXT_TURNS}
    with pytest.raises(DataError, match=message) as caught:
        read_rows([write(folder, [good, row])])
    assert caught.value.message.startswith(f"{folder / 'rows.json'} row 2: ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[\n{"id": 1,}\n]', "rows.json: not JSON: .* at line 2 column"),
        ("rows.jsonl", '{"conversations": []\n', "rows.jsonl row 1: not JSON: .* at column 21"),
        ("rows.json", "{}", "holds an object, not a list"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.jsonl", "\n", "holds no rows"),
        ("rows.csv", "a,b", r"unknown kind of data file \(known are .json, .jsonl, .parquet, .arrow, .tar, and .yaml"),
        ("clip.mp4", "", r"unknown kind of data file .*videos and images are named in rows \(docs/data.md\)"),
        ("rows.json", None, "data file cannot be read: No such file"),
    ],
)
def test_bad_files_are_refused(folder: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows([folder / name])


def test_other_encodings_are_refused(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes('{"x": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows([folder / "rows.jsonl"])


def test_all_bad_rows_are_told_at_once(folder: Path) -> None:
    bad = [{"conversations": []} for _ in range(30)]
    lost = {"video": "gone.mp4", "conversations": TURNS}
    paths = [write(folder, [lost, *bad], "one.json"), write(folder, [bad[0]], "two.jsonl"), folder / "three.json"]
    with pytest.raises(DataError) as caught:
        read_rows(paths)
    lines = caught.value.message.splitlines()
    assert lines[0] == "33 bad rows or files:"
    assert "one.json row 1: video file not found" in lines[1]
    assert "one.json row 20:" in lines[20]
    assert lines[21].strip() == "... and 13 more"


def test_only_missing_media_is_a_media_error(folder: Path) -> None:
    lost = {"video": "gone.mp4", "conversations": TURNS}
    with pytest.raises(MediaError, match=r"rows\.json row 2: video file not found: .*gone\.mp4"):
        read_rows([write(folder, [lost, lost])])


def test_samples_are_a_sequence_that_workers_can_be_sent(folder: Path) -> None:
    rows = [{"id": number, "video": "a.mp4", "conversations": TURNS} for number in range(5)]
    samples = read_rows([write(folder, rows)])
    assert [sample.id for sample in samples] == list("01234")
    assert [sample.id for sample in samples[1:4:2]] == ["1", "3"]
    assert samples[-1] == samples[4] == list(pickle.loads(pickle.dumps(samples)))[4]
    assert samples[-1].videos == (str(folder / "a.mp4"),)
    with pytest.raises(IndexError):
        samples[5]


def test_a_lost_file_keeps_its_reason(folder: Path) -> None:
    with pytest.raises(MediaError) as caught:
        read_rows([write(folder, [{"video": "gone.mp4", "conversations": TURNS}])])
    assert caught.value.reason == "missing"


def test_the_fingerprint_covers_weights(folder: Path) -> None:
    samples = read_rows([write(folder, [{"conversations": TEXT_TURNS}] * 2)])
    prints = {fingerprint(samples), fingerprint(samples, ((1, 1), (1, 1))), fingerprint(samples, ((1, 2), (1, 0)))}
    assert len(prints) == 3


def test_the_fingerprint_is_pinned(folder: Path) -> None:
    """A change here would refuse to resume runs that were begun before it."""
    rows = [{"id": "x", "video": "a.mp4", "conversations": TURNS}, {"id": "y", "conversations": TEXT_TURNS}]
    assert fingerprint(read_rows([write(folder, rows)])).startswith("848b9fa99871052e")


def test_fingerprint_follows_content_and_not_place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = [
        {"id": "x", "video": "a.mp4", "conversations": TURNS},
        {"id": "y", "image": "p.png", "conversations": [{"from": "human", "value": "<image>é"}, TURNS[1]]},
    ]
    samples = read_rows([write(folder, rows)])
    reference = fingerprint(samples)
    assert len(reference) == 64
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("a.mp4", "b.mp4", "p.png"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    assert fingerprint(read_rows([write(elsewhere, rows, "moved.jsonl")])) == reference

    changed = [
        rows[::-1],
        rows[:1],
        [{**rows[0], "id": "z"}, rows[1]],
        [{**rows[0], "video": "b.mp4"}, rows[1]],
        [{**rows[0], "conversations": [TURNS[0], {"from": "gpt", "value": "That."}]}, rows[1]],
    ]
    prints = {fingerprint(read_rows([write(elsewhere, variant)])) for variant in changed}
    assert len(prints) == len(changed)
    assert reference not in prints
    (folder / "a.mp4").write_bytes(b"longer than it was before")
    assert fingerprint(samples) != reference
    (folder / "a.mp4").unlink()
    with pytest.raises(MediaError, match=r"row 1: .*a\.mp4: cannot be read"):
        fingerprint(samples)
