"""Loading and tuning: what is refused, and that exactly the chosen parameters train, each in one optimizer group."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ParakeetEncoderConfig

from evs_train.config import PARTS, LoraSection, ModelSection, OptimSection, Part, TuningSection
from evs_train.data_config import DataSection
from evs_train.errors import ModelError, RecipeError
from evs_train.models import FAMILIES
from evs_train.models.base import Family
from evs_train.models.loading import load_config, load_family, load_weights, without_weights
from evs_train.models.tuning import apply_tuning, encoder_trains, parameter_groups, part_of, part_sizes

# Each part's modules and parameters, written down a second time, by attribute path: `parts` of the adapters must agree.
MODULES: dict[str, dict[Part, list[str]]] = {
    "qwen3_vl": {
        "vision": ["model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"],
        "projector": ["model.visual.merger", "model.visual.deepstack_merger_list"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "qwen2_5_vl": {
        "vision": ["model.visual.patch_embed", "model.visual.blocks"],
        "projector": ["model.visual.merger"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "qwen3_5": {
        "vision": ["model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"],
        "projector": ["model.visual.merger"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "glm4v": {
        "vision": [
            "model.visual.patch_embed",
            "model.visual.post_conv_layernorm",
            "model.visual.embeddings",
            "model.visual.blocks",
            "model.visual.post_layernorm",
        ],
        "projector": ["model.visual.downsample", "model.visual.merger"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "llava_onevision": {
        "vision": ["model.vision_tower.embeddings", "model.vision_tower.encoder"],
        "projector": ["model.multi_modal_projector", "model.image_newline"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "video_llama_3": {
        "vision": ["model.vision_model"],
        "projector": ["model.projector"],
        "language_model": ["model.language_model", "lm_head"],
    },
    "nemotron_h_omni": {
        "vision": ["vision_model"],
        "projector": ["multi_modal_projector"],
        "language_model": ["language_model"],
    },
    "internvl": {
        "vision": ["model.vision_tower"],
        "projector": ["model.multi_modal_projector"],
        "language_model": ["model.language_model", "lm_head"],
    },
}
MODULES["qwen3_vl_moe"] = MODULES["qwen3_vl"]
MODULES["glm46v"] = MODULES["glm4v"]
UNUSED = {  # where a plain checkpoint has such modules
    "llava_onevision": ["model.vision_tower.post_layernorm"],
    "nemotron_h_omni": [
        "audio_tower",
        "embed_audio",
        *(f"vision_model.encoder.layer.{layer}.layer_scale{scale}" for layer in range(2) for scale in (1, 2)),
    ],
}
FREEZE_CHOICES = [list(parts) for size in range(len(PARTS)) for parts in itertools.combinations(PARTS, size)]
LORA_TARGETS: dict[tuple[str, Part], str] = {
    ("qwen3_vl", "vision"): "linear_fc1",  # a name that the projector has, too
    ("qwen3_vl", "projector"): "linear_fc1",
    ("qwen3_vl", "language_model"): "q_proj",
    ("qwen3_vl_moe", "vision"): "linear_fc1",
    ("qwen3_vl_moe", "projector"): "linear_fc1",
    ("qwen3_vl_moe", "language_model"): "q_proj",
    ("qwen2_5_vl", "vision"): "gate_proj",  # a name that the language model has, too
    ("qwen2_5_vl", "projector"): "0",  # of an nn.Sequential
    ("qwen2_5_vl", "language_model"): "q_proj",
    ("qwen3_5", "vision"): "linear_fc1",
    ("qwen3_5", "projector"): "linear_fc1",
    ("qwen3_5", "language_model"): "in_proj_qkv",
    ("glm4v", "vision"): "gate_proj",  # a name that the projector has, too
    ("glm4v", "projector"): "gate_proj",
    ("glm4v", "language_model"): "gate_up_proj",
    ("glm46v", "vision"): "gate_proj",
    ("glm46v", "projector"): "gate_proj",
    ("glm46v", "language_model"): "gate_up_proj",
    ("llava_onevision", "vision"): "q_proj",  # a name that the language model has, too
    ("llava_onevision", "projector"): "linear_1",
    ("llava_onevision", "language_model"): "q_proj",
    ("video_llama_3", "vision"): "q_proj",  # a name that the language model has, too
    ("video_llama_3", "projector"): "0",  # of an nn.Sequential
    ("video_llama_3", "language_model"): "q_proj",
    ("nemotron_h_omni", "vision"): "q_proj",  # a name that the language model has, too
    ("nemotron_h_omni", "projector"): "linear_1",
    ("nemotron_h_omni", "language_model"): "q_proj",
    ("internvl", "vision"): "q_proj",  # a name that the language model has, too
    ("internvl", "projector"): "linear_1",
    ("internvl", "language_model"): "q_proj",
}


@pytest.fixture(scope="module")
def families(tiny_checkpoint: Callable[[str], Path]) -> dict[str, Family]:
    return {
        name: load_family(ModelSection(path=str(tiny_checkpoint(name))), DataSection(rows="unused.json"))
        for name in FAMILIES
    }


@pytest.fixture
def family(families: dict[str, Family], family_name: str) -> Family:
    return families[family_name]


@pytest.fixture
def model(family: Family) -> nn.Module:
    """Shapes and names only: all that tuning looks at."""
    return without_weights(family.config)


def of_parts(model: nn.Module, family: Family, parts: Iterable[Part]) -> set[str]:
    """Names of all parameters in the modules of `parts`, but for those in modules that are not used."""
    paths = itertools.chain.from_iterable(MODULES[family.model_type][part] for part in parts)
    names = {name for name, _ in model.named_parameters()}
    return within(names, paths) - within(names, UNUSED.get(family.model_type, []))


def within(names: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Those of `names` that are one of `paths`, or below one."""
    paths = list(paths)
    return {name for name in names if any(name == path or name.startswith(f"{path}.") for path in paths)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_of(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "checkpoint"))


