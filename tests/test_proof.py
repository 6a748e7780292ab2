"""The controlled study: its world, its shortcuts against the package's own ways, and all of it at a miniature size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.proof import __main__ as command
from benchmarks.proof import world
from benchmarks.proof.base import TOKENS_PER_UNIT
from benchmarks.proof.plan import ARMS, DENSE, PLUG, SIZES, Size
from benchmarks.proof.report import read_results, report_of, write_report
from benchmarks.proof.runs import PIXELS, ExampleCache
from benchmarks.proof.scoring import answers, choice_tokens, slots_of
from benchmarks.proof.statistics import Draws
from benchmarks.proof.study import Study
from evs_train.checkpoint import read_record
from evs_train.errors import DataError
from evs_train.inputs import Inputs
from evs_train.models.loading import load_weights
from evs_train.recipe import load_recipe

RATES = (0.0, 0.75, 0.9)
MINI = Size(6, 5, (2, 1), 3, (0, 1), (PLUG, DENSE, "mixture", "sandwich", "uniform, whole units"), RATES, batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("proof")
    Study(folder, MINI, say=lambda line: None).run()
    return folder


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Inputs:
    """The held-out rows of that study, for its base before training."""
    words = [f"model.path={folder / 'random'}", f"data.rows={folder / 'world' / 'heldout.jsonl'}"]
    return Inputs(load_recipe(["recipe=benchmarks/proof/base.yaml", f"output_dir={folder / 'none'}", *words]))


def _cache(inputs: Inputs, folder: Path) -> ExampleCache:
    return ExampleCache(inputs.reader, folder / "prepared", lambda line: None)


def _scenes(count: int = 60) -> list[tuple[world.Scene, np.ndarray]]:
    made = [world.scene_of(0, "train", number) for number in range(count)]
    return [(scene, world.draw(scene, rng).astype(int)) for scene, rng in made]


def test_a_still_camera_shows_nothing_but_what_happens() -> None:
    for scene, pictures in _scenes():
        changed = {t for t in range(1, world.NUM_FRAMES) if (pictures[t] != pictures[t - 1]).any()}
        if scene.camera != "still":
            assert len(changed) >= world.NUM_UNITS // 2 - 1
            continue
        moves = {2 * scene.move_unit + frame for frame in range(world.DISTANCE * world.FRAMES_PER_CELL)}
        filled = {unit * 2 for unit in range(5, scene.stop_unit + 1, 5) if unit < world.NUM_UNITS}
        switched = {2 * unit for on in (*scene.blinks, scene.flash_unit) for unit in (on, on + 1)}
        assert changed == moves | filled | switched | {2 * unit for unit in scene.appear}


@pytest.mark.parametrize("frame", [0, world.NUM_FRAMES - 1])
def test_where_the_ball_is_does_not_say_where_it_goes(frame: int) -> None:
    """Whoever sees the ball in one picture alone and guesses as well as can be is right in about half of the cases."""
    seen: dict[tuple[int, int], list[str]] = {}
    for number in range(4000):
        scene, _ = world.scene_of(0, "train", number)
        step = world.STEPS[scene.facts["motion"]]
        moved = world.DISTANCE if frame else 0
        place = [scene.lane if axis == 0 else scene.start + axis * moved for axis in step]
        assert all(0 <= cell <= 3 for cell in place)
        seen.setdefault((place[0], place[1]), []).append(scene.facts["motion"])
    right = sum(max(map(told.count, world.STEPS)) for told in seen.values())
    assert right / 4000 < 0.55


def test_no_fact_follows_from_another() -> None:
    facts = [world.scene_of(0, "train", number)[0].facts for number in range(4000)]
    for one in world.FACTS:
        for other in set(world.FACTS) - {one}:
            for choice in world.FACTS[one]:
                told = [fact[other] for fact in facts if fact[one] == choice]
                shares = [told.count(answer) / len(told) for answer in world.FACTS[other]]
                assert max(shares) < 1.2 / len(shares), (one, choice, other, shares)


def test_heldout_clips_are_others_and_have_a_fingerprint() -> None:
    scenes = {split: {repr(world.scene_of(0, split, n)[0]) for n in range(200)} for split in world.SPLITS}
    assert not scenes["train"] & scenes["heldout"]
    assert world.fingerprint(20, 0) == world.fingerprint(20, 0)
    assert len({world.fingerprint(20, 0), world.fingerprint(20, 1), world.fingerprint(21, 0)}) == 3


def test_a_folder_with_another_world_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="another world"):
        world.write_world(folder / "world", num_train=7, num_heldout=5)


def test_clips_are_read_as_they_were_drawn(folder: Path, inputs: Inputs) -> None:
    example = inputs.reader.read(1, keep_frames=True)
    scene, rng = world.scene_of(0, "heldout", 1)
    drawn = world.draw(scene, rng)[:: world.FRAMES_PER_UNIT].astype(int)
    assert np.abs(example.frames[0].astype(int) - drawn).mean() < 6.0
    (item,) = example.items
    assert (item.num_units, item.tokens_per_unit) == (world.NUM_UNITS, TOKENS_PER_UNIT)


def test_prepared_rows_are_those_of_the_reader(folder: Path, inputs: Inputs) -> None:
    for number in range(5):
        one, other = _cache(inputs, folder).read(number), inputs.reader.read(number)
        assert torch.equal(one.media[PIXELS], other.media[PIXELS])
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_rows_are_prepared_once_for_base_and_arms(folder: Path) -> None:
    assert len(list((folder / "prepared").iterdir())) == len(world.SPLITS)


def test_answers_are_those_of_plain_forwards(folder: Path, inputs: Inputs) -> None:
    """At rate 0, of one row at a time, without the hook and from the reader's own pixels."""
    model = load_weights(inputs.recipe.model, inputs.family.config, torch.float32).eval()
    rows, choices = _cache(inputs, folder), choice_tokens(inputs.family)
    found = answers(inputs.family, model, rows, (0.0, 0.75))
    for number in range(5):
        example = inputs.reader.read(number)
        types = torch.zeros_like(example.input_ids)
        types[example.spans[0]] = 2
        with torch.inference_mode():
            logits = model(input_ids=example.input_ids[None], mm_token_type_ids=types[None], **example.media).logits[0]
        slots = slots_of(inputs.family, example, choices)
        places = torch.nonzero(example.labels != -100)[:, 0][slots.places]
        assert torch.equal(example.input_ids[places], slots.tokens)
        told = [inputs.family.processor.tokenizer.decode(token).strip() for token in slots.tokens]
        assert told == list(world.scene_of(0, "heldout", number)[0].facts.values())
        said = [ids[logits[place - 1, ids].argmax()] for place, ids in zip(places, choices, strict=True)]
        assert found["0"][number] == "".join(str(int(a == b)) for a, b in zip(said, slots.tokens, strict=True))
    assert set(found) == {"0", "0.75"}


