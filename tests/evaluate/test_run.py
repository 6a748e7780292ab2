"""Whole evaluations of a tiny checkpoint: what is recorded and summed up, killed and resumed, shared out, compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evs_train.errors import MediaError, RecipeError
from evs_train.evaluate import local
from evs_train.evaluate.layouts import read_questions
from evs_train.evaluate.local import LocalModel, from_its_start, prefill_costs
from evs_train.evaluate.options import EvalOptions, parse_options
from evs_train.evaluate.records import Record, read_records
from evs_train.evaluate.run import evaluate
from evs_train.evaluate.summary import summarise
from evs_train.evs import retained_tokens
from evs_train.generation import PrunedModel
from evs_train.models.tiny import build_tiny
from tests.evaluate.test_layouts import WRITERS, mvbench
from tests.runs import ROOT, torchrun

OPTIONS = ["A red circle.", "A blue square.", "A green triangle."]
RATES = [0.0, 0.5, 0.9]
NUM_CLIPS = 5


@pytest.fixture(scope="module")
def rows(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about each of five clips: one with options, one to answer freely."""
    path = tmp_path_factory.mktemp("eval") / "questions.jsonl"
    lines = []
    for number in range(NUM_CLIPS):
        video = str(world.parent / "clips" / f"{number:06d}.mp4")
        choice = {"question": "What moves?", "options": OPTIONS, "answer": number % 3, "question_type": "what"}
        lines.append({"id": f"choice{number}", "video": video, **choice})
        free = {"question": "Where to?", "answer": ["left", "up"], "question_type": ["where", "free"]}
        lines.append({"id": f"free{number}", "video": video, **free})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen3_vl")


def words(checkpoint: Path | str, rows: Path, out: Path, **keys: Any) -> list[str]:
    given = {
        "model": checkpoint, "data": rows, "out": out, "rates": RATES, "fps": 8, "dtype": "float32", "device": "cpu",
        "max_new_tokens": 4, "timed": 0, **keys,
    }  # fmt: skip
    return [f"{key}={json.dumps(v) if isinstance(v, list | dict | bool) else v}" for key, v in given.items()]


def run(checkpoint: Path | str, rows: Path, out: Path, **keys: Any) -> dict[str, Any]:
    results = evaluate(parse_options(words(checkpoint, rows, out, **keys)))
    assert results is not None
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    return results