def section(path: str | Path) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32")


# What is refused


@pytest.mark.parametrize("architecture", ["llama", "unheard_of"])
def test_unsupported_architecture_names_the_supported(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, "hidden_size": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"^the architecture '{architecture}' of {tmp_path} is not") as caught:
        load_config(str(tmp_path))
    assert all(name in caught.value.hint for name in FAMILIES)


@pytest.mark.parametrize("path", ["/no/such/checkpoint", "runs/no/checkpoint"])
def test_missing_path(path: str) -> None:
    with pytest.raises(ModelError, match=rf"^the checkpoint {path} does not exist \(model.path is "):
        load_config(path)


def test_a_run_is_not_its_export(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = tiny_checkpoint("qwen3_vl")
    (tmp_path / "export").symlink_to(checkpoint)
    (tmp_path / "final").mkdir()
    hint = rf"\({tmp_path} is a run's folder; what it exported is {tmp_path / 'export'}\)$"
    with pytest.raises(ModelError, match=rf"^{tmp_path} holds no config.json {hint}"):
        load_config(str(tmp_path))
    shutil.copy(
        checkpoint / "config.json", tmp_path / "final"
    )  # all that a run in full leaves there beside its weights
    with pytest.raises(ModelError, match=rf"^the processor of {tmp_path}/final cannot be read: .*{hint}"):
        load_family(section(tmp_path / "final"), DataSection(rows=["unused.json"]))


def test_a_folder_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path} holds no config.json \(a checkpoint's folder"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a valid JSON file"),
        ("[]", "Should have a `model_type` key"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "qwen3_vl", "text_config": 3}', "Field 'text_config' with value 3"),
    ],
)
def test_unreadable_config(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"^the checkpoint {tmp_path} cannot be read: .+check model.path") as caught:
        load_config(str(tmp_path))
    assert reason in caught.value.message


@pytest.mark.parametrize("damage", ["missing", "torn tokenizer", "no template"])
def test_a_processor_that_cannot_be_used(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], family_name: str, damage: str
) -> None:
    folder = copy_of(tiny_checkpoint(family_name), tmp_path)
    if damage == "missing":
        (config,) = folder.glob("*processor_config.json")
        config.unlink()
    elif damage == "torn tokenizer":
        (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    else:
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=rf"^the processor of {folder} (cannot be read: .+|has no chat template)"):
        load_family(section(folder), DataSection(rows="unused.json"))


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resise": True}, r"\.do_resise: \w+Processor\w* has no such option; did you mean do_resize\?"),
        ({"foo": 1}, r"\.foo: \w+Processor\w* has no such option$"),
        ({"do_resize": "yes"}, r": \w+Processor\w* does not take \{'do_resize': 'yes'\}: .*do_resize"),
        ({"size": {"foo": 3}}, r": \w+Processor\w* does not take \{'size': \{'foo': 3\}\}: size must have"),
    ],
    ids=["typo", "unknown", "wrong type", "wrong value"],
)
def test_processor_options_are_tried_before_any_row(
    tiny_checkpoint: Callable[[str], Path], family_name: str, kind: str, options: dict[str, Any], message: str
) -> None:
    data = DataSection.model_validate({"rows": "unused.json", f"{kind}_kwargs": options})
    with pytest.raises(RecipeError) as caught:
        load_family(section(tiny_checkpoint(family_name)), data)
    assert re.match(rf"data\.{kind}_kwargs{message}", caught.value.message)
    if "no such option" in message:
        assert "do_resize" in caught.value.hint
        assert "do_sample_frames" not in caught.value.hint  # ours: the recipe may not set it


