"""Which differences a resumed run may have: every key of the recipe has its rule, and every rule its effect."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.errors import RecipeError
from evs_train.resume import (
    FIXED,
    FREE,
    NAMED_FACTS,
    NAMED_KEYS,
    recipe_keys,
    refuse_differences,
    resumption,
)
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of

# A value other than the default, of every key that must be the same; `null` unsets what another key replaces.
CHANGED: dict[str, Any] = {
    "seed": 7,
    "data.frames_fps": 3.0,
    "data.fps": 3.0,
    "data.num_frames": 12,
    "data.min_frames": 5,
    "data.max_frames": 99,
    "data.video_kwargs": {"size": {"shortest_edge": 1024}},
    "data.image_kwargs": {"size": {"shortest_edge": 1024}},
    "data.template_kwargs": {"enable_thinking": False},
    "data.supervise": "last",
    "data.max_length": 500,
    "data.verify": False,
    "data.backend": "pyav",
    "data.decode_timeout": None,
    "data.decode_memory_mb": None,
    "data.max_pixels": None,
    "data.max_video_seconds": None,
    "data.max_video_frames": None,
    "model.dtype": "bfloat16",
    "model.attn_implementation": "eager",
    "train.packing": True,
    "tuning.method": "lora",
    "tuning.freeze": ["vision"],
    "tuning.lora.r": 8,
    "tuning.lora.alpha": 16,
    "tuning.lora.dropout": 0.1,
    "tuning.lora.parts": ["vision"],
    "tuning.lora.targets": ["q_proj"],
    "evs.method": "random",
    "evs.rate": 0.5,
    "evs.scope": "sample",
    "evs.cap": False,
    "evs.positions": "sequential",
    "evs.score": "embeds",
    "evs.score_dtype": "float32",
    "objective.kind": "teacher",
    "objective.teacher_weight": 2.0,
    "objective.temperature": 2.0,
    "objective.lowest": 0.1,
    "objective.highest": 0.8,
    "optim.lr": 1e-3,
    "optim.lr_by_part": {"vision": 2e-3},
    "optim.weight_decay": 0.1,
    "optim.betas": [0.9, 0.99],
    "optim.warmup_ratio": 0.1,
    "optim.scheduler": "constant",
    "optim.max_grad_norm": 2.0,
    "base_files": {"model.safetensors": "0" * 16},
    "data_fingerprint": "0" * 64,
    "num_steps": 99,
    "step": "99 rows",
    "cached_features": True,
    "deepspeed_config": {"zero_optimization": {"stage": 2}},
    "lora_targets": ["q_proj"],
    "zero_stage": 2,
    "zero_shards": 2,
}


@pytest.fixture(scope="module")
def record(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a run's record says, as it is read from its file."""
    folder = tmp_path_factory.mktemp("record")
    run = Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, folder, train__steps=4)))
    return json.loads(json.dumps(run._record()))  # type: ignore[no-any-return]


