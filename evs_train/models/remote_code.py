"""Checkpoints that bring their own code: what must be said and pinned before any of it runs.

Invariant: no code of a checkpoint runs unless the recipe trusts it (`model.trust_remote_code`), an adapter knows the
architecture, and the files cannot change: they lie in a directory, or the revision is a full commit hash. A config may
send transformers to further repositories, whose revision nothing pins; it is then read from the local cache only. So
may the processor's files of a directory; those of a hub name ask any repository for the pinned commit.
Nor do kernels from repositories run, which a config can name as well (`check_kernels`).
Cost: none. What it cannot do: judge the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from evs_train.errors import ModelError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_remote_code(path: str, revision: str | None, trusted: bool, fields: Mapping[str, Any]) -> None:
    """Refuse what the recipe does not allow.

    Args:
        path: directory or hub name.
        revision: `model.revision`.
        trusted: `model.trust_remote_code`.
        fields: config.json, as a dictionary.

    Raises:
        ModelError: the recipe does not trust the code, or it is not pinned.
        ValueError: a JSON file of the directory is torn.
    """
    if not trusted:
        raise ModelError(
            f"the architecture '{fields['model_type']}' of {path} is code that comes with the checkpoint",
            "read it, then set model.trust_remote_code: true and, for a hub name, model.revision to a commit hash",
        )
    if not Path(path).is_dir() and not _COMMIT.fullmatch(revision or ""):
        raise ModelError(
            f"model.trust_remote_code: the code of {path} is not pinned (model.revision: {revision})",
            "set model.revision to a commit's full hash of 40 digits, or model.path to a directory",
        )
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(path).glob("*_config.json"))]
    others = sorted({name for one in (fields, *files) for name in _other_repositories(one) if name != path})
    if others and not is_offline_mode():
        raise ModelError(
            f"model.trust_remote_code: the config of {path} runs code of {', '.join(others)}, which nothing pins",
            "read their cached copies, then run with the environment variable HF_HUB_OFFLINE=1",
        )


def check_kernels(path: str, fields: Mapping[str, Any]) -> None:
    """Refuse a config that names kernels of a repository (`owner/name`), which transformers would download and run.

    Raises:
        ModelError: it does, at any depth.
    """
    for key, value in fields.items():
        if isinstance(value, Mapping):
            check_kernels(path, value)
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelError(
                f"the config of {path} takes code from a repository: {key}: {value}", "remove this key from config.json"
            )


def _other_repositories(fields: Mapping[str, Any]) -> Iterator[str]:
    """Repositories that any `auto_map` names, nested ones too: `owner/name--module.Class`, or lists of such."""
    for key, value in fields.items():
        if key == "auto_map" and isinstance(value, Mapping):
            yield from re.findall(r"([\w./-]+?)--", str(list(value.values())))
        elif isinstance(value, Mapping):
            yield from _other_repositories(value)
