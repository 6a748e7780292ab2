"""The exported checkpoint: names, weights, config, and answers equal to the trained model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from evs_train.checkpoint import EXPORT_RECORD
from evs_train.console import show_summary
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import read_video, video_metadata
from evs_train.errors import ModelError, RecipeError
from evs_train.export import export_run, tensor_names
from evs_train.serving import ENGINES
from evs_train.uptrain import Run, Summary
from tests.plain import plain_config, plain_model, plain_processor
from tests.runs import arguments, recipe_of

LORA = {"tuning__method": "lora", "optim__lr": 1e-2}


@pytest.fixture(scope="module")
def finished(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Any]]:
    """A finished run of (family, method), with the model as it was in memory when training ended."""
    runs: dict[tuple[str, str], tuple[Path, Any]] = {}

    def of(family: str, method: str) -> tuple[Path, Any]:
        if (family, method) not in runs:
            output = tmp_path_factory.mktemp(f"{family}_{method}")
            options = LORA if method == "lora" else {}
            settings = {"train__steps": 3, "train__batch_size": 2, **options}
            run = Run(recipe_of(arguments(tiny_checkpoint(family), world, output, **settings)))
            kept: list[Any] = []
            load = run.load_model
            run.load_model = lambda: kept.append(load()) or kept[-1]  # type: ignore[method-assign]
            run.train()
            runs[family, method] = (output, kept[0])
        return runs[family, method]

    return of


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def copy_of(run: Path, to: Path) -> Path:
    """A copy of a finished run that a test may spoil, not exported yet."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("export"))
    return to