def place_of(record: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Where a key or fact stands in a record."""
    if name in (*NAMED_FACTS, *FIXED) and "." not in name:
        return record, name
    *sections, key = name.split(".")
    place = record["recipe"]
    for section in sections:
        place = place[section]
    return place, key


def value_of(record: dict[str, Any], name: str) -> Any:
    place, key = place_of(record, name)
    return place[key]


def changed(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The record with other values; `__` in a keyword is a dot."""
    other = copy.deepcopy(record)
    for name, value in values.items():
        place, key = place_of(other, name.replace("__", "."))
        assert place[key] != value, f"{name} is that already"
        place[key] = value
    return other


def test_every_key_of_a_recipe_has_one_rule(record: dict[str, Any]) -> None:
    """For a new key: does another value change what is trained? See the comments in `evs_train/resume.py`."""
    rules = [*FIXED, *NAMED_KEYS, *NAMED_FACTS, *FREE]
    assert sorted(set(rules)) == sorted(rules), "a key has two rules"
    facts = [*NAMED_FACTS, "lora_targets", "zero_stage", "zero_shards"]
    assert sorted(recipe_keys()) == sorted(set(rules) - set(facts)), "a key has no rule, or a rule has no key"
    assert set(facts) <= record.keys(), "a fact is not recorded"
    assert set(CHANGED) == set(rules) - set(FREE)


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_what_is_not_free_is_refused_with_both_values(name: str, record: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        refuse_differences(record, changed(record, **{name: CHANGED[name]}), "runs/x")
    message, hint = caught.value.message, caught.value.hint
    assert message.startswith(f"train.resume: runs/x was another run: {name} (was ")
    assert message.count("(was ") == 1
    was, now = value_of(record, name), CHANGED[name]
    if not (isinstance(was, dict) and isinstance(now, dict)):  # of which only what differs is shown
        assert f"{name} (was {was}, is {now})" in message
    allowing = changed(record, **{name: now, "train__resume_allow": [name]})
    if name in FIXED:
        assert FIXED[name] in hint
        with pytest.raises(RecipeError, match=f"{re.escape(name)} cannot be allowed"):
            refuse_differences(record, allowing, "runs/x")
    else:
        assert f"train.resume_allow='[{name}]'" in hint
        refuse_differences(record, allowing, "runs/x")
        entry = json.loads(json.dumps(resumption(record, allowing, "checkpoint-2")))
        assert list(entry["allowed"]) == [name]
        assert entry["allowed"][name].keys() == {"was", "now"}


def test_what_is_free_may_differ(record: dict[str, Any]) -> None:
    other = changed(
        record,
        output_dir="/elsewhere",
        model__path="/elsewhere",
        data__rows=["/elsewhere"],
        data__num_workers=9,
        train__batch_size=99,
        train__grad_accumulation=99,
        train__log_every=99,
        train__save_every=99,
        train__keep_checkpoints=99,
        train__resume=True,
        tracking__wandb=True,
        tracking__name="another",
    )
    other["processes"] = 8
    refuse_differences(other, record, "runs/x")
    assert resumption(other, record, "checkpoint-2")["allowed"] == {}


def test_all_differences_are_told_together(record: dict[str, Any]) -> None:
    other = changed(record, seed=7, step="99 rows", optim__lr=1.0)
    with pytest.raises(RecipeError) as caught:
        refuse_differences(other, changed(record, train__resume_allow=["seed"]), "runs/x")
    assert caught.value.message.startswith("train.resume: runs/x was another run: optim.lr (was 1.0, is ")
    assert f"; step (was 99 rows, is {record['step']})" in caught.value.message
    assert "seed" not in caught.value.message
    assert "train.resume_allow='[optim.lr, step]'" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optm.lr", "did you mean optim.lr?"),
        ("train.num_workers", "nothing to allow called 'train.num_workers'"),
        ("data.num_workers", "it may change as it is"),
        ("optim", "nothing to allow called 'optim'"),
    ],
)
def test_a_wrong_name_is_told(name: str, said: str, record: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        refuse_differences(record, changed(record, train__resume_allow=[name]), "runs/x")


def test_of_the_bases_files_only_those_that_differ_are_named(record: dict[str, Any]) -> None:
    files = record["base_files"]
    other = changed(record, base_files={**files, "config.json": "0" * 16})
    with pytest.raises(RecipeError) as caught:
        refuse_differences(other, record, "runs/x")
    one = f"base_files (was {{'config.json': '{'0' * 16}'}}, is {{'config.json': '{files['config.json']}'}})"
    assert one in caught.value.message


def test_records_of_earlier_versions(record: dict[str, Any]) -> None:
    """A key that was not there had its default; a fact that was not recorded is not known."""
    older = copy.deepcopy(record)
    del older["recipe"]["train"]["resume_allow"], older["recipe"]["objective"], older["versions"], older["step"]
    with pytest.raises(RecipeError) as caught:
        refuse_differences(older, record, "runs/x")
    assert f"step (was not recorded, is {record['step']})" in caught.value.message
    assert caught.value.message.count("(was ") == 1
    allowing = changed(record, train__resume_allow=["step"])
    refuse_differences(older, allowing, "runs/x")
    assert resumption(older, allowing, "checkpoint-2")["versions"]["torch"]["was"] is None
    newer = copy.deepcopy(record)
    newer["recipe"]["optim"]["momentum"] = 0.5
    with pytest.raises(RecipeError, match=r"optim\.momentum: unknown key.*another version of evs_train wrote it"):
        refuse_differences(newer, record, "runs/x")


def test_other_versions_of_packages_are_free_and_kept(record: dict[str, Any]) -> None:
    older = {**record, "versions": {**record["versions"], "torch": "2.0"}}
    refuse_differences(older, record, "runs/x")
    assert resumption(older, record, "checkpoint-2")["versions"] == {
        "torch": {"was": "2.0", "now": record["versions"]["torch"]}
    }
