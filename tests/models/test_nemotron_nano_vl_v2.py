"""Code that comes with a checkpoint: what is refused, and the adapter over a stand-in for the released code.

The released weights and code could not be run here. The stand-in (`stand_in/`) has the release's names and the contract
of its forward, so these tests cover the adapter, the loading and the export, not the release.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from evs_train.config import PARTS, ModelSection
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.errors import ModelError
from evs_train.export import export_run
from evs_train.models import FAMILIES, REMOTE_FAMILIES
from evs_train.models.base import Family
from evs_train.models.loading import load_config, load_family, load_weights
from evs_train.models.tiny.common import chat_template, train_bpe
from evs_train.models.tiny.nemotron import NEMOTRON_TEXT, NEMOTRON_TOKENIZER
from evs_train.models.tuning import part_of
from evs_train.uptrain import Run
from tests.parity.rig import Rig, attention_mask, kept_positions
from tests.parity.tracing import trace
from tests.runs import STILL, arguments, metrics, recipe_of

CODE = Path(__file__).parent / "stand_in"
COMMIT = "cb5a65ff10232128389d882d805fa609427544f1"


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code that it runs into a cache: not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it lies on a disk: config.json with an auto_map, code, processor, weights in bfloat16."""
    folder = Path(shutil.copytree(CODE, tmp_path_factory.mktemp("remote") / "nano"))
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<img>", "</img>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe([], special),
        **NEMOTRON_TOKENIZER | {"extra_special_tokens": special, "pad_token": None},
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template("<image>\\n", "<video>\\n", "''"), encoding="utf-8")
    token_id = tokenizer.convert_tokens_to_ids
    code = {"AutoProcessor": "processing.NemotronNanoVLV2Processor"}
    image_code = {"AutoImageProcessor": "image_processing.NemotronNanoVLV2ImageProcessor"}
    write(folder / "preprocessor_config.json", {"auto_map": code | image_code, "image_size": 32, "max_num_tiles": 4})
    write(folder / "processor_config.json", {"auto_map": code, "processor_class": "NemotronNanoVLV2Processor"})
    model_code = {
        "AutoConfig": "configuration.NemotronH_Nano_VL_V2_Config",
        "AutoModel": "modeling.NemotronH_Nano_VL_V2",
    }
    fields = {
        "model_type": "NemotronH_Nano_VL_V2",
        "architectures": ["NemotronH_Nano_VL_V2"],
        "auto_map": model_code | {"AutoModelForCausalLM": model_code["AutoModel"]},
        "llm_config": NEMOTRON_TEXT | {"vocab_size": len(tokenizer)},
        "force_image_size": 32,
        "patch_size": 4,
        "downsample_ratio": 0.5,
        "vit_hidden_size": 16,
        "img_context_token": "<image>",
        "img_context_token_id": token_id("<image>"),
        "video_context_token": "<video>",
        "video_context_token_id": token_id("<video>"),
        "video_pruning_rate": 0.7,
    }
    write(folder / "config.json", fields)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModel.from_config(config, trust_remote_code=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


def section(path: Path | str, **options: Any) -> ModelSection:
    return ModelSection(path=str(path), attn_implementation="eager", **{"trust_remote_code": True, **options})


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return load_family(section(checkpoint), DataSection(rows="unused.json"))


@pytest.fixture(scope="module")
def rig(checkpoint: Path, mixed_rows: Path) -> Rig:
    return Rig(checkpoint, mixed_rows, torch.bfloat16, section=section(checkpoint))


# What is refused


def changed(checkpoint: Path, folder: Path, **fields: Any) -> Path:
    """A checkpoint whose code leaves a mark as soon as it runs."""
    copy = Path(shutil.copytree(checkpoint, folder / "checkpoint"))
    for file in copy.glob("*.py"):
        file.write_text("raise SystemExit('the code of the checkpoint was run')\n", encoding="utf-8")
    write(copy / "config.json", json.loads((checkpoint / "config.json").read_text()) | fields)
    return copy


def test_code_that_is_not_trusted_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path)
    with pytest.raises(ModelError, match=r"'NemotronH_Nano_VL_V2' of .+ is code that comes with") as caught:
        load_family(section(folder, trust_remote_code=False), DataSection(rows="unused.json"))
    assert "model.trust_remote_code: true" in caught.value.hint


