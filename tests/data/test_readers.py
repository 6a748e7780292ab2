"""Files of rows: JSON in pieces, tables as `datasets` and pyarrow write them, and files that are no such thing."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value, disable_progress_bars

from evs_train.data import readers
from evs_train.data.manifest import TrainingData, read_data
from evs_train.data_config import DataSection
from evs_train.errors import DataError

disable_progress_bars()
ROWS = [
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A."}]},
    {"video": None, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "B."}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"not opened here")
    return tmp_path


def read(path: Path, **options: Any) -> TrainingData:
    return read_data(DataSection(rows=[str(path)], **options))


def answers(data: TrainingData) -> list[str]:
    return [sample.messages[-1]["content"][0]["text"] for sample in data.samples]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    values = [{"a": "[1,\u2028 2]", "b": [1.5e3, None]}, 12345, "x", [], {"ü": {}}, True, -0.25]
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
        assert list(readers.read_file(tmp_path / "rows.json")) == list(enumerate(values, start=1))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n {"b": 2}]', "Expecting ',' delimiter at line 2 column 2"),
        ('[{"a": 1},\n {"b" 2}]', "Expecting ':' delimiter at line 2 column 7"),
        ('[{"a": 1},\n', "Expecting value at line"),
        ('[{"a": 1', "Expecting ',' delimiter at line 1 column 9"),
        ('[{"a": 1},]', "Expecting value at line 1 column 11"),
        ("[1] 2", "Extra data at line 1 column 5"),
        ('{"a": 1}\n{"a": 2}\n', "Extra data at line 2 column 1.*name the file .jsonl"),
    ],
)
def test_broken_json_is_told_by_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str, message: str
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(readers.read_file(tmp_path / "rows.json"))


def write_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(str(path))


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def save_to_disk(path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.parquet", write_parquet),
        ("odd [name] *.parquet", write_parquet),
        ("file.arrow", write_arrow_file),
        ("stream.arrow", write_arrow_stream),
        ("saved", save_to_disk),
    ],
)
def test_tables(folder: Path, name: str, write: Any) -> None:
    write(folder / name)
    data = read(folder / name, media_root=str(folder))
    assert answers(data) == ["A.", "B."]
    assert [sample.videos for sample in data.samples] == [(str(folder / "a.mp4"),), ()]
    assert data.samples[1].source == f"{folder / name} row 2"


def test_images_in_tables_are_paths_or_refused(folder: Path) -> None:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "C."}]
    for name, content in (("paths", None), ("bytes", b"PNG")):
        row = {"image": {"path": "a.mp4", "bytes": content}, "conversations": talk}
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    assert read(folder / "paths.parquet").samples[0].images == (str(folder / "a.mp4"),)
    with pytest.raises(DataError, match=r"bytes\.parquet row 1: an image is embedded as bytes"):
        read(folder / "bytes.parquet")


def test_columns_of_older_and_typed_data_sets(folder: Path) -> None:
    """`Image` columns must not be decoded; a `Sequence` of objects comes back as an object of lists."""
    features = Features(
        {"image": Image(), "conversations": Sequence({"from": Value("string"), "value": Value("string")})}
    )
    talk = {"from": ["human", "gpt"], "value": ["What?", "C."]}
    rows = [{"image": None, "conversations": talk}, {"image": {"path": None, "bytes": b"PNG"}, "conversations": talk}]
    Dataset.from_list(rows[:1], features=features).to_parquet(str(folder / "text.parquet"))
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "image.parquet"))
    assert answers(read(folder / "text.parquet")) == ["C."]
    with pytest.raises(DataError, match=r"image\.parquet row 2: 0 <image> placeholder"):
        read(folder / "image.parquet")


def test_files_that_are_no_rows(folder: Path) -> None:
    (folder / "bad.parquet").write_bytes(b"nonsense, and not a little of it")
    (folder / "bad.arrow").write_bytes(b"nonsense, and not a little of it")
    odd = {b"huggingface": b'{"info": {"features": {"id": {"_type": "Sequence"}}}}'}
    pq.write_table(pa.Table.from_pylist(ROWS).replace_schema_metadata(odd), folder / "odd.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS).replace_schema_metadata({b"huggingface": b"3"}), folder / "odder.parquet")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(folder / "splits"))
    for name, message in {
        "bad.parquet": "cannot be read as parquet",
        "bad.arrow": "cannot be read as arrow",
        "odd.parquet": "cannot be read as parquet",
        "odder.parquet": "cannot be read as parquet",
        "gone.parquet": "data file cannot be read: No such file",
        "rows.jsonl.gz": "compressed file is not read .decompress it, to rows.jsonl",
        "splits": "holds several splits",
        ".": "is a folder, but no data set written by save_to_disk .*; videos and images are named in rows",
    }.items():
        with pytest.raises(DataError, match=message):
            read(folder / name)


def test_one_line_in_another_encoding_is_one_bad_row(folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    (folder / "rows.jsonl").write_bytes(b"\n".join([lines[0], '{"x": "é"}'.encode("latin-1"), lines[1]]))
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: not UTF-8 text \(byte 7 of the line\)"):
        read(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("data-00000-of-00001.arrow", struct.pack("<3i", 0, 1, 2), struct.pack("<3i", 0, 1, 2**30), "out of bounds"),
        ("state.json", b'"filename": "', b'"filename": "../saved/', "not in the folder"),
        ("state.json", b'"_data_files"', b'"_data"', "names no data files"),
        ("state.json", b'"filename": "', b'"filename": 3, "b": "', "names no data files"),
    ],
)
def test_a_saved_data_set_that_is_damaged(folder: Path, name: str, old: bytes, new: bytes, reason: str) -> None:
    """`datasets` maps it and checks nothing: offsets that lead out of the file would end the process."""
    rows = [
        {"id": name, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A."}]}
        for name in "ab"
    ]
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    assert answers(read(folder / "saved")) == ["A.", "A."]
    whole = (folder / "saved" / name).read_bytes()
    assert old in whole
    (folder / "saved" / name).write_bytes(whole.replace(old, new))
    with pytest.raises(DataError, match=reason):
        read(folder / "saved")