@pytest.fixture(scope="module")
def finished(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("finished")
    return out, run(checkpoint, rows, out)


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    return {key: results[key] for key in ("models", "comparisons", "skipped")}


def test_every_question_has_a_record_at_every_rate(finished: tuple[Path, dict[str, Any]], rows: Path) -> None:
    out, results = finished
    records = read_records(out)
    asked = [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    assert {(one.question, one.rate) for one in records} == {(name, rate) for name in asked for rate in RATES}
    for one in records:
        assert one.types == (("what",) if one.question.startswith("choice") else ("where", "free"))
        assert (len(one.scores), one.exact is None) == ((3, True) if one.types == ("what",) else (0, False))
    (model,) = results["models"]
    assert [point["rate"] for point in model["points"]] == RATES
    for point in model["points"]:
        at_rate = [one for one in records if one.rate == point["rate"]]
        assert point["accuracy"]["value"] == pytest.approx(sum(one.correct for one in at_rate) / len(at_rate))
        assert {label: found["num_questions"] for label, found in point["types"].items()} == {
            "what": NUM_CLIPS, "where": NUM_CLIPS, "free": NUM_CLIPS,
        }  # fmt: skip
        of_type = [one.correct for one in at_rate if "what" in one.types]
        assert point["types"]["what"]["value"] == pytest.approx(sum(of_type) / len(of_type))
    assert (results["data"]["num_questions"], results["data"]["num_videos"]) == (2 * NUM_CLIPS, NUM_CLIPS)


def test_tokens_are_counted_as_engines_count_them_and_the_end_of_motion_is_marked(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path
) -> None:
    out, results = finished
    model = PrunedModel.load(checkpoint, dtype="float32", device="cpu", data={"fps": 8.0})
    options = parse_options(words(checkpoint, rows, out))
    question = read_questions(options)[0][0]
    prompt = local.Prompts(model.family, model.sampling, model.decoding, {}, verify=True).of(question)
    (item,) = prompt.items
    assert item.num_units == 6  # twelve frames: from 1 - 1/6 on only the first unit is left
    for one in read_records(out):
        if one.question == question.id:
            assert one.video_tokens == item.num_tokens
            assert one.retained == retained_tokens(item.num_units, item.tokens_per_unit, one.rate)
            assert one.tokens == model.inputs(prompt, one.rate)["input_ids"].shape[1]
    shares = {point["rate"]: point["first_unit_only"] for point in results["models"][0]["points"]}
    assert shares == {0.0: 0.0, 0.5: 0.0, 0.9: 1.0}


def test_a_finished_evaluation_asks_nothing_again(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = finished
    monkeypatch.setattr(PrunedModel, "load", None)
    assert without_paths(run(checkpoint, rows, out)) == without_paths(results)
    other = run(checkpoint, rows, out, tolerance=1.0, match="contains", rates=[0.5])
    assert other["options"]["tolerance"] == 1.0
    assert [point["rate"] for point in other["models"][0]["points"]] == RATES
    contained = [one.contains if one.contains is not None else one.correct for one in read_records(out) if not one.rate]
    assert other["models"][0]["points"][0]["accuracy"]["value"] == pytest.approx(sum(contained) / len(contained))
    run(checkpoint, rows, out)  # as it was, for the other tests


def test_another_evaluation_is_not_mixed_in(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    out, _ = finished
    with pytest.raises(RecipeError, match=r"holds another evaluation: sampling was .*, is .*"):
        run(checkpoint, rows, out, fps=4)
    with pytest.raises(RecipeError, match="num_questions was 10, is 3"):
        run(checkpoint, rows, out, limit=3)
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(RecipeError, match="models was"):
        run(copy, rows, out)


def test_a_killed_evaluation_goes_on_where_it_was(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kill while it answers; the last line is torn as well."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "evs_train.cli", "eval", *words(checkpoint, rows, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = out / "records" / "00000.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= len(RATES)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = file.read_bytes().split(b"\n")[:-1]
    assert len(whole) < 2 * NUM_CLIPS * len(RATES)
    file.write_bytes(b"\n".join(whole) + b'\n{"model": 0, "question": "cho')
    answered = []
    answer = LocalModel.answer
    monkeypatch.setattr(LocalModel, "answer", lambda s, q, r: answered.append(q.id) or answer(s, q, r))
    results = run(checkpoint, rows, out)
    assert without_paths(results)["models"][0]["points"] == without_paths(finished[1])["models"][0]["points"]
    before = {json.loads(line)["question"] for line in whole}
    assert not before & set(answered)
    assert len(answered) == 2 * NUM_CLIPS - len(before)


def test_rates_can_be_added(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    first = run(checkpoint, rows, tmp_path, rates=[0.5], limit=2)
    both = run(checkpoint, rows, tmp_path, rates=[0.9], limit=2)
    assert [point["rate"] for point in first["models"][0]["points"]] == [0.0, 0.5]
    assert [point["rate"] for point in both["models"][0]["points"]] == [0.0, 0.5, 0.9]
    assert both["models"][0]["points"][:2] == first["models"][0]["points"]


def test_two_processes_get_the_numbers_of_one(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    done = torchrun(words(checkpoint, rows, tmp_path), 2, program=("-m", "evs_train.cli", "eval"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("results:") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert without_paths(results) == json.loads(json.dumps(without_paths(finished[1])))
    shares = [(tmp_path / "records" / f"{rank:05}.jsonl").read_text().splitlines() for rank in (0, 1)]
    videos = [{json.loads(line)["video"] for line in share} for share in shares]
    assert not videos[0] & videos[1]
    assert [len(share) for share in videos] == [3, 2]


def test_two_checkpoints_are_compared_question_by_question(
    finished: tuple[Path, dict[str, Any]], checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    other = build_tiny("qwen3_vl", tmp_path / "other", seed=1)
    results = run([str(checkpoint), str(other)], rows, tmp_path / "out", rates=[0.5])  # type: ignore[arg-type]
    assert [point["accuracy"] for point in results["models"][0]["points"]] == [
        point["accuracy"] for point in finished[1]["models"][0]["points"][:2]
    ]
    records = read_records(tmp_path / "out")
    for one in results["comparisons"]:
        right = [
            {r.question: r.correct for r in records if (r.model, r.rate) == (place, one["rate"])} for place in (0, 1)
        ]
        gained = sum(right[1][name] > right[0][name] for name in right[0])
        lost = sum(right[1][name] < right[0][name] for name in right[0])
        assert (one["model"], one["against"], one["gained"], one["lost"]) == (1, 0, gained, lost)
        assert one["difference"]["value"] == pytest.approx((gained - lost) / len(right[0]))
    assert [one["rate"] for one in results["comparisons"]] == [0.0, 0.5]


def test_checkpoints_that_sample_otherwise_are_not_compared(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    from evs_train.checkpoint import EXPORT_RECORD
    from tests.runs import arguments, recipe_of

    export = Path(shutil.copytree(checkpoint, tmp_path / "export"))
    recipe = recipe_of(arguments(checkpoint, rows, tmp_path))  # 8 frames
    (export / EXPORT_RECORD).write_text(json.dumps({"recipe": recipe.model_dump()}))
    given = [word for word in words(f"[{checkpoint},{export}]", rows, tmp_path / "out") if not word.startswith("fps=")]
    with pytest.raises(RecipeError, match="samples videos by"):
        evaluate(parse_options(given))


def test_what_cannot_be_asked_ends_the_evaluation_or_is_left_out(
    checkpoint: Path, rows: Path, world: Path, tmp_path: Path
) -> None:
    lines = rows.read_text().splitlines()[:2]
    (tmp_path / "broken.mp4").write_bytes((world.parent / "clips" / "000000.mp4").read_bytes()[:600])
    bad = json.loads(lines[0]) | {"id": "bad", "video": str(tmp_path / "broken.mp4")}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, json.dumps(bad)]))
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        run(checkpoint, path, tmp_path / "out")
    results = run(checkpoint, path, tmp_path / "out", on_error="skip")
    assert list(results["skipped"]) == ["bad"]
    assert results["data"]["num_questions"] == 2
    assert [point["rate"] for point in results["models"][0]["points"]] == RATES


def test_segments_and_frames_are_shown_from_their_start(checkpoint: Path, tmp_path: Path) -> None:
    mvbench(tmp_path / "mvbench")
    results = run(checkpoint, tmp_path / "mvbench", tmp_path / "out", layout="mvbench", rates=[0.5], min_frames=1)
    assert results["data"]["num_questions"] == 2
    options = parse_options(words(checkpoint, tmp_path / "mvbench", tmp_path / "out", layout="mvbench", min_frames=1))
    segment, frames = read_questions(options)[0]
    model = PrunedModel.load(checkpoint, dtype="float32", device="cpu", data=options.sampled)
    prompts = local.Prompts(model.family, model.sampling, model.decoding, {}, verify=True)
    decode = model.family.processor.tokenizer.decode
    for question, count in ((segment, 3), (frames, 5)):  # frames 1 to 3 of 8 a second; 3 to 7 of 3 a second
        text = decode(prompts.of(question).input_ids)
        assert "<0." in text.split("Question")[0]
        (item,) = prompts.of(question).items
        assert item.num_units == -(-count // 2)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_benchmark_is_asked(checkpoint: Path, layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "data")
    results = run(checkpoint, tmp_path / "data", tmp_path / "out", layout=layout, rates=[0.5], min_frames=1)
    (model,) = results["models"]
    assert [point["rate"] for point in model["points"]] == [0.0, 0.5]
    assert results["data"]["num_choices"] == results["data"]["num_questions"] > 0
    assert all(one.said and len(one.scores) > 1 for one in read_records(tmp_path / "out"))


def test_prefill_is_measured_at_all_rates_in_turns(
    checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(checkpoint, rows, tmp_path, limit=3, timed=2, rates=[0.9])
    dense, pruned = results["models"][0]["points"]
    assert dense["prefill"]["num_questions"] == pruned["prefill"]["num_questions"] == 2
    assert dense["prefill"]["of_dense"] == 1.0
    assert pruned["prefill"]["seconds"] > 0
    assert pruned["prefill"]["peak_bytes"] is None
    model = PrunedModel.load(checkpoint, dtype="float32", device="cpu", data={"fps": 8.0})
    question = read_questions(parse_options(words(checkpoint, rows, tmp_path)))[0][0]
    prompt = local.Prompts(model.family, model.sampling, model.decoding, {}, verify=True).of(question)
    seen: list[float] = []
    plain = model.inputs_of_rows
    monkeypatch.setattr(model, "inputs_of_rows", lambda rows, rate, e: seen.append(rate) or plain(rows, rate, e))
    costs = prefill_costs(model, prompt, model.encode(prompt), [0.0, 0.5, 0.9])
    assert seen == [0.9, 0.5, 0.0, 0.0, 0.5, 0.9] * 2
    assert set(costs) == {0.0, 0.5, 0.9}


def test_media_are_decoded_and_encoded_once_for_all_rates_and_neighbours(
    checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, encoded = [], []
    read, encode = local.read_video, PrunedModel.encode
    monkeypatch.setattr(local, "read_video", lambda source, *a, **k: decoded.append(source) or read(source, *a, **k))
    monkeypatch.setattr(PrunedModel, "encode", lambda self, prompt: encoded.append(prompt) or encode(self, prompt))
    run(checkpoint, rows, tmp_path, limit=4)
    assert len(decoded) == len(encoded) == 2


def test_a_segment_begins_at_zero() -> None:
    import numpy as np

    from evs_train.data.video import Clip

    clip = Clip(
        np.zeros((2, 4, 4, 3), np.uint8), [10, 14], 8.0, np.array([1.25, 1.75]), total_frames=40, duration=5.0, path="x"
    )
    found = from_its_start(clip)
    assert (found.frame_indices, found.total_frames, found.duration) == ([0, 4], 5, 0.625)
    assert found.timestamps.tolist() == [0.0, 0.5]


def test_equal_choices_favour_no_letter_and_are_decided_alike_at_all_rates() -> None:
    chosen = [local.likeliest([-1.0, -2.0, -1.0, -1.0], f"question {i}") for i in range(300)]
    assert {place: 80 < chosen.count(place) < 120 for place in set(chosen)} == {0: True, 2: True, 3: True}
    assert chosen == [local.likeliest([-3.0, -4.0, -3.0, -3.0], f"question {i}") for i in range(300)]
    assert local.likeliest([-2.0, -1.0, -3.0], "x") == 1


def record(rate: float, question: int, correct: bool, **keys: Any) -> Record:
    return Record(0, f"q{question}", f"v{question // 2}", ("t",), rate, correct, "A", (0.0, -1.0), **keys)


def summary_of(right: dict[float, list[bool]], **keys: Any) -> dict[str, Any]:
    records = [record(rate, i, one) for rate, column in right.items() for i, one in enumerate(column)]
    found = summarise(records, 400, ["m"], EvalOptions(model=["m"], data=["d"], **keys))
    return dict(found["models"][0])


def test_the_recommended_rate_is_the_highest_that_is_shown_to_hold() -> None:
    """400 questions about 200 videos. At .9 a tenth is lost, at .75 nothing, at .5 five answers, at .25 nothing."""
    dense = [True] * 360 + [False] * 40
    lost = {0.9: 36, 0.75: 0, 0.5: 5, 0.25: 0}
    columns = {rate: [one and i >= count for i, one in enumerate(dense)] for rate, count in lost.items()}
    found = summary_of({0.0: dense, **columns}, tolerance=0.025)
    assert found["recommended"] == 0.75
    assert {point["rate"]: point.get("tolerance") for point in found["points"]} == {
        0.0: None, 0.25: "within", 0.5: "open", 0.75: "within", 0.9: "outside",
    }  # fmt: skip
    assert found["open"] == [0.5]
    strict = summary_of({0.0: dense, **columns}, tolerance=0.01)
    assert strict["recommended"] is None  # 200 videos cannot show that no more than 1 % is lost
    assert 0.01 < strict["points"][3]["shown_tolerance"] < 0.025


@pytest.mark.parametrize(("match", "share"), [("exact", 0.25), ("contains", 0.75)])
def test_free_answers_count_by_the_match_that_is_asked_for_now(match: str, share: float) -> None:
    right = [(i < 100, i < 300) for i in range(400)]
    records = [record(0.0, i, False, exact=exact, contains=held) for i, (exact, held) in enumerate(right)]
    found = summarise(records, 400, ["m"], EvalOptions(model=["m"], data=["d"], match=match))["models"][0]["points"][0]
    assert found["accuracy"]["value"] == share
    assert found["free_answers"] == {"num_questions": 400, "exact": 0.25, "contains": 0.75}


def test_a_rate_that_is_not_finished_is_no_point() -> None:
    right = [True] * 400
    found = summary_of({0.0: right, 0.5: right[:399]})
    assert [point["rate"] for point in found["points"]] == [0.0]
    assert found["unfinished"] == [0.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_is_that_of_the_prefill(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    results = run(checkpoint, rows, tmp_path, limit=1, timed=1, device="cuda")
    assert results["models"][0]["points"][0]["prefill"]["peak_bytes"] > 0