@pytest.mark.parametrize("trusted", [False, True])
def test_code_without_an_adapter_is_not_run(checkpoint: Path, tmp_path: Path, trusted: bool) -> None:
    folder = changed(checkpoint, tmp_path, model_type="unheard_of")
    with pytest.raises(ModelError, match=r"^the architecture 'unheard_of' of .+ is not supported") as caught:
        load_config(str(folder), trust_remote_code=trusted)
    assert all(name in caught.value.hint for name in FAMILIES | REMOTE_FAMILIES)
    assert "docs/adding-a-family.md" in caught.value.hint


@pytest.mark.parametrize(("model_type", "native"), [("internvl_chat", "internvl")])
def test_other_formats_of_supported_models_are_named(
    checkpoint: Path, tmp_path: Path, model_type: str, native: str
) -> None:
    folder = changed(checkpoint, tmp_path, model_type=model_type)
    with pytest.raises(ModelError, match=rf"^the architecture '{model_type}' of .+ is not supported") as caught:
        load_config(str(folder), trust_remote_code=True)
    assert f"({native})" in caught.value.hint


def test_a_supported_architecture_runs_none_of_a_checkpoint_s_code(
    checkpoint: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = changed(checkpoint, tmp_path)
    for file in tiny_checkpoint("qwen3_vl").iterdir():
        shutil.copy(file, folder)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        write(folder / name, fields | {"auto_map": {"AutoConfig": "modeling.A", "AutoProcessor": "processing.B"}})
    model = section(folder)
    assert type(load_family(model, DataSection(rows="unused.json")).processor).__module__.startswith("transformers.")
    assert load_weights(model, load_config(str(folder), None, True), torch.bfloat16).__module__.startswith(
        "transformers."
    )


def hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """A hub name whose config.json is that of `checkpoint`; nothing else of it can be had."""
    fields = json.loads((checkpoint / "config.json").read_text())
    monkeypatch.setattr(
        "transformers.PreTrainedConfig.get_config_dict", classmethod(lambda cls, path, **options: (dict(fields), {}))
    )


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT.upper()])
def test_a_hub_name_must_be_pinned(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    hub(monkeypatch, checkpoint)
    with pytest.raises(ModelError, match="the code of nvidia/nano is not pinned") as caught:
        load_config("nvidia/nano", revision, trust_remote_code=True)
    assert "model.revision" in caught.value.hint
    with pytest.raises(
        ModelError, match=r"^the checkpoint nvidia/nano cannot be read"
    ):  # pinned: it goes on to the hub
        load_config("nvidia/nano", COMMIT, trust_remote_code=True)


def test_code_of_further_repositories_is_read_from_the_cache_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release's vision config sends transformers to nvidia/C-RADIOv2-H, at whatever revision is there."""
    vision = {"auto_map": {"AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig"}}
    folder = changed(checkpoint, tmp_path, vision_config=vision)
    for file in CODE.glob("*.py"):
        shutil.copy(file, folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"runs code of nvidia/C-RADIOv2-H, which nothing pins") as caught:
        load_config(str(folder), trust_remote_code=True)
    assert "HF_HUB_OFFLINE=1" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_config(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json"])
def test_the_processor_s_files_are_looked_at_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = changed(checkpoint, tmp_path)
    fields = json.loads((folder / file).read_text())
    write(folder / file, fields | {"auto_map": {"AutoTokenizer": [None, "some-one/else--code.Fast"]}})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"runs code of some-one/else, which nothing pins"):
        load_config(str(folder), trust_remote_code=True)


def test_code_for_another_transformers_is_an_error_with_a_hint(checkpoint: Path, tmp_path: Path) -> None:
    """The released code, as far as it was read, ends its `__init__` without `post_init`."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    code = (folder / "modeling.py").read_text(encoding="utf-8")
    (folder / "modeling.py").write_text(code.replace("        self.post_init()\n", ""), encoding="utf-8")
    with pytest.raises(ModelError, match=r"^the code of .+ does not fit .+ 'all_tied_weights_keys'") as caught:
        load_weights(section(folder), load_config(str(folder), None, True), torch.bfloat16)
    assert "self.post_init()" in caught.value.hint


# The adapter


def test_a_frame_is_a_unit_and_a_line(family: Family) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 20, 60, 3), dtype=np.uint8)
    clip = Clip(frames, [0, 15, 30], 30.0, np.array([0.0, 0.5, 1.0]), 40, 4 / 3, "clip.mp4")
    picture = Image.fromarray(frames[0])
    prepared = family.prepare("a<video>\nb<image>\nc", [clip], [picture])
    run = "<image>" * 16
    assert family.processor.tokenizer.decode(prepared.input_ids) == (
        f"aThis is a video:\nFrame 1 sampled at 0.00 seconds: <img>{run}</img>\nFrame 2 sampled at 0.49 seconds: "
        f"<img>{run}</img>\nFrame 3 sampled at 0.99 seconds: <img>{run}</img>\n\nb<img>{run * 3}</img>\nc"
    )
    assert [(item.kind, item.num_units, item.tokens_per_unit) for item in prepared.items] == [
        ("video", 3, 16),
        ("image", 1, 48),
    ]
    assert prepared.media["pixel_values_videos"][0].shape == (3, 3, 32, 32)  # a frame is never cut into tiles
    assert prepared.media["pixel_values"][0].shape == (3, 3, 32, 32)
    assert int(prepared.media_mask.sum()) == sum(item.num_tokens for item in prepared.items)


def plain(rig: Rig, batch: dict[str, Any]) -> Any:
    """The stand-in's own forward, with all tiles and frames in reading order."""
    media, size = batch["media"], rig.family.config.force_image_size
    images, videos = (iter(media.get(name, ())) for name in ("pixel_values", "pixel_values_videos"))
    tiles = [next(videos if planned.item.kind == "video" else images) for planned in batch["plan"].items]
    pixels = torch.cat(tiles) if tiles else torch.zeros(1, 3, size, size)
    return rig.model(
        pixel_values=pixels.to(torch.bfloat16),
        input_ids=batch["input_ids"],
        attention_mask=attention_mask(batch),
        image_flags=torch.full((len(pixels), 1), int(bool(tiles))),
        labels=batch["labels"],
    )


@pytest.mark.parametrize(
    "names", [("two", "image", "text", "still", "both"), ("two",), ("image",), ("text",)], ids="+".join
)
def test_rate_zero_equals_the_plain_forward(rig: Rig, names: tuple[str, ...]) -> None:
    batch = rig.batch(names)
    rig.model.train().zero_grad(set_to_none=True)
    expected = plain(rig, batch)
    expected.loss.backward()
    wanted = rig.gradients()
    rig.model.zero_grad(set_to_none=True)
    pruned, _ = rig.full(batch, encoder_trains=True)
    pruned.loss.backward()
    assert torch.equal(pruned.logits, expected.logits)
    assert torch.equal(pruned.loss, expected.loss)
    for name, gradient in rig.gradients().items():
        assert gradient is not None, name
        if part_of(name, rig.family) == "language_model":
            torch.testing.assert_close(gradient, wanted[name], rtol=0.02, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rate", [0.3, 0.75])
def test_kept_tokens_are_those_of_the_slow_reference(rig: Rig, rate: float) -> None:
    batch = rig.batch(("two", "both", "text"), rate)
    kept = kept_positions(rig, batch)
    seen: dict[str, Any] = {}
    handle = rig.model.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs), with_kwargs=True)
    _, labels = rig.full(batch)
    handle.remove()
    assert batch["plan"].video_tokens_after < batch["plan"].video_tokens_before
    with torch.no_grad():
        text = rig.model.language_model.get_input_embeddings()(batch["input_ids"])
    for row in range(3):
        length = batch["plan"].num_tokens[row]
        assert int(seen["attention_mask"][row].sum()) == length
        assert torch.equal(labels[row, :length], batch["labels"][row, kept[row]])
        words = batch["input_ids"][row, kept[row]] != rig.family.config.img_context_token_id
        assert torch.equal(seen["inputs_embeds"][row, :length][words], text[row, kept[row]][words])


