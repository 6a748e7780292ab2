"""What is shown is what the model does: the choice of its hook, the counts of the formula, the scores of the rule."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers.utils import logging

from evs_train import prune
from evs_train.checkpoint import EXPORT_RECORD
from evs_train.config import ModelSection
from evs_train.data.sources import FrameList
from evs_train.errors import ModelError, RecipeError
from evs_train.evs import FIRST_UNIT_SCORE, retained_tokens
from evs_train.generation import PrunedModel
from evs_train.inspection.observe import load, observe, own_dtype, rates_of
from evs_train.inspection.options import InspectOptions
from evs_train.models.loading import adapter_of, load_config, load_encoder
from evs_train.models.tuning import part_of
from evs_train.prune import to_device
from tests.inspection.conftest import RATES, Look
from tests.runs import arguments, recipe_of


def options(checkpoint: Path, **changed: Any) -> InspectOptions:
    settings: dict[str, Any] = {"rates": None, "out": Path("o.png"), "dtype": None, "method": None}
    return InspectOptions("clip.mp4", str(checkpoint), **{**settings, "data": {}, "model": {}, **changed})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kept_is_what_the_whole_model_keeps(
    family_name: str,
    dtype: Any,
    look: Look,
    wide_clip: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole model answers a prompt; what its hook hands to `compact` is the choice."""
    chosen: list[torch.Tensor] = []
    compact = prune.compact

    def spy(batch: Any, selected: Any, pad_token_id: int) -> Any:
        chosen.extend(choice.index for choice in selected)
        return compact(batch, selected, pad_token_id)

    monkeypatch.setattr(prune, "compact", spy)
    whole = PrunedModel.load(tiny_checkpoint(family_name), dtype=dtype, data={"fps": 8.0})
    parts = [{"type": "video", "video": str(wide_clip)}, {"type": "text", "text": "What changes?"}]
    prompt = whole.prompt([{"role": "user", "content": parts}])
    for rate in RATES:
        whole.inputs(prompt, rate)
    seen = look(family_name, dtype=dtype)
    assert len(chosen) == len(seen.kept) == len(RATES)
    for of_rate, selected in zip(seen.kept, chosen, strict=True):
        assert np.flatnonzero(of_rate).tolist() == selected.tolist()
    (item,) = prompt.items
    assert seen.kept.shape[1:] == seen.scores.shape == (item.num_units, item.height, item.width)


