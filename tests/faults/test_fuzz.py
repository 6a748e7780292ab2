"""Parsers of rows, recipes, listings, shards and indexes under inputs made to break them: only our errors may come out.

Inputs are valid ones, changed: other types and values anywhere, keys lost, doubled and misspelt, bytes flipped, cut off
and repeated. `make fuzz` runs 100,000, shared out by `SHARES`; a test run a few hundred, always the same ones.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from evs_train.data.formats import read_row
from evs_train.data.index import Entry, Facts, Fault, MediaIndex
from evs_train.data.manifest import read_data
from evs_train.data_config import DataSection
from evs_train.errors import EvsTrainError
from evs_train.evaluate.options import parse_options
from evs_train.recipe import RECIPES_DIR, load_recipe, recipe_names

INPUTS = int(os.environ.get("EVS_TRAIN_FUZZ", "600"))
SHARES = {
    "rows": 0.48,
    "recipes": 0.1,
    "overrides": 0.1,
    "listings": 0.08,
    "bytes": 0.2,
    "tables": 0.02,
    "index": 0.02,
}


def fuzzed(share: str) -> Callable[[Any], Any]:
    """Run a test over its share of the inputs: always the same few in a test run, others each time in `make fuzz`."""
    return settings(
        max_examples=max(20, int(INPUTS * SHARES[share])),
        deadline=None,
        database=None,
        derandomize="EVS_TRAIN_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


def _nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, -(2**70), 10**400, 1e308, -0.0]),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(
        [
            "", " ", "\0", "a\0b.mp4", "\ud800", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
            "http://x/y.mp4", "concat:a|b", "data:video/mp4;base64,AAAA", "~/x", "<video>", "<image><video>", "*", "[",
            "a" * 5000, ".",
            "\u2028", "{{ 1 }}", "%s", "first:10%", "random:" + "9" * 30, "end:0.0%", "1e400",
            "!!python/object:os.system",
        ]
    ),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.one_of(st.none(), st.integers(), st.text(max_size=4)), max_size=3),
    st.binary(max_size=8),
    st.integers(1, 400).map(_nested),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in items for place in places(one, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, originals: list[Any]) -> Any:
    """One of `originals` with up to three changes."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            value = draw(st.one_of(ODD, st.just(value)))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, what = path[-1], draw(st.integers(0, 4))
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[draw(st.text(max_size=6) | st.sampled_from(["video", "messages", "QA", "caption", "<<"]))] = (
                parent.pop(key)
            )
        elif what == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = draw(ODD)
    return value


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut off, repeated, left out, or put in."""
    raw = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(raw) + 1)
        kind = chance.randrange(6)
        if kind == 0 and raw:
            raw[min(place, len(raw) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del raw[place:]
        elif kind == 2:
            del raw[place : place + chance.randrange(64)]
        elif kind == 3:
            raw[place:place] = raw[place : place + chance.randrange(256)]
        elif kind == 4:
            raw[place:place] = chance.choice(
                [
                    b"\0",
                    b"\xff\xfe",
                    b"\xed\xa0\x80",
                    b'{"a":1,"a":2}',
                    b"[" * 2000,
                    b"9" * 5000,
                    b"NaN",
                    b"\\ud800",
                    b"&a [*a]",
                    b"\n",
                ]
            )
        else:
            raw[place : place + 4] = chance.randbytes(4)
    return bytes(raw)


TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
ANSWER = {"role": "assistant", "content": "A."}
QUESTION = {"type": "text", "text": "?"}
ROWS: list[Any] = [
    {"id": "a", "video": "clip.mp4", "conversations": TURNS},
    {"id": 3, "image": ["p.png"], "conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]},
    {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, TURNS[1]]},
    {"messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": ["clip.mp4"]},
    {"messages": [
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "clip.mp4"}}, QUESTION]},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]},
    {"messages": [{"role": "user", "content": "<video>"}, ANSWER], "videos": [["p.png", "p.png"]]},
    {"video": "clip.mp4", "QA": [{"i": "Watch.", "q": "What?", "a": "A cat."}, {"q": "Where?", "a": "There."}]},
    {"caption": "A cat.", "video": {"path": "clip.mp4", "bytes": None}},
    {"video": "frames", "conversations": TURNS},
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("clip.mp4", "p.png"):
        (folder / name).write_bytes(b"not looked into")
    (folder / "frames").mkdir()
    (folder / "frames" / "1.png").write_bytes(b"not looked into")
    return folder


def refused_or_read(call: Callable[[], object]) -> None:
    """The one property: what cannot be read is refused by an error of ours, which can be told to a person."""
    try:
        call()
    except EvsTrainError as error:
        assert str(error).encode("utf-8", "backslashreplace")  # noqa: PT017


def write_yaml(file: Path, raw: Any) -> bool:
    """Whether there is a YAML text for `raw`, and it was written."""
    try:
        text = yaml.safe_dump(raw, allow_unicode=True)
    except (yaml.YAMLError, ValueError):
        return False
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return True


def section(root: Path, file: Path, **options: Any) -> DataSection:
    return DataSection(rows=[str(file)], media_root=str(root), frames_fps=2.0, **options)


@fuzzed("rows")
@given(
    row=changed(ROWS), form=st.sampled_from(["auto", "qwen", "llava_video", "swift", "openai", "videochat2", "caption"])
)
def test_rows(root: Path, row: Any, form: str) -> None:
    """As Python values, which tables yield, and as the JSON that says the same."""
    refused_or_read(lambda: read_row(row, form))
    file = root / "rows.jsonl"
    try:
        text = json.dumps(row)
    except (TypeError, ValueError):  # bytes, and integers that Python does not print
        return
    file.write_text(text + "\n", encoding="utf-8")
    refused_or_read(lambda: read_data(section(root, file, format=form)))


@fuzzed("recipes")
@given(raw=changed([yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text()) for name in recipe_names()]))
def test_recipes(root: Path, raw: Any) -> None:
    file = root / "recipe.yaml"
    if write_yaml(file, raw):
        refused_or_read(lambda: load_recipe([f"recipe={file}"]))


KEYS = [
    "evs.rate", "evs.rate.kind", "data.rows", "data.video_kwargs", "train", "train.steps.x", "", ".", "seed",
    "model.path", "optim.lr_by_part",
]  # fmt: skip
VALUES = [
    "1e-5", "[.5,.9]", "{kind: beta, mode: 0.75}", "{kind: choice, rates: [0.5, .nan]}", "&a [*a]", "2026-13-01",
    "!!python/name:os.system x", "0x1F", "1:30", "'", "{a: 1, a: 2}", "? [1]\n: 2", "!!binary aGk=", "!!set {a}",
    "<<: {a: 1}", "{<<: 3}", "-" * 400, "[" * 1200, "\ud800", "null", "{kind: mixture, of: {kind: uniform}}",
]  # fmt: skip


@fuzzed("overrides")
@given(
    words=st.lists(
        st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), st.sampled_from(VALUES) | st.text(max_size=20)),
        max_size=3,
    )
)
def test_overrides(words: list[tuple[str, str]]) -> None:
    refused_or_read(lambda: load_recipe(["recipe=tiny", *(f"{key}={value}" for key, value in words)]))
    refused_or_read(lambda: parse_options(["model=m", "data=d", *(f"{key}={value}" for key, value in words)]))


@fuzzed("listings")
@given(
    raw=changed(
        [
            {"datasets": [
                {"json_path": "ok.json", "sampling_strategy": "random:50%", "weight": 2.0, "format": "qwen"},
                {"json_path": "ok*.json", "sampling_strategy": "first:1", "weight": 1.0, "media_root": "."},
            ]}
        ]
    )
)  # fmt: skip
def test_listings(root: Path, raw: Any) -> None:
    (root / "ok.json").write_text(json.dumps(ROWS[:1] * 4), encoding="utf-8")
    file = root / "listing.yaml"
    if write_yaml(file, raw):
        refused_or_read(lambda: read_data(section(root, file)))


def shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (
            ("a.json", json.dumps(ROWS[0]).encode()),
            ("a.mp4", b"x" * 30),
            ("b.txt", b"A cat."),
            ("b.mp4", b"y"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


FILES = {
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".tar": shard(),
    ".yaml": b"datasets:\n- {json_path: ok.json, sampling_strategy: 'first:50%'}\n- json_path: \"ok*.json\"\n",
}


@fuzzed("bytes")
@given(suffix=st.sampled_from(sorted(FILES)), chance=st.randoms(use_true_random=False))
def test_damaged_files(root: Path, suffix: str, chance: random.Random) -> None:
    file = root / f"damaged{suffix}"
    file.write_bytes(damaged(FILES[suffix], chance))
    refused_or_read(lambda: read_data(section(root, file)))
    if suffix == ".yaml":
        refused_or_read(lambda: load_recipe([f"recipe={file}"]))


def tables() -> dict[str, bytes]:
    table = pyarrow.Table.from_pylist([{"id": "a", "video": "clip.mp4", "conversations": TURNS}] * 3)
    buffers: dict[str, io.BytesIO] = {".parquet": io.BytesIO(), ".arrow": io.BytesIO()}
    parquet.write_table(table, buffers[".parquet"])
    with pyarrow.ipc.new_stream(buffers[".arrow"], table.schema) as writer:
        writer.write_table(table)
    return {suffix: buffer.getvalue() for suffix, buffer in buffers.items()}


@fuzzed("tables")
@given(suffix=st.sampled_from([".parquet", ".arrow"]), chance=st.randoms(use_true_random=False))
def test_damaged_tables(root: Path, suffix: str, chance: random.Random) -> None:
    file = root / f"damaged{suffix}"
    file.write_bytes(damaged(TABLES[suffix], chance))
    refused_or_read(lambda: read_data(section(root, file)))


@fuzzed("index")
@given(facts=st.booleans(), chance=st.randoms(use_true_random=False))
def test_damaged_indexes(root: Path, facts: bool, chance: random.Random) -> None:
    file = root / "media.arrow"
    video = Facts("video", 64, 48, "h264", 16, 8.0, 2.0, 0, "fps 2", (0, 4, 8), (0.0, 0.5, 1.0))
    good = {f"/clips/{number}.mp4": Entry(1000 + number, 5, video, backend="decord") for number in range(5)}
    MediaIndex({**good, "/bad.mp4": Entry(7, 5, fault=Fault("damaged", "remove it", "truncated"))}).write(file)
    file.write_bytes(damaged(file.read_bytes(), chance))
    refused_or_read(lambda: MediaIndex.read(file, facts=facts))


TABLES = tables()