@pytest.mark.capability("export", "yes")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_export_answers_as_the_trained_model(
    family_name: str, method: str, finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path]
) -> None:
    output, trained = finished(family_name, method)
    export = export_run(output, rate=0.6)
    base = tiny_checkpoint(family_name)

    config = json.loads((export.path / "config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "video_pruning_rate": 0.6}
    assert tensor_shapes(export.path) == tensor_shapes(base)
    assert plain_config(export.path).video_pruning_rate == 0.6

    plain = plain_model(export.path, torch.float32)
    processor = plain_processor(export.path)
    ids = processor.tokenizer(
        "<|im_start|>user\nDescribe the clip.<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    )
    trained.eval()
    plain.eval()
    with torch.no_grad():
        expected = trained(input_ids=ids["input_ids"]).logits
        torch.testing.assert_close(plain(input_ids=ids["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)
        untrained = plain_model(base, torch.float32).eval()
        assert not torch.allclose(untrained(input_ids=ids["input_ids"]).logits, expected, atol=1e-2)
    answer = plain.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=True)
    again = trained.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(answer, again)


def test_export_answers_about_video_as_the_trained_model(
    finished: Callable[..., tuple[Path, Any]], world: Path
) -> None:
    """Qwen3-VL whole: pixels in, through plain transformers."""
    output, trained = finished("qwen3_vl", "lora")
    export = export_run(output)
    plain = plain_model(export.path, torch.float32).eval()
    processor = plain_processor(export.path)
    clip = read_video(world.parent / "clips" / "000000.mp4", FrameSampling(num_frames=8))
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe."}]}]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)],
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
        video_metadata=[video_metadata(clip)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = trained.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_and_files_are_the_base_s_own(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path]
) -> None:
    output, _ = finished("qwen3_vl", "lora")
    export = export_run(output)
    base = tiny_checkpoint("qwen3_vl")
    before, after = load_file(base / "model.safetensors"), load_file(export.path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".language_model." in name for name in changed)
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            assert (export.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_card_and_record_tell_how_it_was_made(finished: Callable[..., tuple[Path, Any]]) -> None:
    output, _ = finished("nemotron_h_omni", "lora")
    export = export_run(output, rate=0.7)
    card = (export.path / "README.md").read_text()
    assert "video_pruning_rate: 0.7" in card
    for line in export.serving:
        assert line.command in card
    record = json.loads((export.path / EXPORT_RECORD).read_text())
    assert record["video_pruning_rate"] == 0.7
    assert {"recipe", "data_fingerprint", "pruning_rates", "versions"} <= record.keys()
    assert [line.engine for line in export.serving if line.reads == "config.json"] == ["SGLang"]


@pytest.mark.parametrize("pruned", [True, False])
def test_card_says_when_no_engine_prunes_the_family(
    pruned: bool,
    finished: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not pruned:
        monkeypatch.setitem(ENGINES, "nemotron_h_omni", ENGINES["internvl"])
    output, _ = finished("nemotron_h_omni", "lora")
    export = export_run(output, out=tmp_path / "export")
    card = (export.path / "README.md").read_text()
    assert ("**None of vLLM, SGLang, TensorRT-LLM prunes" in card) == (not pruned)
    show_summary(recipe_of(["recipe=nemotron"]), Summary(1, 2.0, 1.0, 0.5, 2, 1, 1.0, 1.0), export, Console())
    printed = capsys.readouterr().out
    assert ("Serve it: None of vLLM" in printed) == (not pruned)
    below = printed.split("Serve it:")[1].splitlines()[1:]  # can be copied into a shell as it is
    assert all(line.startswith(("#", "vllm ", "python ", "sglang ", "trtllm-serve ")) for line in below if line)


def test_an_older_export_is_replaced_and_nothing_else(
    finished: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    output, _ = finished("qwen3_vl", "lora")
    out = tmp_path / "out"
    export_run(output, rate=0.5, out=out)
    export_run(output, rate=0.8, out=out)
    assert json.loads((out / "config.json").read_text())["video_pruning_rate"] == 0.8
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_bytes(b"meow")
    with pytest.raises(ModelError, match="not an export"):
        export_run(output, out=foreign)
    assert (foreign / "cat.png").read_bytes() == b"meow"


def rebased(output: Path, base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a run whose base checkpoint has other tensors than the run was trained from."""
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    change(tensors)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return repointed(output, other, tmp_path)


def repointed(output: Path, base: Path, tmp_path: Path) -> Path:
    """A copy of a run that says it was trained from `base`."""
    run = copy_of(output, tmp_path / "run")
    record = json.loads((run / "record.json").read_text())
    record["recipe"]["model"]["path"] = str(base)
    (run / "record.json").write_text(json.dumps(record))
    return run


def test_names_that_differ_from_the_base_s_are_an_error(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.visual.surprise.weight"] = torch.zeros(3)

    output, _ = finished("qwen3_vl", "lora")
    run = rebased(output, tiny_checkpoint("qwen3_vl"), tmp_path, add)
    with pytest.raises(ModelError, match=r"1 missing: model\.visual\.surprise\.weight"):
        export_run(run)
    assert not (run / "export").exists()


def test_shapes_that_differ_from_the_base_s_are_an_error(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "model.language_model.norm.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    output, _ = finished("qwen3_vl", "full")
    run = rebased(output, tiny_checkpoint("qwen3_vl"), tmp_path, cut)
    with pytest.raises(ModelError, match=r"norm\.weight has shape \[128\], the base checkpoint's \[127\]"):
        export_run(run)
    assert not (run / "export").exists()


def test_frozen_experts_are_exported_as_they_were(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path]
) -> None:
    output, _ = finished("qwen3_vl_moe", "lora")
    before = load_file(tiny_checkpoint("qwen3_vl_moe") / "model.safetensors")
    after = load_file(export_run(output).path / "model.safetensors")
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)


def test_tensors_that_the_architecture_does_not_load_are_passed_on(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "audio_tower.feature_extractor.window"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.arange(5.0)

    output, _ = finished("nemotron_h_omni", "lora")
    run = rebased(output, tiny_checkpoint("nemotron_h_omni"), tmp_path, add)
    export = export_run(run)
    files = tensor_names(export.path)
    assert torch.equal(load_file(files[name])[name], torch.arange(5.0))
    plain_model(export.path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_draft_head_is_the_base_s_own(
    method: str, finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Qwen3.5's `mtp.*` tensors: transformers loads none, the run saves none, the export has them all."""
    output, _ = finished("qwen3_5", method)
    base = load_file(tiny_checkpoint("qwen3_5") / "model.safetensors")
    after = load_file(export_run(output).path / "model.safetensors")
    head = {name for name in base if name.startswith("mtp.")}
    assert head
    assert not head & tensor_names(output / "final").keys()
    assert all(torch.equal(base[name], after[name]) for name in head)


def test_the_base_s_files_dtypes_and_repeated_tensors_are_kept(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A base as released ones are: several files with an index, bfloat16 with a few float32 tensors in between."""
    base = tiny_checkpoint("nemotron_h_omni")
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(("A_log", ".D")):
            tensors[name] = tensor.to(torch.bfloat16)
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    (other / "model.safetensors").unlink()
    for file, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, other / file, metadata={"format": "pt"})
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))

    output, _ = finished("nemotron_h_omni", "lora")
    export = export_run(repointed(output, other, tmp_path))
    assert {name: file.name for name, file in tensor_names(export.path).items()} == weight_map
    changed = 0
    for file in shards:
        before, after = load_file(other / file), load_file(export.path / file)
        assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
        for name, tensor in before.items():
            if not torch.equal(tensor, after[name]):
                changed += 1
                assert name.endswith("proj.weight"), name
    assert changed
    plain_model(export.path)


def test_a_stored_copy_of_a_tied_weight_follows_it(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A base that ties its head and stores it all the same: transformers saves such a weight once."""
    head, embeddings = "lm_head.weight", "model.language_model.embed_tokens.weight"

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] = tensors[embeddings].clone()

    output, _ = finished("qwen3_vl", "full")
    run = rebased(output, tiny_checkpoint("qwen3_vl"), tmp_path, tie)
    config_file = tmp_path / "base" / "config.json"
    config = json.loads(config_file.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    config_file.write_text(json.dumps(config))
    (run / "final" / "config.json").write_text(json.dumps(config))
    trained = load_file(run / "final" / "model.safetensors")
    del trained[head]  # a tied model saves it once
    save_file(trained, run / "final" / "model.safetensors", metadata={"format": "pt"})
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(export_run(run).path / "model.safetensors")
    assert torch.equal(after[head], after[embeddings])
    assert not torch.equal(after[head], before[head])


def test_the_dtype_of_the_base_is_kept(
    finished: Callable[..., tuple[Path, Any]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.bfloat16)

    output, _ = finished("qwen3_vl", "full")
    run = rebased(output, tiny_checkpoint("qwen3_vl"), tmp_path, halve)
    tensors = load_file(export_run(run).path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_senseless_rates_are_refused(rate: float, finished: Callable[..., tuple[Path, Any]]) -> None:
    output, _ = finished("qwen3_vl", "lora")
    with pytest.raises(RecipeError, match="rate"):
        export_run(output, rate=rate)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run"):
        export_run(tmp_path)
