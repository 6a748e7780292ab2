"""Generation with pruned video: greedy answers are those of repeated full forwards over the pruned prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evs_train.checkpoint import EXPORT_RECORD
from evs_train.config import Positions
from evs_train.data.manifest import read_rows
from evs_train.errors import DataError, RecipeError
from evs_train.evs import retained_tokens
from evs_train.generation import PrunedModel
from evs_train.models import FAMILIES
from tests.conftest import write_noise
from tests.parity.conftest import fresh
from tests.parity.rig import captured_inputs
from tests.runs import arguments, recipe_of

NEW_TOKENS = 8
RATES = (0.0, 0.75)
_LOADED: dict[str, PrunedModel] = {}


@pytest.fixture
def model(family_name: str, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    return loaded(family_name, tiny_checkpoint)


def loaded(family: str, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    if family not in _LOADED:
        _LOADED[family] = PrunedModel.load(tiny_checkpoint(family), dtype="float32", device="cpu", data={"fps": 8.0})
    return _LOADED[family]


@pytest.fixture(scope="module")
def messages(mixed_rows: Path) -> dict[str, list[dict[str, Any]]]:
    """Messages of each row up to its first answer, with their files."""
    prompts = {}
    for sample in read_rows([mixed_rows]):
        files = {"video": iter(sample.videos), "image": iter(sample.images)}
        parts = [
            part if part["type"] == "text" else {**part, part["type"]: next(files[part["type"]])}
            for part in sample.messages[0]["content"]
        ]
        prompts[sample.id] = [{"role": "user", "content": parts}]
    return prompts


def by_full_forwards(model: PrunedModel, inputs: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens (N,) and logits (N, V), each from a forward over the whole pruned sequence without a cache."""
    inputs, steps = dict(inputs), []
    for _ in range(count):
        with torch.inference_mode():
            steps.append(model.model(**inputs).logits[:, -1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], steps[-1].argmax(-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        if "position_ids" in inputs:
            positions = inputs["position_ids"]
            inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return inputs["input_ids"][0, -count:], torch.cat(steps)


def with_cache(model: PrunedModel, inputs: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Tokens (N,) and logits (N, V) of transformers' own loop on the same pruned prompt."""
    out = model.model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, -count:], torch.cat(out.logits)


@pytest.mark.capability("generation", "yes")
@pytest.mark.parametrize("name", ["two", "image", "text", "both"])
@pytest.mark.parametrize("rate", RATES)
def test_greedy_answers_are_those_of_full_forwards(
    model: PrunedModel, messages: dict[str, list[dict[str, Any]]], name: str, rate: float
) -> None:
    prompt = model.prompt(messages[name])
    expected, logits = by_full_forwards(model, model.inputs(prompt, rate), NEW_TOKENS)
    found = model.generate(prompt, rate, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert torch.equal(found, expected)
    cached, cached_logits = with_cache(model, model.inputs(prompt, rate), NEW_TOKENS)
    assert torch.equal(cached, expected)
    torch.testing.assert_close(cached_logits, logits, rtol=1e-4, atol=2e-5)


def test_the_prompt_is_pruned_and_the_answer_sees_it(
    model: PrunedModel, messages: dict[str, list[dict[str, Any]]]
) -> None:
    prompt = model.prompt(messages["two"])
    dense, pruned = (model.inputs(prompt, rate) for rate in RATES)
    assert dense["input_ids"].shape[1] == len(prompt.input_ids) > pruned["input_ids"].shape[1]
    assert not torch.equal(by_full_forwards(model, dense, 1)[1], by_full_forwards(model, pruned, 1)[1])


@pytest.mark.parametrize("name", ["two", "both"])
def test_the_prompt_is_the_beginning_of_the_training_row(
    model: PrunedModel,
    messages: dict[str, list[dict[str, Any]]],
    name: str,
    family_name: str,
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
) -> None:
    """Ids, positions and features: otherwise generation would agree with itself and with nothing else."""
    rig = fresh(family_name, tiny_checkpoint, mixed_rows)
    trained, found = captured_inputs(rig, rig.batch((name,), 0.75)), model.inputs(model.prompt(messages[name]), 0.75)
    length = found["input_ids"].shape[1]
    assert torch.equal(found["input_ids"], trained["input_ids"][:, :length])
    assert found.keys() - {"labels"} == trained.keys() - {"labels"}
    if "position_ids" in trained:
        assert torch.equal(found["position_ids"], trained["position_ids"][..., :length])
    for kind, outputs in found["mm_encoder_outputs"].items():
        expected = trained["mm_encoder_outputs"][kind].pooler_output
        for one, other in zip(outputs.pooler_output, expected, strict=True):
            assert torch.equal(one, other)


def test_the_rate_is_not_capped(model: PrunedModel, messages: dict[str, list[dict[str, Any]]]) -> None:
    """Engines prune short videos as far as they are told; only training leaves more than the first unit."""
    prompt = model.prompt(messages["two"])
    videos = [item for item in prompt.items if item.kind == "video"]
    dropped = sum(v.num_tokens - retained_tokens(v.num_units, v.tokens_per_unit, 0.9) for v in videos)
    assert model.inputs(prompt, 0.9)["input_ids"].shape[1] == len(prompt.input_ids) - dropped


@pytest.mark.parametrize(
    ("family", "rule"),
    [(name, rule) for name, family in FAMILIES.items() for rule in family.position_rules if rule != "preserve"],
)
def test_answers_follow_the_rule_for_positions(
    family: str, rule: Positions, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A video higher than wide, since `engine` differs from `preserve` behind those only."""
    write_noise(tmp_path / "high.mp4", num_frames=18, width=32)
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "video": str(tmp_path / "high.mp4")}, {"type": "text", "text": "Why?"}],
        }
    ]
    path = tiny_checkpoint(family)
    model = PrunedModel.load(path, dtype="float32", device="cpu", data={"fps": 8.0}, positions=rule)
    usual = loaded(family, tiny_checkpoint)
    prompt = model.prompt(chat)
    inputs, preserved = model.inputs(prompt, 0.75), usual.inputs(usual.prompt(chat), 0.75)
    assert not torch.equal(inputs["position_ids"], preserved["position_ids"])
    if rule == "sequential":
        assert inputs["position_ids"][0].tolist() == list(range(inputs["input_ids"].shape[1]))
    else:
        assert torch.equal(inputs["position_ids"][..., -1], prompt.position_ids[:, None, -1])
    expected, _ = by_full_forwards(model, inputs, NEW_TOKENS)
    assert torch.equal(model.generate(prompt, 0.75, max_new_tokens=NEW_TOKENS, eos_token_id=None), expected)


@pytest.mark.parametrize(("thinking", "ending"), [(True, "<think>\n"), (False, "<think></think>")])
def test_the_prompt_follows_the_template_s_variables(
    thinking: bool, ending: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    data = {"template_kwargs": {"enable_thinking": thinking}}
    model = PrunedModel.load(tiny_checkpoint("nemotron_h_omni"), dtype="float32", device="cpu", data=data)
    ids = model.prompt([{"role": "user", "content": "Hi."}]).input_ids
    assert model.family.processor.tokenizer.decode(ids).endswith(ending)


def test_answers_are_text_at_the_rate_of_the_checkpoint(
    model: PrunedModel, messages: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "trained_rate", 0.9)
    text = model.answer(messages["two"], max_new_tokens=NEW_TOKENS)
    prompt = model.prompt(messages["two"])
    decode = model.family.processor.tokenizer.decode
    assert text == decode(model.generate(prompt, 0.9, max_new_tokens=NEW_TOKENS), skip_special_tokens=True)
    assert text != ""


def test_the_rate_of_an_export_is_the_default(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:

    copy = Path(shutil.copytree(tiny_checkpoint("nemotron_h_omni"), tmp_path / "export"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"video_pruning_rate": 0.7}))
    model = PrunedModel.load(copy, dtype="float32", device="cpu")
    assert model.trained_rate == 0.7
    assert model.model.config.video_pruning_rate == 0.0  # or the model would prune once more


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}], "the last turn"),
        ([{"role": "user", "content": "<video>\nWhat?"}], "placeholder"),
        ([], "empty"),
    ],
)
def test_a_prompt_that_cannot_be_answered(
    tiny_checkpoint: Callable[[str], Path], turns: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        loaded("qwen3_vl", tiny_checkpoint).answer(turns)


def test_bad_arguments(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = loaded("qwen3_vl", tiny_checkpoint)
    with pytest.raises(RecipeError, match="rate"):
        model.answer([{"role": "user", "content": "Hi."}], pruning_rate=1.0)
    with pytest.raises(RecipeError, match="flash_attention_2"):
        PrunedModel.load(tiny_checkpoint("qwen3_vl"), attn_implementation="flash_attention_2")


def test_an_export_says_how_it_was_trained(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("llava_onevision"), tmp_path / "export"))
    settings = {"evs__positions": "sequential", "evs__score_dtype": "float32", "evs__score": "embeds"}
    recipe = recipe_of(arguments(copy, tmp_path / "rows.json", tmp_path, **settings))  # 8 frames
    (copy / EXPORT_RECORD).write_text(json.dumps({"recipe": recipe.model_dump()}))
    model = PrunedModel.load(copy, dtype="float32", device="cpu")
    assert (model.family.positions, model.float32_score, model.engine_score) == ("sequential", True, False)
    assert (model.sampling.num_frames, model.sampling.fps) == (8, None)
    other = PrunedModel.load(copy, dtype="float32", device="cpu", positions="preserve", data={"fps": 1.0})
    assert other.family.positions == "preserve"
    assert (other.sampling.num_frames, other.sampling.fps) == (None, 1.0)
