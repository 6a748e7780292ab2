"""How each serving engine is told the pruning rate, as commands for the export's output and the model card.

Invariant: every family lists every engine, and every command is a template in one literal table, checked against the
engines' public sources; `docs/serving.md` holds the source of each entry and what could not be verified.

Cost: none. What it does NOT do: start an engine, look at the checkpoint, or choose the rate.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
_VLLM = ServingLine(
    engine="vLLM",
    command="vllm serve $checkpoint --video-pruning-rate $rate",
    reads="flag",
    note=_VLLM_NOTE,
)
_VLLM_DENSE = ServingLine(
    engine="vLLM",
    command="vllm serve $checkpoint",
    reads="unsupported",
    note="Serves dense: its class for this family cannot prune, and ignores --video-pruning-rate without an error.",
)
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
    note="Serves dense: its EVS is implemented for Nemotron multimodal models only.",
)
_QWEN3_VL = {
    "vLLM": replace(
        _VLLM,
        note=(
            f"{_VLLM_NOTE} Use a version with pull requests 33607 and 44205: before them the prompt and the tokens"
            " disagreed, or any pruned video failed."
        ),
    ),
    "SGLang": replace(
        _SGLANG_DENSE,
        note="Serves dense: pull request 20857, which adds the rate for Qwen3-VL, was closed without being merged.",
    ),
    "TensorRT-LLM": _TENSORRT_DENSE,
}
_UNLOADED = "Whether it loads this architecture at all was not checked."
_NOWHERE = {
    "vLLM": _VLLM_DENSE,
    "SGLang": replace(_SGLANG_DENSE, note=f"{_SGLANG_DENSE.note} {_UNLOADED}"),
    "TensorRT-LLM": replace(_TENSORRT_DENSE, note=f"{_TENSORRT_DENSE.note} {_UNLOADED}"),
}
_NO_CLASS = _NOWHERE | {
    "vLLM": replace(
        _VLLM_DENSE,
        note="Serves dense, if at all: only its Transformers backend, which cannot prune, knows this architecture.",
    )
}
_NEMOTRON = {
    "vLLM": replace(_VLLM, command="vllm serve $checkpoint --trust-remote-code --video-pruning-rate $rate"),
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
        "vLLM": replace(
            _VLLM,
            note=(
                f"{_VLLM_NOTE} Use a version with pull request 47736: before it every video counts as sampled at 24"
                " frames per second. See docs/serving.md on positions."
            ),
        ),
        "SGLang": _SGLANG_DENSE,
        "TensorRT-LLM": _TENSORRT_DENSE,
    },
    "qwen3_5": {
        "vLLM": replace(
            _VLLM,
            note=(
                f"{_VLLM_NOTE} Use a version with pull request 48912, before which it serves dense, and without the"
                " fault of issue 54170: 0.27.1 fails at the first video."
            ),
        ),
        "SGLang": _SGLANG_DENSE,
        "TensorRT-LLM": _TENSORRT_DENSE,
    },
    "glm4v": _NOWHERE,
    "glm46v": _NO_CLASS,
    "llava_onevision": _NOWHERE,
    "video_llama_3": _NO_CLASS,
    "internvl": _NOWHERE,
    "nemotron_h_omni": _NEMOTRON,
    "NemotronH_Nano_VL_V2": _NEMOTRON,
}


_BY_EVS = "Prunes by EVS or not at all, and this checkpoint was trained with another method: the line serves dense."
# Methods beside EVS that an engine knows, with the families for which its sources say so.
OTHER_METHODS: dict[str, tuple[tuple[str, ...], ServingLine]] = {
    "vidcom2": (
        ("qwen3_vl", "qwen3_5"),
        replace(
            _VLLM,
            command="vllm serve $checkpoint --video-pruning-method vidcom2 --video-pruning-rate $rate",
            note="Use a version with pull request 47750. It does not read the method or the rate from config.json.",
        ),
    ),
}


def launch_lines(family: str, checkpoint: str, pruning_rate: float, method: str = "evs") -> list[ServingLine]:
    """Return one launch line per engine for a checkpoint of `family`, engines that honour the rate first.

    Args:
        method: name of the pruner that it was trained with.
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
    engines = ENGINES[family]
    if method != "evs":
        engines = {name: replace(line, note=_BY_EVS) for name, line in _NOWHERE.items()}
        families, line = OTHER_METHODS.get(method, ((), _VLLM))
        if family in families:
            engines["vLLM"] = line
    lines = [
        ServingLine(line.engine, Template(line.command).substitute(values), line.reads, line.note)
        for line in engines.values()
    ]
    return sorted(lines, key=lambda line: line.reads == "unsupported")


def caveat(lines: Sequence[ServingLine]) -> str:
    """What must be said before launch lines of which none prunes; empty if one does."""
    if any(line.reads != "unsupported" for line in lines):
        return ""
    return (
        f"None of {', '.join(line.engine for line in lines)} prunes the video of this family today, as far as their"
        " sources were read: they serve it dense. Only evs_train's own generation prunes it."
    )
