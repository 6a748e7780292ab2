"""Launch commands: they parse as shell lines, name the rate where the engine reads it, and match docs/serving.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from evs_train.errors import ModelError, RecipeError
from evs_train.serving import ENGINES, caveat, launch_lines

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"


def by_engine(family: str, checkpoint: str = "org/model", rate: float = 0.75) -> dict[str, list[str]]:
    return {line.engine: shlex.split(line.command) for line in launch_lines(family, checkpoint, rate)}


def test_every_family_lists_the_same_engines_under_their_own_names() -> None:
    assert {tuple(table) for table in ENGINES.values()} == {("vLLM", "SGLang", "TensorRT-LLM")}
    for table in ENGINES.values():
        assert all(name == line.engine for name, line in table.items())


@pytest.mark.parametrize("family", ENGINES)
def test_commands_are_shell_lines_with_checkpoint_and_rate(family: str) -> None:
    checkpoint = "/data/it's here/$HOME {x}"
    for line in launch_lines(family, checkpoint, 0.8125):
        words = shlex.split(line.command)
        assert checkpoint in words
        assert line.note
        assert ("0.8125" in line.command) == (line.reads != "unsupported")


def test_nemotron_lines() -> None:
    words = by_engine("nemotron_h_omni")
    vllm, sglang, tensorrt = words["vLLM"], words["SGLang"], words["TensorRT-LLM"]
    assert vllm[vllm.index("--video-pruning-rate") + 1] == "0.75"
    assert json.loads(sglang[sglang.index("--json-model-override-args") + 1]) == {"video_pruning_rate": 0.75}
    assert tensorrt[tensorrt.index("--video_pruning_rate") + 1] == "0.75"


def test_unsupported_engines_come_last_and_say_that_they_serve_dense() -> None:
    lines = launch_lines("qwen3_vl", "org/model", 0.75)
    assert [line.reads for line in lines] == ["flag", "unsupported", "unsupported"]
    assert all("dense" in line.note for line in lines[1:])


PRUNED_NOWHERE = {"glm4v", "glm46v", "llava_onevision", "video_llama_3", "internvl"}


@pytest.mark.parametrize("family", ENGINES)
def test_a_family_that_no_engine_prunes_is_said_to_be_one(family: str) -> None:
    lines = launch_lines(family, "org/model", 0.75)
    if family in PRUNED_NOWHERE:
        assert {line.reads for line in lines} == {"unsupported"}
        assert all(line.note.startswith("Serves dense") for line in lines)
        assert caveat(lines).startswith("None of vLLM, SGLang, TensorRT-LLM prunes")
    else:
        assert lines[0].reads != "unsupported"
        assert not caveat(lines)


def test_vllm_prunes_qwen3_5_by_its_flag() -> None:
    words = by_engine("qwen3_5")["vLLM"]
    assert words[words.index("--video-pruning-rate") + 1] == "0.75"


def test_whole_number_rate_and_tiny_rate_are_valid_numbers() -> None:
    for rate in (0, 1e-5):
        words = by_engine("nemotron_h_omni", rate=rate)["SGLang"]
        assert json.loads(words[-1]) == {"video_pruning_rate": rate}


def test_refusals() -> None:
    with pytest.raises(ModelError, match=r"llava.*known: qwen3_vl, .*nemotron_h_omni"):
        launch_lines("llava", "org/model", 0.75)
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(RecipeError, match="0 <= rate < 1"):
            launch_lines("qwen3_vl", "org/model", rate)


def test_document_has_one_row_per_entry_with_the_same_mechanism() -> None:
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \| (\S+) \|", DOCUMENT.read_text(), re.MULTILINE)
    expected = [(engine, family, line.reads) for family, table in ENGINES.items() for engine, line in table.items()]
    assert sorted(rows) == sorted(expected)
