"""Fingerprints of a base checkpoint: what changes them, what does not, and what they read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from evs_train.errors import ModelError
from evs_train.models import base_files
from evs_train.models.base_files import base_folder, commit_of, fingerprints
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_fingerprint_is_pinned(tmp_path: Path) -> None:
    """A change here would refuse to resume runs that were begun before it."""
    places = {"a": [0, 5000], "b": [5000, 5001]}
    entries = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in places.items()}
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(range(250)) * 20 + b"x"
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    middle = content[8 + len(header) + (5000 - 4096) // 2 :][:4096]
    expected = hashlib.sha256(len(content).to_bytes(8, "little") + header + middle + b"x").hexdigest()[:16]
    assert expected == "50318f92e357edd6"
    assert fingerprints(tmp_path) == {"config.json": "44136fa355b3678a", "model.safetensors": expected}


def test_it_follows_content_and_not_place(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_checkpoint("qwen3_vl")
    first = fingerprints(base)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= first.keys()
    copied = Path(shutil.copytree(base, tmp_path / "copy", symlinks=False))
    (copied / "README.md").write_text("other words")
    assert fingerprints(copied) == first
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "image_token_id": 3}))
    changed = fingerprints(copied)
    assert [name for name in first if first[name] != changed[name]] == ["config.json"]


def test_every_tensor_is_seen(tmp_path: Path) -> None:
    """Training changes a tensor nearly everywhere; so a change of any one must be seen."""
    sizes = {"scale": (), "norm": (7,), "one block": (1024,), "more": (1025,), "linear": (64, 65), "empty": (0, 4)}
    tensors = {name: torch.ones(size) for name, size in sizes.items()}
    prints = {fingerprints(save(tmp_path, **tensors))["model.safetensors"]}
    for name in list(tensors)[:-1]:
        save(tmp_path, **tensors | {name: tensors[name] * 1.01 + 0.01})
        prints.add(fingerprints(tmp_path)["model.safetensors"])
    assert len(prints) == len(tensors)


def test_names_shapes_and_types_are_seen(tmp_path: Path) -> None:
    zeros = torch.zeros(4, 8)
    variants: list[dict[str, Any]] = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(8, 4)},
        {"a": zeros.view(torch.int32)},
        {"a": zeros, "b": zeros[:1].clone()},
    ]
    assert len({fingerprints(save(tmp_path, **one))["model.safetensors"] for one in variants}) == len(variants)


def test_what_it_cannot_see(tmp_path: Path) -> None:
    """One row of a large tensor: the price of reading 4 KiB of each."""
    large = torch.zeros(100, 100)
    first = fingerprints(save(tmp_path, a=large))
    large[0] = 1
    assert fingerprints(save(tmp_path, a=large)) == first
    large[50] = 1
    assert fingerprints(save(tmp_path, a=large)) != first


def test_it_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, **{f"t{number}": torch.zeros(250_000) for number in range(20)})
    read: list[int] = []
    pread = os.pread

    def counted(file: int, length: int, offset: int) -> bytes:
        found = pread(file, length, offset)
        read.append(len(found))
        return found

    monkeypatch.setattr(base_files.os, "pread", counted)
    fingerprints(tmp_path)
    assert len(read) == 2 + 20
    assert sum(read) < 20 * 4096 + 4096 < (tmp_path / "model.safetensors").stat().st_size / 100


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_a_file_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        fingerprints(tmp_path)


def test_the_commit_of_a_hub_name_is_recorded(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's cache, without a network; the same files in a directory have the same fingerprints and no commit."""
    base = tiny_checkpoint("qwen3_vl")
    cached = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(base, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = recipe_of(arguments(Path("owner/tiny"), world, tmp_path / "run", train__steps=1))
    assert base_folder(recipe.model) == cached / "snapshots" / COMMIT
    assert base_folder(recipe.model, COMMIT) == cached / "snapshots" / COMMIT
    assert commit_of(recipe.model, base_folder(recipe.model)) == COMMIT
    elsewhere = recipe.model.model_copy(update={"revision": "other"})
    with pytest.raises(ModelError, match="the files of owner/tiny cannot be had"):
        base_folder(elsewhere)
    run = Run(recipe_of(arguments(base, world, tmp_path / "run", train__steps=1)))
    assert run._record()["base_commit"] is None
    assert run._record()["base_files"] == fingerprints(base_folder(recipe.model))
