"""Tiny randomly initialised checkpoints on disk, so the real loading code runs without a hub, a GPU or a download.

A tiny checkpoint has the architecture, the special tokens, the processor classes and the file layout of its family, and
about a million parameters. `AutoConfig`, `AutoProcessor` and `AutoModelForImageTextToText.from_pretrained` read it as
they read the real one. A temporal unit becomes 16 to 36 tokens at the usual aspect ratios, whatever the video's size
(GLM's depend on it: see `glm.py`; VideoLLaMA 3: of a clip with fewer or more frames than eight, more or fewer).

Invariant: the files are a pure function of (family, seed, texts, dtype, this package, the transformers version); a
directory holds one complete checkpoint or none (it is built beside its place, then renamed).
Cost: one to three seconds and about 4 MB each; nothing when the checkpoint is already there.
Does not: download anything, know any language beyond its vocabulary, or follow the real models' token ids and sizes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers as hf

from evs_train.errors import ModelError
from evs_train.models.tiny import glm, internvl, llava_onevision, nemotron, qwen, video_llama_3

STAMP_FILE = "tiny_checkpoint.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HERE = Path(__file__).parent

Builder = Callable[[Iterable[str]], tuple[hf.ProcessorMixin, hf.PreTrainedModel]]
TINY_FAMILIES: dict[str, Builder] = {
    "qwen3_vl": qwen.qwen3_vl,
    "qwen3_vl_moe": qwen.qwen3_vl_moe,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_5": qwen.qwen3_5,
    "glm4v": glm.glm4v,
    "glm46v": glm.glm46v,
    "llava_onevision": llava_onevision.llava_onevision,
    "video_llama_3": video_llama_3.video_llama_3,
    "nemotron_h_omni": nemotron.nemotron_h_omni,
    "internvl": internvl.internvl,
}
# What is left to do to files that transformers does not write as the family's release has them.
FINISHES: dict[str, Callable[[Path], None]] = {
    "qwen3_vl_moe": qwen.turn_experts,
    "qwen2_5_vl": qwen.released_names,
    "qwen3_5": qwen.add_draft_head,
    "llava_onevision": llava_onevision.released_names,
    "nemotron_h_omni": nemotron.released_format,
    "internvl": internvl.released_config,
}


def _stamp(family: str, seed: int, texts: list[str], dtype: str) -> dict[str, str | int]:
    """Everything the files depend on; equal stamps mean equal checkpoints."""
    return {
        "family": family,
        "seed": seed,
        "dtype": dtype,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "builder": hashlib.sha256(b"".join(file.read_bytes() for file in sorted(_HERE.glob("*.py")))).hexdigest(),
        "transformers": hf.__version__,
    }


def _holds(directory: Path, stamp: dict[str, str | int]) -> bool:
    marker = directory / STAMP_FILE
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == stamp


def _write(family: str, directory: Path, seed: int, texts: list[str], dtype: str) -> None:
    """Build the family's processor and model and save both; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        processor, model = TINY_FAMILIES[family](texts)
    ids = model.config.get_text_config()
    model.generation_config = hf.GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    torch.nn.Module.to(model, DTYPES[dtype])
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if family in FINISHES:
        FINISHES[family](directory)


def build_tiny(family: str, out_dir: Path, *, seed: int = 0, texts: Iterable[str] = (), dtype: str = "float32") -> Path:
    """Put a tiny checkpoint of `family` into `out_dir`, unless the same one is already there.

    Args:
        family: a key of `TINY_FAMILIES` (the `model_type` of the config).
        out_dir: where the checkpoint goes; an older tiny checkpoint there is replaced, any other content is refused.
        seed: seed of the weights.
        texts: more text for the tokenizer to learn, for example the questions and answers of a data set.
        dtype: a key of `DTYPES`: what the weights are stored in.

    Returns:
        `out_dir`.

    Raises:
        ModelError: unknown family or dtype, or `out_dir` holds something that is not a tiny checkpoint.

    """
    for kind, value, known in (("family", family, TINY_FAMILIES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ModelError(f"no tiny checkpoint for {kind} {value!r}", f"known: {', '.join(known)}")
    texts = list(texts)
    stamp = _stamp(family, seed, texts, dtype)
    if _holds(out_dir, stamp):
        return out_dir
    if out_dir.exists() and not (out_dir / STAMP_FILE).is_file() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists and is not a tiny checkpoint", "name a new or an empty directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # The workshop is a sibling, so that the renames stay within one file system.
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as workshop:
        new = Path(workshop) / "new"
        _write(family, new, seed, texts, dtype)
        (new / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        try:
            new.rename(out_dir)
        except OSError:  # not empty: an older checkpoint, or another process finished this one first
            if not _holds(out_dir, stamp):
                out_dir.rename(Path(workshop) / "old")
                new.rename(out_dir)
    return out_dir
