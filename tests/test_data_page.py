"""The examples of docs/data.md are read as the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.formats import FORMATS
from evs_train.data.manifest import read_data
from evs_train.data_config import DataSection

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### `(\w+)`\n.*?```json\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))


def names(value: Any) -> Iterator[str]:
    """Texts that look like names of media."""
    if isinstance(value, str):
        yield from [value] if re.fullmatch(r"[\w/]+\.(mp4|png|jpg)", value) else []
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from names(inner)


def lay_out(folder: Path, example: str) -> Path:
    for name in names([json.loads(line) for line in example.splitlines()]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not opened here")
    (folder / "rows.jsonl").write_text(example, encoding="utf-8")
    return folder / "rows.jsonl"


def test_every_format_has_an_example() -> None:
    assert list(EXAMPLES) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_examples_are_read_as_their_format(tmp_path: Path, name: str) -> None:
    rows = lay_out(tmp_path, EXAMPLES[name])
    for row_format in ("auto", name):
        data = read_data(DataSection.model_validate({"rows": str(rows), "format": row_format, "frames_fps": 2}))
        assert data.parts[0].formats == {name: 2}
        assert all(sample.videos or sample.images for sample in data.samples)


def test_the_examples_of_the_readme_are_read(tmp_path: Path) -> None:
    [example] = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(read_data(DataSection(rows=[str(lay_out(tmp_path, example))])).samples) == 2


def test_a_folder_of_videos_becomes_rows(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"not opened here")
        (tmp_path / f"{name}.txt").write_text(f"A clip called {name}.\n", encoding="utf-8")
    exec(code.replace("/data/clips", str(tmp_path)), {})
    data = read_data(DataSection(rows=[str(tmp_path / "rows.jsonl")]))
    assert data.parts[0].formats == {"caption": 2}
    assert [sample.videos for sample in data.samples] == [(str(tmp_path / f"{name}.mp4"),) for name in ("a", "b")]


def test_the_listing_is_read(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(datasets:.*?)```", PAGE, flags=re.DOTALL)
    root = tmp_path / "root"
    (tmp_path / "captions").mkdir()
    lay_out(tmp_path / "captions", EXAMPLES["caption"])
    lay_out(root, EXAMPLES["llava_video"]).rename(tmp_path / "questions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "mix.yaml").write_text(text.replace("/data/llava_video", str(root)).replace("first:10%", "first:90%"))
    data = read_data(DataSection(rows=[str(tmp_path / "mix.yaml")]))
    assert data.shares == ((2, 1), (2, 3))
