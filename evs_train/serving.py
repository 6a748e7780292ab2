"""How each serving engine is told the pruning rate, as commands for the export's output and the model card.

Invariant: every family lists every engine, and every command is a template in one literal table, checked against the
engines' public sources; `docs/serving.md` holds the source of each entry and what could not be verified.

Cost: none. What it does NOT do: start an engine, look at the checkpoint, or choose the rate.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from string import Template
from typing import Literal

from evs_train.errors import ModelError, RecipeError

Reads = Literal["config.json", "flag", "environment", "unsupported"]


@dataclass(frozen=True)
class ServingLine:
    """One engine's launch command for one checkpoint.

    Attributes:
        engine: the engine's name.
        command: one shell line; for an `unsupported` engine it serves the checkpoint dense.
        reads: where the engine takes the rate from; `unsupported` means it prunes nothing for this family.
        note: what an operator must know, one or two sentences.
    """

    engine: str
    command: str
    reads: Reads
    note: str


_VLLM_NOTE = "vLLM does not read video_pruning_rate from config.json: without the flag it serves dense."
_TENSORRT_DENSE = ServingLine(
    engine="TensorRT-LLM",
    command="trtllm-serve $checkpoint",
    reads="unsupported",
    note="Serves dense: its EVS is implemented for Nemotron multimodal models only.",
)
_SGLANG_DENSE = ServingLine(
    engine="SGLang",
    command="python -m sglang.launch_server --model-path $checkpoint",
    reads="unsupported",
    note="Serves dense: pull request 20857, which adds the rate for Qwen3-VL, was closed without being merged.",
)
_QWEN3_VL = {
    "vLLM": ServingLine(
        engine="vLLM",
        command="vllm serve $checkpoint --video-pruning-rate $rate",
        reads="flag",
        note=f"{_VLLM_NOTE} Use a version with pull request 33607; before it the prompt and the tokens disagreed.",
    ),
    "SGLang": _SGLANG_DENSE,
    "TensorRT-LLM": _TENSORRT_DENSE,
}
_NEMOTRON = {
    "vLLM": ServingLine(
        engine="vLLM",
        command="vllm serve $checkpoint --trust-remote-code --video-pruning-rate $rate",
        reads="flag",
        note=_VLLM_NOTE,
    ),
    "SGLang": ServingLine(
        engine="SGLang",
        command=(
            "sglang serve --model-path $checkpoint --trust-remote-code"
            """ --json-model-override-args '{"video_pruning_rate": $rate}'"""
        ),
        reads="config.json",
        note="The override may be left out: then config.json's video_pruning_rate is used, which the export wrote.",
    ),
    "TensorRT-LLM": ServingLine(
        engine="TensorRT-LLM",
        command="trtllm-serve $checkpoint --trust_remote_code --video_pruning_rate $rate",
        reads="flag",
        note=(
            "Does not read config.json. Releases before the flag take the environment variable"
            " TLLM_VIDEO_PRUNING_RATIO; newer ones also multimodal_config.video_pruning_rate in the --config file."
        ),
    ),
}
# In `command`, $checkpoint and $rate are replaced.
ENGINES: dict[str, dict[str, ServingLine]] = {
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen2_5_vl": {
        "vLLM": ServingLine(
            engine="vLLM",
            command="vllm serve $checkpoint --video-pruning-rate $rate",
            reads="flag",
            note=(
                f"{_VLLM_NOTE} Use a version with pull request 47736: before it every video counts as sampled at 24"
                " frames per second. See docs/serving.md on positions."
            ),
        ),
        "SGLang": replace(_SGLANG_DENSE, note="Serves dense: no pruning of Qwen2.5-VL was found in its sources."),
        "TensorRT-LLM": _TENSORRT_DENSE,
    },
    "nemotron_h_omni": _NEMOTRON,
    "internvl": {
        "vLLM": ServingLine(
            engine="vLLM",
            command="vllm serve $checkpoint",
            reads="unsupported",
            note="Serves dense: no pruning of InternVL was found in its sources.",
        ),
        "SGLang": replace(_SGLANG_DENSE, note="Serves dense: no pruning of InternVL was found in its sources."),
        "TensorRT-LLM": _TENSORRT_DENSE,
    },
    "NemotronH_Nano_VL_V2": _NEMOTRON,
}


def launch_lines(family: str, checkpoint: str, pruning_rate: float) -> list[ServingLine]:
    """Return one launch line per engine for a checkpoint of `family`, engines that honour the rate first.

    Args:
        family: model type as in config.json, a key of `ENGINES`.
        checkpoint: folder or hub name; quoted for the shell.
        pruning_rate: share of the video tokens to drop, in [0, 1).

    Raises:
        ModelError: no engine is listed for this family.
        RecipeError: the rate is outside [0, 1).
    """
    if family not in ENGINES:
        raise ModelError(f"no serving commands are known for family {family!r}", f"known: {', '.join(ENGINES)}")
    if not 0 <= pruning_rate < 1:
        raise RecipeError(f"pruning rate must be in 0 <= rate < 1, got {pruning_rate}")
    values = {"checkpoint": shlex.quote(checkpoint), "rate": str(float(pruning_rate))}
    lines = [
        ServingLine(line.engine, Template(line.command).substitute(values), line.reads, line.note)
        for line in ENGINES[family].values()
    ]
    return sorted(lines, key=lambda line: line.reads == "unsupported")