# A run


@pytest.mark.parametrize("kind", ["uptrain", "teacher", "sandwich"])
def test_accumulation_does_not_change_the_loss(kind: str, checkpoint: Path, mixed_rows: Path, tmp_path: Path) -> None:
    """Its own loss would be an average over a micro-batch; rows of one step differ in their supervised tokens."""
    trust = {"model__trust_remote_code": True, "model__dtype": "bfloat16", "model__attn_implementation": "eager"}
    losses = []
    for size in (4, 1):
        options = {
            "train__batch_size": size,
            "train__grad_accumulation": 4 // size,
            "train__steps": 2,
            "objective": {"kind": kind},
            **trust,
            **STILL,
        }
        Run(recipe_of(arguments(checkpoint, mixed_rows, tmp_path / str(size), **options))).train()
        lines = metrics(tmp_path / str(size))
        losses.append([line[name] for line in lines for name in line if name == "loss" or name.startswith("loss/pass")])
    assert len(losses[0]) == 2 * {"uptrain": 1, "teacher": 3, "sandwich": 4}[kind]
    assert losses[1] == pytest.approx(losses[0], rel=3e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_and_its_export(checkpoint: Path, world: Path, tmp_path: Path, method: str) -> None:
    options = {"tuning__method": method, "train__steps": 2, "train__batch_size": 2, "train__grad_accumulation": 2}
    trust = {"model__trust_remote_code": True, "model__dtype": "bfloat16", "model__attn_implementation": "eager"}
    run = Run(recipe_of(arguments(checkpoint, world, tmp_path / "run", **options, **trust, optim__lr=1e-2)))
    run.train()
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert all(0 < loss < 10 for loss in losses), losses  # a mean over tokens: log of the vocabulary is 6.4
    export = export_run(tmp_path / "run", rate=0.6)
    before = json.loads((checkpoint / "config.json").read_text())
    assert json.loads((export.path / "config.json").read_text()) == before | {"video_pruning_rate": 0.6}
    for file in CODE.glob("*.py"):
        assert (export.path / file.name).read_bytes() == file.read_bytes()
    tensors = {folder: load_file(folder / "model.safetensors") for folder in (checkpoint, export.path)}
    old, new = tensors[checkpoint], tensors[export.path]
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
    changed_parts = {part_of(name, run.family) for name in old if not torch.equal(old[name], new[name])}
    assert changed_parts == (set(PARTS) if method == "full" else {"language_model"})
    assert load_weights(section(export.path), load_config(str(export.path), None, True), torch.bfloat16) is not None


def test_the_device_half_never_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without values, so its embedding is that of any ids."""
    width = rig.model.language_model.get_input_embeddings().embedding_dim
    embedding = nn.Module()
    monkeypatch.setattr(embedding, "forward", lambda ids: torch.empty(*ids.shape, width, device=ids.device))
    monkeypatch.setattr(rig.model.language_model, "get_input_embeddings", lambda: embedding)
    inputs, waits = trace(rig, rig.batch(("two", "image", "text", "still", "both"), 0.5))
    assert waits.places == []
    assert inputs["inputs_embeds"].device.type == inputs["pixel_values"].device.type == "cuda"