def test_counts_are_the_formula_s(family_name: str, look: Look) -> None:
    seen = look(family_name)
    for rate, of_rate, counts in zip(RATES, seen.kept, seen.counts, strict=True):
        assert of_rate.sum() == counts.sum() == retained_tokens(seen.num_units, seen.tokens_per_unit, rate)
        assert counts[0] == seen.tokens_per_unit
    assert len(seen.clip.frames) == 13
    assert seen.num_units == -(-13 // seen.frames_per_unit)


def test_scores_are_the_rule_s(
    family_name: str, look: Look, wide_clip: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """1 - cosine to the same place in the unit before, by hand, of what the whole model encodes."""
    whole = PrunedModel.load(tiny_checkpoint(family_name), dtype="float32", data={"fps": 8.0})
    parts = [{"type": "video", "video": str(wide_clip)}, {"type": "text", "text": "What changes?"}]
    prompt = whole.prompt([{"role": "user", "content": parts}])
    with torch.inference_mode():
        (features,) = whole.family.encode(whole.model, to_device(prompt.media, whole.model.device), "video")
    (item,) = prompt.items
    scored = whole.family.score_tensor(features)[: item.num_tokens].double().cpu().numpy()
    grids = scored.reshape(item.num_units, item.height, item.width, -1)
    norms = np.linalg.norm(grids, axis=-1)
    expected = 1 - (grids[1:] * grids[:-1]).sum(-1) / (norms[1:] * norms[:-1])
    scores = look(family_name).scores
    assert (scores[0] == FIRST_UNIT_SCORE).all()
    np.testing.assert_allclose(scores[1:], expected, atol=2e-6)


def test_the_map_is_hot_where_the_picture_changes(family_name: str, look: Look, tmp_path: Path) -> None:
    """Rows and columns are those of the picture: only its upper right quarter changes."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "corner.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(8):
            picture[:32, 48:] = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    seen = look(family_name, video=tmp_path / "corner.mp4")
    _, height, width = seen.scores.shape
    mean = seen.scores[1:].mean(axis=0)
    quarter = mean[: height // 2, (width + 1) // 2 :].mean()
    others = [mean[: height // 2, : width // 2], mean[(height + 1) // 2 :]]
    assert quarter > 2 * max(other.mean() for other in others)


def test_only_the_encoder_is_loaded(family_name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    path, verbosity = tiny_checkpoint(family_name), logging.get_verbosity()
    config = load_config(str(path))
    model = load_encoder(ModelSection(path=str(path)), config, torch.bfloat16)
    names = [name for name, _ in model.named_parameters() if part_of(name, adapter_of(config)) == "language_model"]
    layers = {found[1] for name in names if (found := re.search(r"layers\.(\d+)\.", name))}
    assert layers == {"0"}
    assert config.get_text_config().num_hidden_layers > 1
    assert logging.get_verbosity() == verbosity


def test_verbosity_comes_back_when_loading_fails(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"damaged")
    verbosity = logging.get_verbosity()
    with pytest.raises(ModelError):
        load(options(copy))
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize(("num_frames", "num_units"), [(1, 1), (2, 1), (5, 3)])
def test_short_videos(num_frames: int, num_units: int, look: Look, tmp_path: Path) -> None:
    from tests.conftest import write_noise

    write_noise(tmp_path / "short.mp4", num_frames=num_frames)
    seen = look(video=tmp_path / "short.mp4")
    assert (len(seen.clip.frames), seen.num_units, seen.frames_per_unit) == (num_frames, num_units, min(num_frames, 2))


def test_any_source(encoder: Callable[..., PrunedModel], tmp_path: Path) -> None:
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    frames = FrameList(tuple(str(tmp_path / f"{number}.png") for number in range(4)), fps=4.0)
    seen = observe(encoder("qwen3_vl"), frames, (0.5,))
    assert seen.clip.timestamps.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert [seen.seconds(unit) for unit in range(2)] == [0.0, 0.5]


def test_an_export_brings_rate_sampling_scores_and_dtype(
    tiny_checkpoint: Callable[[str], Path], wide_clip: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "export"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"video_pruning_rate": 0.6}))
    settings = {"evs__score": "embeds", "evs__score_dtype": "float32", "model__dtype": "bfloat16"}
    recipe = recipe_of(arguments(copy, tmp_path / "rows.json", tmp_path, **settings))  # 8 frames
    (copy / EXPORT_RECORD).write_text(json.dumps({"recipe": recipe.model_dump()}))
    asked = options(copy)
    model = load(asked)
    assert model.model.dtype == torch.bfloat16
    assert rates_of(asked, model) == (0.6,)
    assert rates_of(options(copy, rates=(0.0, 0.9)), model) == (0.0, 0.9)
    seen = observe(model, str(wide_clip), (0.6,))
    assert seen.scored_as == "with evs.score=embeds in float32"
    assert len(seen.clip.frames) == 8
    assert not np.allclose(
        seen.scores[1:], observe(load(options(copy, dtype="float32")), str(wide_clip), (0.6,)).scores[1:]
    )
    with pytest.raises(RecipeError, match="min_frames"):
        load(options(copy, data={"min_frames": 4096}))


def test_the_checkpoint_s_own_dtype(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    assert own_dtype(options(copy)) == "float32"
    for said, read in (("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        (copy / "config.json").write_text(json.dumps(config | {"dtype": said}))
        assert own_dtype(options(copy)) == read


def test_a_checkpoint_without_a_rate_needs_one(encoder: Callable[..., PrunedModel]) -> None:
    with pytest.raises(RecipeError, match=r"add rate=0\.75"):
        rates_of(options(Path("some/model")), encoder("qwen3_vl"))