def test_every_arm_is_answered_once_by_seed(folder: Path) -> None:
    results = read_results(folder / "results")
    trained = {"mixture", DENSE, "uniform, whole units", "sandwich"}
    assert {(one["arm"], one["seed"]) for one in results} == {
        (PLUG, 0),
        *((name, s) for name in trained for s in (0, 1)),
    }
    for one in results:
        assert one["fingerprint"] == world.fingerprint(5, 0)
        assert set(one["right"]) == {"0", "0.75", "0.9"}
        assert all(len(rows) == 5 and {len(row) for row in rows} == {7} for rows in one["right"].values())
        assert one["cameras"] == ["still", "noise", "pan", "still", "noise"]


def test_a_study_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "results" / "mixture-1.json"
    before = json.loads(file.read_text())
    file.unlink()
    ran: list[tuple[str, int]] = []
    run_arm = Study.run_arm

    def counted(self: Study, base: Path, name: str, arm: object, seed: int) -> dict[str, object]:
        ran.append((name, seed))
        return run_arm(self, base, name, arm, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(Study, "run_arm", counted)
    Study(folder, MINI, say=lambda line: None).run()
    assert ran == [("mixture", 1)]
    assert json.loads(file.read_text())["right"] == before["right"]


def test_results_of_another_world_stop_a_study(folder: Path, tmp_path: Path) -> None:
    for name in ("world", "base-0", "base-1", "results", "prepared"):
        (tmp_path / name).symlink_to(folder / name)
    other = tmp_path / "other"
    other.mkdir()
    for file in (folder / "results").glob("*.json"):
        (other / file.name).write_text(file.read_text().replace(world.fingerprint(5, 0), "0" * 64))
    (tmp_path / "results").unlink()
    other.rename(tmp_path / "results")
    with pytest.raises(DataError, match="another world"):
        Study(tmp_path, MINI, say=lambda line: None).run()


def test_results_of_longer_arms_stop_a_study(folder: Path) -> None:
    longer = dataclasses.replace(MINI, arm_steps=4)
    with pytest.raises(DataError, match="took 3 steps instead of 4"):
        Study(folder, longer, say=lambda line: None).run()


def test_a_wider_model_goes_through_the_same_study(folder: Path, tmp_path: Path) -> None:
    for name in ("world", "prepared"):
        (tmp_path / name).symlink_to(folder / name)
    study = Study(
        tmp_path, dataclasses.replace(MINI, arms=(PLUG, "mixture"), seeds=(0,), width=2), say=lambda line: None
    )
    study.run()
    assert {one["arm"] for one in read_results(tmp_path / "results")} == {PLUG, "mixture"}
    sizes = [(at / "random" / "model.safetensors").stat().st_size for at in (folder, tmp_path)]
    assert 3.0 < sizes[1] / sizes[0] < 4.0
    record = read_record(tmp_path / "base-0")
    assert record["recipe"]["optim"]["lr"] == 1.0e-3


def test_every_arm_is_a_recipe(tmp_path: Path) -> None:
    for name, _ in Study(tmp_path, SIZES["full"], say=lambda line: None).plan():
        load_recipe(["recipe=benchmarks/proof/arm.yaml", *(ARMS[name].overrides or ())])
    assert all(set(size.arms) <= set(ARMS) and PLUG in size.arms and size.rates[0] == 0.0 for size in SIZES.values())


def test_the_report_says_what_the_arms_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(folder), "--report-only"]) == 0
    assert "| mixture | 2 |" in capsys.readouterr().out
    assert (folder / "report.png").stat().st_size > 10_000
    report = json.loads((folder / "report.json").read_text())
    assert report["arms"]["mixture"]["cpu_seconds_per_step"] > 0
    assert set(report["arms"]["mixture"]["groups"]) >= {"question: stop", "camera: pan"}


