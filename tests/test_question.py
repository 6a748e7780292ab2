"""Video tokens dropped inside the language model: which, and that dropping them equals masking them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evs_train.data.chat import Example
from evs_train.data.manifest import read_rows
from evs_train.data_config import DataSection
from evs_train.errors import RecipeError
from evs_train.evaluate.console import rows_of_table
from evs_train.evaluate.data import assemble, rows_of
from evs_train.evaluate.local import LocalModel
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.score import log_likelihoods
from evs_train.evaluate.summary import summarise
from evs_train.generation import PrunedModel
from evs_train.inputs import Inputs
from evs_train.pruners.base import Selection
from tests.runs import arguments, recipe_of

KNOWN = (
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "video_llama_3",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("internvl", "qwen3_vl_moe")),
)
RATE, ALPHA = 0.3, 0.4
_LOADED: dict[str, PrunedModel] = {}
_SEEN: dict[str, tuple[Example, list[int]]] = {}


def method(alpha: float, layer: str = "1/3") -> dict[str, Any]:
    return {"kind": "prunevid", "alpha": alpha, "layer": layer}


@pytest.fixture(params=KNOWN)
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    return loaded(str(request.param), tiny_checkpoint)


def layer_of(family: str) -> int:
    """Behind which of the three layers tokens are dropped: the first, or the second, up to which deepstack adds."""
    return int(family.startswith("qwen3"))


def loaded(family: str, tiny_checkpoint: Callable[[str], Path]) -> PrunedModel:
    """Its weights are large enough for attention to tell tokens apart."""
    if family not in _LOADED:
        path = tiny_checkpoint(family)
        spec = method(ALPHA, f"{layer_of(family)}/3")
        model = PrunedModel.load(path, dtype="float32", device="cpu", data={"fps": 8.0}, method=spec)
        with torch.no_grad():
            for layer in model.model.get_decoder().layers:
                layer.self_attn.q_proj.weight *= 8
                layer.self_attn.k_proj.weight *= 8
        _LOADED[family] = model
    return _LOADED[family]


@pytest.fixture(scope="module")
def chat(mixed_rows: Path) -> list[dict[str, Any]]:
    """A question about two videos, the second of which changes in every frame."""
    sample = next(one for one in read_rows([mixed_rows]) if one.id == "two")
    files = iter(sample.videos)
    parts = [p if p["type"] == "text" else {**p, "video": next(files)} for p in sample.messages[0]["content"]]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def seen(model: PrunedModel, chat: list[dict[str, Any]]) -> tuple[Example, list[int]]:
    """The prompt, and the places of its pruned form that go on."""
    name = model.family.model_type
    if name not in _SEEN:
        prompt = model.prompt(chat)
        _SEEN[name] = prompt, slow_kept(model, prompt)
    return _SEEN[name]


def places_of_video(model: PrunedModel, prompt: Example) -> tuple[list[int], list[int]]:
    """Places of video tokens in the pruned prompt, by the placeholders of its ids, and of the text behind them."""
    ids = model.inputs(prompt, RATE)["input_ids"][0].tolist()
    placeholder = int(prompt.input_ids[prompt.spans[0][0]])
    video = [place for place, token in enumerate(ids) if token == placeholder]
    behind = len(prompt.input_ids) - 1 - max(int(span[-1]) for span in prompt.spans)
    question = [place for place in range(len(ids) - behind, len(ids)) if place not in video]
    if model.family.model_type == "llava_onevision":  # a newline behind each video, which always stays
        ends = [place for place in video if place + 1 not in video]
        video = [place for place in video if place not in ends]
    return video, question


def slow_kept(model: PrunedModel, prompt: Example) -> list[int]:
    """Places that go on, one head and one token of the question after the other, in double precision."""
    inputs, (video, question) = model.inputs(prompt, RATE), places_of_video(model, prompt)
    attention = model.model.get_decoder().layers[layer_of(model.family.model_type)].self_attn
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        model.model(**inputs)
        handle.remove()
        size = attention.head_dim
        queries = attention.q_proj(seen[0])[0].unflatten(-1, (-1, size))
        keys = attention.k_proj(seen[0])[0].unflatten(-1, (-1, size))
        if model.family.model_type.startswith("qwen3"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    paid = dict.fromkeys(video, 0.0)
    for head in range(queries.shape[1]):
        of_head = keys[:, head * keys.shape[1] // queries.shape[1]].double()
        for place in question:
            weights = torch.softmax(of_head @ queries[place, head].double() / size**0.5, dim=0).tolist()
            paid = {one: max(most, weights[one]) for one, most in paid.items()}
    count = -(-len(video) * 4 // 10)
    stays = sorted(video, key=lambda one: -paid[one])[:count]
    return [place for place in range(len(seen[0][0])) if place not in video or place in stays]


def masked(model: PrunedModel, prompt: Example, kept: Sequence[int], more: Sequence[int] = ()) -> Tensor:
    """(S, V) logits of a plain forward in which later layers, and tokens behind the prompt, see `kept` only."""
    inputs = dict(model.inputs(prompt, RATE))
    length, count = inputs["input_ids"].shape[1], len(more)
    if more:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(more)])], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)
        positions = inputs["position_ids"]
        inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + torch.arange(1, count + 1)], dim=-1)
    dropped = [place for place in range(length) if place not in kept]
    early = torch.ones(length + count, length + count, dtype=torch.bool).tril()
    early[length:, dropped] = False
    late = early.clone()
    late[:, dropped] = False
    late.fill_diagonal_(True)  # what is dropped sees itself; nothing sees it
    masks = [early] * (layer_of(model.family.model_type) + 1) + [late, late]

    def put(number: int) -> Any:
        return lambda m, args, kwargs: (args, {**kwargs, "attention_mask": masks[number][None, None]})

    layers = model.model.get_decoder().layers
    handles = [layer.register_forward_pre_hook(put(number), with_kwargs=True) for number, layer in enumerate(layers)]
    with torch.inference_mode():
        logits: Tensor = model.model(**inputs).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def test_what_is_dropped_is_what_later_layers_do_not_see(model: PrunedModel, seen: tuple[Example, list[int]]) -> None:
    prompt, kept = seen
    with model.prepared(prompt, RATE, model.encode(prompt)) as inputs, torch.inference_mode():
        out = model.model(**inputs, use_cache=True)
    before = inputs["input_ids"].shape[1]
    video, _ = places_of_video(model, prompt)
    assert len(kept) == before - (len(video) - -(-len(video) * 4 // 10)) < before
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [len(kept)] * 3
    assert [layer.values.shape[2] for layer in out.past_key_values.layers] == [len(kept)] * 3
    torch.testing.assert_close(out.logits[0], masked(model, prompt, kept)[kept], rtol=1e-4, atol=2e-5)


def test_answers_go_on_from_what_is_kept(model: PrunedModel, seen: tuple[Example, list[int]]) -> None:
    (prompt, kept), new = seen, list[int]()
    for _ in range(4):
        new.append(int(masked(model, prompt, kept, new)[-1].argmax()))
    found = model.generate(prompt, RATE, max_new_tokens=4, eos_token_id=None)
    assert found.tolist() == new


def test_choices_are_scored_as_they_would_be_generated(model: PrunedModel, seen: tuple[Example, list[int]]) -> None:
    """Of several lengths, with a common beginning, which does not count; and of one token."""
    (prompt, kept), encoded = seen, model.encode(seen[0])
    for choices, shared in (([[40, 41, 42, 43], [40, 50], [40, 41, 44]], 1), ([[40], [50]], 0)):
        expected = []
        for choice in choices:
            steps = masked(model, prompt, kept, choice[:-1])[-len(choice) :].log_softmax(-1)
            expected.append(sum(float(steps[place, choice[place]]) for place in range(shared, len(choice))))
        assert log_likelihoods(model, prompt, encoded, RATE, choices) == pytest.approx(expected, abs=2e-4)


def test_a_share_of_1_and_a_rate_of_0_change_nothing(model: PrunedModel, seen: tuple[Example, list[int]]) -> None:
    prompt, encoded = seen[0], model.encode(seen[0])
    all_kept = dataclasses.replace(model, pruner=dataclasses.replace(model.pruner, alpha=1.0))  # type: ignore[call-arg]
    for one, rate in ((all_kept, RATE), (model, 0.0)):
        with torch.inference_mode():
            plain = model.model(**model.inputs(prompt, rate)).logits
            with one.prepared(prompt, rate, encoded) as inputs:
                assert torch.equal(model.model(**inputs).logits, plain)
    assert all(not layer._forward_pre_hooks for layer in model.model.get_decoder().layers)


def test_a_prompt_without_video_is_as_it_was(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = loaded("llava_onevision", tiny_checkpoint)
    prompt = model.prompt([{"role": "user", "content": "Why?"}])
    with model.prepared(prompt, RATE, model.encode(prompt)) as inputs:
        assert inputs["input_ids"].shape[1] == len(prompt.input_ids)
        assert model.model(**inputs).logits.shape[1] == len(prompt.input_ids)


@pytest.mark.parametrize(
    ("family", "layer", "said"),
    [
        ("glm4v", "1/3", "evs.method.alpha: not with glm4v, whose language model is glm4v_text"),
        ("qwen3_5", "1/3", "evs.method.alpha: not with qwen3_5"),
        ("llava_onevision", "2/3", "behind layer 2 of 3 (counted from 0)"),
        ("qwen3_vl", "10/32", "name a share that gives one from 1 to 1"),  # deepstack adds behind layers 0 and 1
    ],
)
def test_what_cannot_be_cut_is_refused(
    family: str, layer: str, said: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        PrunedModel.load(tiny_checkpoint(family), dtype="float32", device="cpu", method=method(ALPHA, layer))
    assert said in f"{caught.value.message}; {caught.value.hint}"


def test_a_cache_that_does_not_grow_is_refused(
    tiny_checkpoint: Callable[[str], Path], chat: list[dict[str, Any]]
) -> None:
    model = loaded("llava_onevision", tiny_checkpoint)
    with pytest.raises(RecipeError, match="a cache that grows"):
        model.generate(model.prompt(chat), RATE, max_new_tokens=2, cache_implementation="static")


def test_it_is_not_trained_with(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(arguments(tiny_checkpoint("llava_onevision"), mixed_rows, tmp_path, evs__method=method(ALPHA)))

    with pytest.raises(RecipeError, match=r"evs\.method\.alpha: .* cannot be trained"):
        Inputs(recipe)


def test_counts_and_layers() -> None:
    assert [Selection(0.4, 0).num_selected(count) for count in (0, 1, 5, 6, 1000)] == [0, 1, 2, 3, 400]
    assert Selection(0.07, 0).num_selected(100) == 7
    assert [Selection(0.4, 10 / 32).layer(count) for count in (32, 28, 3)] == [10, 8, 0]
    assert Selection(0.4, 1 / 3).layer(3) == 1


def test_an_evaluation_tells_both_numbers(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> None:
    model = loaded("llava_onevision", tiny_checkpoint)
    rows = tmp_path / "rows.json"
    rows.write_text('[{"video": "%s", "question": "What?", "answer": "B"}]' % (world.parent / "clips" / "000000.mp4"))
    (question,), _ = assemble(rows_of(DataSection(rows=[str(rows)]), spoken=False))
    options = EvalOptions(model=["none"], data=[str(rows)], rates=[0.0, 0.5], max_new_tokens=2, timed=1)
    records = LocalModel(0, model, options).answer(question, [0.0, 0.5])
    dense, pruned = records
    assert dense.selected is None
    assert pruned.retained == dense.video_tokens // 2  # type: ignore[operator]
    assert pruned.selected == -(-pruned.retained * 4 // 10)
    points = summarise(records, 1, ["a"], options)["models"][0]["points"]
    assert "selected_share" not in points[0]
    assert points[1]["selected_tokens"] == pruned.selected
    assert [row[4] for row in rows_of_table({"points": points})] == ["100%", "50%, then 20%"]
    assert points[1]["prefill"]["seconds"] > 0
