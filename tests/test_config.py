"""Recipes: what is refused, in which words, and that a bad one is answered before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evs_train.config import Recipe
from evs_train.errors import RecipeError
from evs_train.recipe import RECIPES_DIR, load_recipe, recipe_names

LEAKS = ("Input should", "dict[", "[key]", "Value error", "instance of", "pydantic", "validation", "<unicode string>")


def tiny(*overrides: str) -> Recipe:
    return load_recipe(["recipe=tiny", *overrides])


def faults(*overrides: str) -> list[str]:
    """The lines under the heading of the error, one for each fault."""
    with pytest.raises(RecipeError) as caught:
        tiny(*overrides)
    heading, *lines = str(caught.value).split("\n")
    assert f"has {len(lines)} fault(s):" in heading
    assert str(RECIPES_DIR / "tiny.yaml") in heading
    for line in lines:
        assert not any(leak in line for leak in LEAKS), line
    return [line.removeprefix("  ") for line in lines]


def refused(*arguments: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(leak in message for leak in LEAKS), message
    return message


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads_and_is_short(name: str) -> None:
    text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert load_recipe([f"recipe={name}"]).recipe == name
    assert len(text.splitlines()) <= 60
    heading = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# Hardware:") for line in heading)
    assert any(line.startswith("# Run: torchrun") and f"recipe={name}" in line for line in heading)


def test_the_test_above_covers_recipes() -> None:
    assert {"tiny", "tiny_nemotron", "nemotron"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evz.rate=0.5", "evz: unknown key; did you mean evs?"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("tuning.lora.alhpa=3", "tuning.lora.alhpa: unknown key; did you mean tuning.lora.alpha?"),
        ("demo.famly=x", "demo.famly: unknown key; did you mean demo.family?"),
        ("optim.lr_by_part.vison=1e-4", "optim.lr_by_part.vison: unknown key; did you mean optim.lr_by_part.vision?"),
        ("train.qqqq=1", "train.qqqq: unknown key"),
    ],
)
def test_unknown_key_names_the_nearest_at_every_depth(override: str, message: str) -> None:
    assert faults(override) == [message]


def test_a_key_of_two_types_is_named_without_them() -> None:
    assert faults("train.resume=1") == [
        "train.resume: must be a valid boolean, got 1",
        "train.resume: must be 'auto', got 1",
    ]


def test_all_faults_come_at_once() -> None:
    found = faults("evs.rats=1", "train.steps=0", "optim.lr=fast", "tuning.lora.q=1", "model.dtype=fp16", "sede=1")
    assert sorted(line.split(":")[0] for line in found) == [
        "evs.rats",
        "model.dtype",
        "optim.lr",
        "sede",
        "train.steps",
        "tuning.lora.q",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps='3'", "train.steps: must be a valid integer, got '3'"),
        ("train.steps=true", "train.steps: must be a valid integer, got True"),
        ("train.steps=3.0", "train.steps: must be a valid integer, got 3.0"),
        ("optim.lr='1e-5'", "optim.lr: must be a valid number, got '1e-5'"),
        ("tracking.wandb=1", "tracking.wandb: must be a valid boolean, got 1"),
        ("tracking.name=3", "tracking.name: must be a valid string, got 3"),
        ("tuning.freeze=vision", "tuning.freeze: must be a valid list, got 'vision'"),
        ("tuning.freeze=[visoin]", "tuning.freeze.0: must be 'vision', 'projector' or 'language_model', got 'visoin'"),
        ("data.rows=[1]", "data.rows.0: must be a valid string, got 1"),
        ("data.video_kwargs={1: 2}", "data.video_kwargs.1: must be a valid string, got 1"),
        ("model.dtype=fp16", "model.dtype: must be 'bfloat16' or 'float32', got 'fp16'"),
        ("model.path=", "model.path: must be a valid string, got None"),
    ],
)
def test_wrong_type(override: str, message: str) -> None:
    assert faults(override) == [message]


@pytest.mark.parametrize("value", ["[1, 2]", "3", "text", "null"])
def test_a_section_must_be_a_section(value: str) -> None:
    shown = repr(yaml.safe_load(value))
    assert faults(f"model={value}") == [f"model: must be a section, that is, keys with values, got {shown}"]


def test_a_list_for_the_optional_section() -> None:
    assert faults("demo=[]") == ["demo: must be a section, that is, keys with values, got []"]


def test_the_quoted_value_is_short() -> None:
    (line,) = faults(f"train.steps={'x' * 5000}")
    assert len(line) < 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps: must be greater than or equal to 1, got 0"),
        ("export.rate=1", "export.rate: must be less than 1, got 1"),
        ("export.rate=-0.1", "export.rate: must be greater than or equal to 0, got -0.1"),
        ("optim.lr=0", "optim.lr: must be greater than 0, got 0"),
        ("optim.lr=.inf", "optim.lr: must be a finite number, got inf"),
        ("optim.lr=1e999", "optim.lr: must be a finite number, got inf"),
        ("train.epochs=.nan", "train.epochs: must be a finite number, got nan"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: must be less than 1, got 1"),
        ("optim.betas=[0.9]", "optim.betas: must have at least 2 items, got [0.9]"),
        ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas: must have at most 2 items, got [0.9, 0.9, 0.9]"),
        ("data.rows=[]", "data.rows: must have at least 1 item, got []"),
        ("tuning.lora.targets=[]", "tuning.lora.targets: must have at least 1 item, got []"),
        ("tuning.lora.parts=[]", "tuning.lora.parts: must have at least 1 item, got []"),
        ("seed=4294967296", "seed: must be less than 4294967296, got 4294967296"),
        ("seed=-1", "seed: must be greater than or equal to 0, got -1"),
        ("train.keep_checkpoints=1", "train.keep_checkpoints: must be greater than or equal to 2, got 1"),
    ],
)
def test_out_of_range(override: str, message: str) -> None:
    assert faults(override) == [message]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.num_frames=8"], "data: set fps or num_frames, not both (null unsets one)"),
        (["data.min_frames=9", "data.max_frames=8"], "data: min_frames (9) is above max_frames (8)"),
        (
            ["tuning.freeze=[vision, projector, language_model]"],
            "tuning: freeze names every part: nothing would be trained",
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides: list[str], message: str) -> None:
    assert faults(*overrides) == [message]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("video_kwargs", "do_sample_frames"),
        ("video_kwargs", "fps"),
        ("image_kwargs", "return_tensors"),
        ("template_kwargs", "add_generation_prompt"),
    ],
)
def test_arguments_that_are_ours(section: str, key: str) -> None:
    (line,) = faults(f"data.{section}.{key}=true")
    assert line.startswith(f"data.{section}: {key} cannot be set: ")


def test_fps_gives_way_to_num_frames() -> None:
    data = tiny("data.fps=null", "data.num_frames=8").data
    assert (data.fps, data.num_frames) == (None, 8)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1.5", "evs.rate must be a pruning rate with 0 <= rate < 1, got 1.5 (0.75 drops 75 %)"),
        (".nan", "evs.rate must be a pruning rate with 0 <= rate < 1, got nan (0.75 drops 75 %)"),
        ("fast", "evs.rate must be a number or a mapping with a kind, got 'fast' (for example 0.75)"),
        ("[0.5]", "evs.rate must be a number or a mapping with a kind, got [0.5] (for example 0.75)"),
        ("true", "evs.rate must be a number or a mapping with a kind, got True (for example 0.75)"),
        ("null", "evs.rate must be a number or a mapping with a kind, got None (for example 0.75)"),
        ("{kind: bta}", "evs.rate.kind: unknown sampler 'bta' (did you mean beta?)"),
        ("{kind: beta, mod: 0.5}", "evs.rate.mod: unknown key of beta (did you mean mode?)"),
        ("{kind: uniform, min: 0}", "evs.rate.max is missing (uniform takes min, max)"),
        (
            "{kind: mixture, dense: 0.1, of: {kind: uniform, min: 0.5, max: 0.4}}",
            "evs.rate.of.max must be above min, got min 0.5 and max 0.4",
        ),
    ],
)
def test_bad_sampler_is_one_fault_with_its_key(rate: str, message: str) -> None:
    assert faults(f"evs.rate={rate}") == [message]


def test_processes_wait_longer_than_a_file_may_hang() -> None:
    (line,) = faults("train.timeout_minutes=2", "data.decode_timeout=60")
    assert "train.timeout_minutes (2) must be above twice data.decode_timeout (60 s)" in line
    for words in (("train.timeout_minutes=2.1",), ("train.timeout_minutes=0.1", "data.decode_timeout=null")):
        load_recipe(["recipe=tiny", *words])


@pytest.mark.parametrize("missing", ["model", "data", "output_dir"])
def test_missing_required_value(tmp_path: Path, missing: str) -> None:
    recipe = yaml.safe_load((RECIPES_DIR / "tiny.yaml").read_text(encoding="utf-8"))
    del recipe[missing]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"mine.yaml .* has 1 fault\(s\):\n  {missing}: a value is required$"):
        load_recipe([f"recipe={file}"])


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), ("1", 1), (".5", 0.5)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert tiny(f"optim.lr={text}").optim.lr == value


def test_overrides() -> None:
    recipe = tiny(
        "evs.rate={kind: beta, mode: 0.75}",
        "train.pictures_every=null",
        "tuning.freeze=[vision, projector]",
        "data.rows=a.json",
        "tuning.lora.r=4",
        "data.template_kwargs.enable_thinking=false",
        "tracking.name=a=b",
        "seed=1",
        "seed=2",
    )
    assert recipe.evs.rate == {"kind": "beta", "mode": 0.75}
    assert recipe.train.pictures_every is None
    assert recipe.tuning.freeze == ["vision", "projector"]
    assert recipe.data.rows == ["a.json"]
    assert recipe.tuning.lora.r == 4
    assert recipe.data.template_kwargs == {"enable_thinking": False}
    assert recipe.tracking.name == "a=b"
    assert recipe.seed == 2


def test_overriding_into_a_section_that_is_not_there() -> None:
    demo = tiny("demo=null", "demo.family=qwen3_vl").demo
    assert demo is not None
    assert demo.family == "qwen3_vl"
    assert tiny("demo=null").demo is None
    assert load_recipe(["recipe=nemotron", "demo.family=nemotron_h_omni"]).demo is not None


def test_overriding_through_a_value() -> None:
    message = refused("recipe=tiny", "output_dir.sub.key=3")
    assert message == "output_dir.sub.key: output_dir is a value, not a section"


@pytest.mark.parametrize("argument", ["evs.rate", "=3", "evs..rate=3", ".=3"])
def test_malformed_override(argument: str) -> None:
    message = refused("recipe=tiny", argument)
    assert (
        message == f"'{argument}' is not of the form key=value (such as recipe=tiny or train.steps=10 (docs/recipe.md))"
    )


@pytest.mark.parametrize(("argument", "meant"), [("--dry_run", "dry_run=..."), ("--train.steps=3", "train.steps=3")])
def test_keys_have_no_dashes(argument: str, meant: str) -> None:
    assert refused("recipe=tiny", argument) == f"there is no option '{argument}' (keys have no dashes: {meant})"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{kind: beta", "expected ',' or '}'"),
        ("{{path}}", "found unhashable key at line 1 column 2"),
        ("{[a]: 1}", "found unhashable key at line 1 column 2"),
        ("2026-13-01", "month must be in 1..12"),
        ("*.jsonl", "(a text with signs of YAML in it needs quotes of its own: evs.rate='\"...\"')"),
        ("{kind: a, kind: b}", "the key 'kind' is given twice at line 1 column 11"),
    ],
)
def test_override_that_is_no_yaml(value: str, reason: str) -> None:
    message = refused("recipe=tiny", f"evs.rate={value}")
    assert message.startswith("the value of evs.rate is not valid YAML: ")
    assert reason in message


def test_no_recipe_is_named() -> None:
    assert refused("seed=1").startswith("no recipe is named (add recipe=NAME, one of: ")


def test_missing_recipe_names_the_nearest() -> None:
    message = refused("recipe=tny")
    assert message.startswith("there is no recipe 'tny' (did you mean tiny? shipped recipes: ")
    assert "nemotron, " in message


def test_missing_recipe_file(tmp_path: Path) -> None:
    assert refused(f"recipe={tmp_path}/none.yaml").startswith(f"there is no recipe '{tmp_path}/none.yaml'")


def test_recipe_file_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output_dir: out\nmodel: {path: m}\ndata: {rows: [a.json, b.json], fps: 1}\n", encoding="utf-8")
    recipe = load_recipe([f"recipe={file}", "seed=3"])
    assert (recipe.recipe, recipe.data.rows, recipe.seed) == ("mine", ["a.json", "b.json"], 3)
    assert recipe.evs.rate == 0.75


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"output_dir: a\nmodel: {path: m}\noutput_dir: b\n", "the key 'output_dir' is given twice at line 3 column 1"),
        (b"model:\n  path: m\n  dtype: float32\n  path: n\n", "the key 'path' is given twice at line 4 column 3"),
        (b"- a\n- b\n", "is not a mapping of keys to values"),
        (b"", "is not a mapping of keys to values"),
        (b"output_dir: [\n", "is not valid YAML: "),
        (b"output_dir: \xff\xfe\n", "cannot be read: "),
    ],
)
def test_recipe_file_that_is_none(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    message = refused(f"recipe={file}")
    assert message.startswith(str(file))
    assert reason in message


def test_yaml_merge_keys_are_no_duplicates() -> None:
    lora = tiny("tuning.lora={<<: {r: 4, alpha: 8}, r: 2}").tuning.lora
    assert (lora.r, lora.alpha) == (2, 8)


def test_a_recipe_survives_its_record() -> None:
    recipe = tiny("evs.rate={kind: choice, rates: [0, 0.5]}", "optim.lr=1")
    stored: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe.model_dump()))
    assert Recipe.model_validate(stored) == recipe


def test_a_bad_recipe_is_answered_without_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, 'launch'); import uptrain\n"
        "code = uptrain.main(['recipe=tiny', 'evs.rat=1'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(99 if heavy else code)\n"
    )
    root = RECIPES_DIR.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "evs.rat: unknown key; did you mean evs.rate?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{temperature: 2.0}", "objective: temperature is of kind teacher; the kind is uptrain"),
        ("{kind: sandwich, teacher_weight: 2.0}", "objective: teacher_weight is of kind teacher; the kind is sandwich"),
        ("{kind: teacher, highest: 0.5}", "objective: highest is of kind sandwich; the kind is teacher"),
        ("{kind: sandwich, lowest: 0.9}", "objective: lowest (0.9) must be below highest (0.9)"),
    ],
)
def test_objective_keys_that_would_do_nothing_are_refused(objective: str, message: str) -> None:
    assert faults(f"objective={objective}") == [message]


def test_objective_of_a_record_is_read_again() -> None:
    """A record holds every key; those of another kind have their defaults there."""
    recipe = tiny("objective={kind: teacher, temperature: 2.0}")
    assert Recipe.model_validate(recipe.model_dump()).objective == recipe.objective


def test_a_sandwich_and_a_budget_of_tokens_are_refused() -> None:
    budget = ("data.max_tokens_per_batch=1000", "train.batch_size=1")
    (line,) = faults("objective={kind: sandwich}", *budget)
    assert "holds three passes in memory, and data.max_tokens_per_batch counts one" in line
    assert tiny("objective={kind: teacher}", *budget).objective.kind == "teacher"