def test_a_report_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result of the base"):
        write_report(tmp_path)


def _result(arm: str, seed: int, right: dict[str, float]) -> dict[str, object]:
    rows = {rate: ["1" if n < round(share * 300) else "0" for n in range(300)] for rate, share in right.items()}
    return {
        "arm": arm,
        "seed": seed,
        "fingerprint": "f",
        "questions": ["motion"],
        "cameras": ["still"] * 300,
        "right": rows,
    }


def test_the_gap_closed_is_of_what_pruning_cost() -> None:
    arms = [
        _result(PLUG, 0, {"0": 0.9, "0.75": 0.5}),
        *(_result(DENSE, seed, {"0": 0.94, "0.75": 0.54}) for seed in (0, 1)),
        *(_result("mixture", seed, {"0": 0.92, "0.75": 0.80 + 0.05 * seed}) for seed in (0, 1)),
    ]
    found = report_of(arms)["arms"]["mixture"]
    gap = found["rates"]["0.75"]["gap_closed"]
    assert gap["value"] == pytest.approx((0.825 - 0.5) / (0.94 - 0.5))
    assert gap["low"] < gap["value"] < gap["high"]
    assert found["rates"]["0.75"]["accuracy"]["value"] == pytest.approx(0.825)
    assert found["dense_change"]["value"] == pytest.approx(-0.02)
    assert found["groups"]["camera: still"]["0.75"]["accuracy"]["value"] == pytest.approx(0.825)


def test_intervals_are_those_of_whole_clips() -> None:
    """Questions of a clip that are right or wrong together say no more than one of them."""
    right = np.repeat((np.arange(400) % 2)[None, :, None], 7, axis=2).astype(float)
    figure = Draws(400, 1).mean(right).with_interval()
    assert figure["value"] == 0.5
    assert pytest.approx(figure["high"] - figure["low"], rel=0.1) == 2 * 1.96 * (0.25 / 400) ** 0.5
    cut = right.copy()
    cut[:, 100:] = np.nan
    part = Draws(400, 1).mean(cut).with_interval()
    assert part["value"] == 0.5
    assert pytest.approx(part["high"] - part["low"], rel=0.1) == 2 * 1.96 * (0.25 / 100) ** 0.5


def test_full_goes_on_from_default() -> None:
    default, full = SIZES["default"], SIZES["full"]
    assert set(default.arms) < set(full.arms)
    assert set(default.seeds) < set(full.seeds)
    assert dataclasses.replace(full, arms=default.arms, seeds=default.seeds) == default
