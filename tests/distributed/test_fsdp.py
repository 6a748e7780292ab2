"""FSDP2 on two real processes gives the losses and gradient norms of one process on the joined batches.

The recipe has no key for FSDP. These tests say that the hook works under `fully_shard`, and on which condition.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from evs_train.models import FAMILIES
from tests.distributed.fsdp_worker import STEPS, run
from tests.parity.rig import Rig
from tests.runs import torchrun

WORKER = ("-m", "tests.distributed.fsdp_worker")


@pytest.fixture(scope="module")
def sharded(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, shared_tmp: Path
) -> Callable[[str], list[dict[str, float]]]:
    """What two processes find of a family. One start serves all families: it takes longer than the steps."""
    output, errors = shared_tmp / "fsdp", shared_tmp / "fsdp_errors.txt"
    checkpoints = [str(tiny_checkpoint(name)) for name in sorted(FAMILIES)]
    with FileLock(str(shared_tmp / "fsdp.lock")):
        if not errors.is_file():
            output.mkdir()
            words = [str(mixed_rows), str(output), "equal", *checkpoints]
            errors.write_text(torchrun(words, 2, timeout=240, program=WORKER).stderr, encoding="utf-8")

    def of(family: str) -> list[dict[str, float]]:
        file = output / f"{family}.json"
        assert file.is_file(), f"it, or a family before it, failed; stderr ends with:\n{errors.read_text()[-4000:]}"
        found: list[dict[str, float]] = json.loads(file.read_text())
        return found

    return of


@pytest.mark.capability("FSDP2", "yes")
def test_two_sharded_processes_give_the_steps_of_one(
    family_name: str,
    sharded: Callable[[str], list[dict[str, float]]],
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
) -> None:
    expected = run(Rig(tiny_checkpoint(family_name), mixed_rows))
    found = sharded(family_name)
    assert len(found) == len(expected) == len(STEPS)
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_uneven_calls_of_a_sharded_tower_fail(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    """Sharded layers gather their weights whenever they run: without `equal_calls` gathers of different layers meet."""
    words = [str(mixed_rows), str(tmp_path), "uneven", str(tiny_checkpoint("qwen3_vl"))]
    assert torchrun(words, 2, timeout=120, program=WORKER).returncode != 0
    assert not list(tmp_path.glob("*.json"))
