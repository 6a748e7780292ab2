"""A checkpoint as plain transformers loads it; a release that its Auto classes cannot find, by its own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from evs_train.models import RELEASED_AS
from evs_train.models.loading import load_config, load_processor


def is_release(path: Path) -> bool:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"] in RELEASED_AS


def plain_config(path: Path) -> Any:
    return load_config(str(path)) if is_release(path) else AutoConfig.from_pretrained(path)


def plain_processor(path: Path) -> Any:
    if is_release(path):
        return load_processor(str(path), None, plain_config(path))
    return AutoProcessor.from_pretrained(path)


def plain_model(path: Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForImageTextToText.from_pretrained(path, config=plain_config(path), dtype=dtype)