@pytest.mark.parametrize("kind", ["video", "image"])
def test_processor_options_reach_the_adapter(
    tiny_checkpoint: Callable[[str], Path], family_name: str, kind: str
) -> None:
    data = DataSection.model_validate({"rows": "unused.json", f"{kind}_kwargs": {"do_normalize": False}})
    family = load_family(section(tiny_checkpoint(family_name)), data)
    assert (family.video_kwargs, family.image_kwargs) == (data.video_kwargs, data.image_kwargs)


@pytest.mark.parametrize("damage", ["no file", "torn", "misshapen", "a tensor lacks"])
def test_weights_that_do_not_fit(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], family_name: str, damage: str
) -> None:
    folder = copy_of(tiny_checkpoint(family_name), tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    if damage == "no file":
        file.unlink()
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "misshapen":
        save_file(weights | {name: weights[name][:3].clone()}, file, {"format": "pt"})
    else:
        del weights[name]
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"^the weights of {folder} (cannot be loaded|lack 1 tensor)") as caught:
        load_weights(section(folder), load_config(str(folder)), torch.float32)
    assert caught.value.hint
    if damage == "a tensor lacks":
        assert caught.value.message.endswith(name[name.index("layers.") :])


# What is loaded


def test_weights_are_the_files(tiny_checkpoint: Callable[[str], Path], family_name: str) -> None:
    path = tiny_checkpoint(family_name)
    model: Any = load_weights(section(path), load_config(str(path)), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    stored, loaded = load_file(path / "model.safetensors"), model.state_dict()
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    (match,) = [other for other in loaded if other.endswith(name.split("layers.")[-1]) and "language_model" in other]
    assert torch.equal(loaded[match], stored[name].to(torch.bfloat16))
    assert model.config.use_cache is False
    assert model.config.get_text_config().use_cache is False  # else missing masks would go unnoticed
    with torch.no_grad():
        assert model.train()(input_ids=torch.arange(20, 60)[None]).past_key_values is None


def test_a_base_that_prunes_does_not_prune_while_training(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = copy_of(tiny_checkpoint("nemotron_h_omni"), tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "video_pruning_rate": 0.7}), encoding="utf-8")
    read = load_config(str(folder))
    assert read.video_pruning_rate == 0.7
    model: Any = load_weights(section(folder), read, torch.float32)
    assert model.video_pruning_rate == 0.0
    assert model.config.video_pruning_rate == 0.0


# Parts


def test_every_parameter_belongs_to_the_part_of_its_module(model: nn.Module, family: Family) -> None:
    by_part: dict[Part | None, set[str]] = {}
    for name, _ in model.named_parameters():
        by_part.setdefault(part_of(name, family), set()).add(name)
    unused = within((name for name, _ in model.named_parameters()), UNUSED.get(family.model_type, []))
    expected: dict[Part | None, set[str]] = {part: of_parts(model, family, [part]) for part in PARTS}
    assert by_part == expected | ({None: unused} if unused else {})


def test_a_tensor_of_no_part_is_an_error(family: Family) -> None:
    with pytest.raises(ModelError, match=r"^the tensor something\.weight belongs to no part of"):
        part_of("something.weight", family)


def test_audio_is_unused_and_frozen(families: dict[str, Family]) -> None:
    family = families["nemotron_h_omni"]
    config = load_config(family.config.name_or_path)
    config.audio_config = ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, projection_hidden_size=16, projection_bias=False
    )
    model = apply_tuning(without_weights(config), family, TuningSection(freeze=[]))
    audio = {name for name, _ in model.named_parameters() if part_of(name, family) is None}
    assert any(name.startswith("audio_tower.") for name in audio)
    assert any(name.startswith("embed_audio.") for name in audio)
    assert trained(model) == of_parts(model, family, PARTS)
    sizes = {size.part: (size.trainable, size.total) for size in part_sizes(model, family)}
    assert sizes["unused"] == (0, sum(p.numel() for n, p in model.named_parameters() if n in audio))


# Freezing and adapters


@pytest.mark.parametrize("freeze", FREEZE_CHOICES, ids=lambda parts: "+".join(parts) or "nothing")
def test_exactly_the_parts_that_are_not_frozen_train(model: nn.Module, family: Family, freeze: list[Part]) -> None:
    assert apply_tuning(model, family, TuningSection(freeze=freeze)) is model
    kept = [part for part in PARTS if part not in freeze]
    assert trained(model) == of_parts(model, family, kept)
    assert encoder_trains(model, family) == bool({"vision", "projector"} & set(kept))
    sizes = {size.part: size for size in part_sizes(model, family)}
    for part in PARTS:
        count = sum(p.numel() for n, p in model.named_parameters() if n in of_parts(model, family, [part]))
        assert (sizes[part].trainable, sizes[part].total) == (count if part in kept else 0, count)


