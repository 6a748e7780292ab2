"""The curve of a real HTTP server in a process of its own, and whether it is found out when it does not prune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evs_train.errors import DataError, RecipeError, ServerError
from evs_train.evaluate import server as module
from evs_train.evaluate.console import sentences
from evs_train.evaluate.options import parse_options
from evs_train.evaluate.records import read_records
from evs_train.evaluate.run import evaluate
from evs_train.evaluate.server import proof
from evs_train.generation import PrunedModel
from tests.evaluate.test_layouts import mvbench
from tests.runs import ROOT


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evaluate.openai_server", str(checkpoint)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def rows(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "rows.jsonl"
    clips = [str(world.parent / "clips" / f"{number:06d}.mp4") for number in range(2)]
    lines = [
        {"id": "choice", "video": clips[0], "question": "What moves?", "options": ["a ball", "a box"], "answer": "B"},
        {"id": "free", "video": clips[1], "question": "Where to?", "answer": "left"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(url: str, rows: Path, out: Path, rate: float, **keys: Any) -> dict[str, Any]:
    given = {"model": f"{url}/v1", "data": rows, "out": out, "rates": [rate], "fps": 8, "max_new_tokens": 4, **keys}
    words = [f"{key}={json.dumps(v) if isinstance(v, list | dict) else v}" for key, v in given.items()]
    results = evaluate(parse_options(words))
    assert results is not None
    return results


def said(results: dict[str, Any]) -> str:
    return "\n".join(sentences(results))


def test_points_of_servers_at_several_rates_make_one_curve(
    address: str, checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    for rate in (0.0, 0.75):
        results = run(f"{address}/{rate}", rows, tmp_path, rate, processor=checkpoint)
    (model,) = results["models"]
    dense, pruned = model["points"]
    assert (dense["proof"], pruned["proof"]) == ({"dense": 2}, {"pruned": 2})
    assert dense["retained_share"] == 1.0
    assert pruned["retained_share"] < 0.35
    assert pruned["prompt_tokens"] < dense["prompt_tokens"]
    assert "difference" in pruned
    assert "rate 0.75: by its count of prompt tokens 2 pruned. The server prunes as it should." in said(results)
    local = PrunedModel.load(checkpoint, dtype="float32", device="cpu", data={"fps": 8.0})
    clip = json.loads(rows.read_text().splitlines()[1])["video"]
    parts = [{"type": "video", "video": clip}, {"type": "text", "text": "Where to?"}]
    for one in read_records(tmp_path):
        if one.question == "free":
            expected = local.answer([{"role": "user", "content": parts}], one.rate, max_new_tokens=4)
            assert one.said == expected.strip()


def test_a_server_that_ignores_the_rate_is_found_out(
    address: str, checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    results = run(f"{address}/ignores", rows, tmp_path / "a", 0.75, processor=checkpoint)
    assert results["models"][0]["points"][0]["proof"] == {"ignored": 2}
    assert "does NOT prune" in said(results)
    run(f"{address}/0.0", rows, tmp_path / "b", 0.0)
    without = run(f"{address}/ignores", rows, tmp_path / "b", 0.75)  # its own dense counts tell, too
    assert "counts as many prompt tokens as at rate 0. The server does NOT prune" in said(without)
    honest = run(f"{address}/0.5", rows, tmp_path / "b", 0.5)
    assert not any("rate 0.5" in line and "NOT" in line for line in sentences(honest))


def test_other_counts_and_none_prove_nothing(address: str, checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    other = run(f"{address}/0.75", rows, tmp_path / "a", 0.5, processor=checkpoint)
    assert other["models"][0]["points"][0]["proof"] == {"other": 2}
    assert "it is not shown that it prunes" in said(other)
    untold = run(f"{address}/untold", rows, tmp_path / "b", 0.5, processor=checkpoint)
    assert "proof" not in untold["models"][0]["points"][0]


def test_videos_are_sent_as_videos_with_the_fields_that_were_asked_for(
    address: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.KEY_VARIABLE, "secret")
    run(f"{address}/0.5", rows, tmp_path, 0.5, request={"media_io_kwargs": {"video": {"num_frames": 4}}})
    with urllib.request.urlopen(f"{address}/requests") as answer:
        last = json.loads(answer.read())["requests"][-2:]
    for request in last:
        assert request["media_io_kwargs"] == {"video": {"num_frames": 4}}
        assert request["authorization"] == "Bearer secret"
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0, 4)
        assert request["messages"][0]["type"] == "video_url"
        assert request["messages"][0]["video_url"].startswith("data:video/mp4;base64,")
    with pytest.raises(RecipeError, match="request was"):
        run(f"{address}/0.5", rows, tmp_path, 0.5)


def test_a_busy_server_is_asked_again(
    address: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.01))
    results = run(f"{address}/busy", rows, tmp_path, 0.0, parallel=1)
    assert len(results["models"][0]["points"]) == 1


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("/refuses", {}, "answers 400: .*no videos here"),
        ("/odd", {}, "another form than OpenAI's"),
        ("/0.5", {"served": "other"}, "serves tiny, not other"),
        ("/nowhere", {}, "answers 404: .*no such path"),
    ],
)
def test_a_server_that_cannot_be_used(
    address: str, rows: Path, tmp_path: Path, path: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        run(f"{address}{path}", rows, tmp_path, 0.5, **keys)


def test_a_server_that_is_not_there(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))
    with pytest.raises(ServerError, match="does not answer"):
        run("http://127.0.0.1:9", rows, tmp_path, 0.5)


def test_segments_and_frames_are_refused_by_name_or_left_out(address: str, tmp_path: Path) -> None:
    mvbench(tmp_path / "mvbench")
    with pytest.raises(DataError, match=r"action_sequence.json row 1: it is about a segment"):
        run(f"{address}/0.5", tmp_path / "mvbench", tmp_path / "out", 0.5, layout="mvbench")


@pytest.mark.parametrize(
    ("counted", "pruned", "dense", "verdict"),
    [
        (40, 40, 100, "pruned"),
        (100, 40, 100, "ignored"),
        (100, 100, 100, "dense"),
        (70, 40, 100, "other"),
        (None, 1, 2, None),
    ],
)
def test_what_a_count_proves(counted: int | None, pruned: int, dense: int, verdict: str | None) -> None:
    assert proof(counted, pruned, dense) == verdict


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=[http://a/v1,b]", "data=x"], "a server is evaluated alone"),
        (["model=http://a/v1", "data=x"], "say it, as in rates"),
        (["model=http://a/v1", "data=x", "rates=[0.5]"], "out=... is missing"),
    ],
)
def test_options_that_a_server_cannot_have(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _ = parse_options(words).folder