@pytest.mark.parametrize("part", PARTS)
def test_adapters_are_only_in_the_chosen_part(model: nn.Module, family: Family, part: Part) -> None:
    target = LORA_TARGETS[family.model_type, part]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in within(linear, MODULES[family.model_type][part]) if name.endswith(f".{target}")}
    lora = LoraSection(r=2, parts=[part], targets=[target])
    adapted = apply_tuning(model, family, TuningSection(method="lora", lora=lora))
    assert wanted
    assert trained(adapted) == {
        f"base_model.model.{name}.lora_{side}.default.weight" for name in wanted for side in "AB"
    }
    assert {part_of(name, family) for name in trained(adapted)} == {part}


def test_default_adapters(model: nn.Module, family: Family) -> None:
    adapted = apply_tuning(model, family, TuningSection(method="lora"))
    names = trained(adapted)
    assert {part_of(name, family) for name in names} == {"language_model"}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == set(family.lora_targets)
    assert not encoder_trains(adapted, family)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSection(targets=["q_prj"]), "no linear layer of language_model is called q_prj"),
        (LoraSection(targets=["q_proj", "k_prj"]), "no linear layer of language_model is called k_prj"),
        (
            LoraSection(parts=["language_model", "projector"], targets=["q_proj"]),
            "no linear layer of projector is called q_proj",
        ),
        (LoraSection(targets=["norm"]), "no linear layer of language_model is called norm"),
    ],
)
def test_bad_adapter_targets(model: nn.Module, family: Family, lora: LoraSection, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        apply_tuning(model, family, TuningSection(method="lora", lora=lora))
    assert caught.value.message.startswith(f"tuning.lora.targets: {message}")
    known = LORA_TARGETS[family.model_type, "projector"] if "projector" in message else "k_proj"
    assert re.search(rf"\b{known}\b", caught.value.hint)


def test_routed_experts_are_out_of_the_reach_of_adapters(family: Family, model: nn.Module) -> None:
    """And the family says so. Should a release give them linear layers, the targets are to be looked at again."""
    experts = [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    assert bool(experts) == bool(family.lora_note)
    linear = {
        f"{path}.{name}".rstrip(".").rsplit(".", 1)[-1]
        for path in MODULES[family.model_type]["language_model"]
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert set(family.lora_targets) | family.lora_refused.keys() <= linear
    assert not set(family.lora_targets) & family.lora_refused.keys()
    every = LoraSection(targets=sorted(linear - family.lora_refused.keys()))
    names = trained(apply_tuning(model, family, TuningSection(method="lora", lora=every)))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == set(every.targets or ())
    assert [name for name in names if ".experts." in name or ".gate." in name] == []


def test_a_layer_that_a_kernel_reads_past_gets_no_adapter(families: dict[str, Family]) -> None:
    family = families["nemotron_h_omni"]
    lora = LoraSection(targets=["in_proj", "out_proj"])
    with pytest.raises(RecipeError, match=r"^tuning\.lora\.targets: out_proj cannot get an adapter in nemotron_h_omni"):
        apply_tuning(without_weights(family.config), family, TuningSection(method="lora", lora=lora))


# Optimizer groups


def groups_of(model: nn.Module, family: Family, optim: OptimSection) -> dict[str, dict[str, Any]]:
    groups = list(parameter_groups(model, family, optim))
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


OPTIM = OptimSection(lr=1e-3, lr_by_part={"vision": 1e-4, "projector": 5e-4}, weight_decay=0.1)
RATES = {"vision": 1e-4, "projector": 5e-4, "language_model": 1e-3}


@pytest.mark.parametrize(
    "tuning",
    [TuningSection(freeze=[]), TuningSection(freeze=["vision"]), TuningSection(method="lora")],
    ids=["all", "vision frozen", "lora"],
)
def test_groups_hold_each_trained_parameter_once(model: nn.Module, family: Family, tuning: TuningSection) -> None:
    tuned = apply_tuning(model, family, tuning)
    groups = groups_of(tuned, family, OPTIM)
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    held = [names[id(parameter)] for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(trained(tuned))
    for label, group in groups.items():
        part = label.removesuffix("_no_decay")
        assert group["lr"] == RATES[part]
        assert {part_of(names[id(parameter)], family) for parameter in group["params"]} == {part}
        decays = not label.endswith("_no_decay")
        assert group["weight_decay"] == (0.1 if decays else 0.0)
        assert all((parameter.ndim > 1) == decays for parameter in group["params"])


def test_groups_make_an_optimizer(family: Family) -> None:
    model = apply_tuning(without_weights(family.config), family, TuningSection(freeze=[]))
    optimizer = torch.optim.AdamW(parameter_groups(model, family, OPTIM))
    assert {group["name"] for group in optimizer.param_groups} >= set(PARTS)
