"""What two processes must share, agree on and wait for: each check with its guard, and without it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.order_worker import seen_in
from tests.faults.nursery import Nursery
from tests.faults.pairs import BUDGET, FURTHER
from tests.runs import arguments


@pytest.fixture
def words(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> list[str]:
    options: dict[str, Any] = {"train__steps": 1, "train__batch_size": 1, "data__num_frames": 4}
    options["data__index"] = tmp_path / "media.arrow"
    return arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / "run", **options)


@pytest.fixture
def said(nurse: Nursery, tmp_path: Path) -> Callable[..., list[str]]:
    """Has two processes do something of pairs.py; gives what each of them said."""

    def of(call: str, **given: Any) -> list[str]:
        nurse.run(f"tests.faults.pairs:{call}", world=2, notes=str(tmp_path), **given)
        notes = [tmp_path / str(rank) for rank in range(2)]
        return [note.read_text(encoding="utf-8") if note.exists() else "nothing" for note in notes]

    return of


def failing(words: str, fails: bool) -> contextlib.AbstractContextManager[Any]:
    """What is checked within fails with these words, or else does not."""
    return pytest.raises(AssertionError, match=words) if fails else contextlib.nullcontext()


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "without the look"])
def test_a_folder_that_is_not_shared(looks: bool, said: Callable[..., list[str]], tmp_path: Path) -> None:
    """It is refused by both. Otherwise what they save is no checkpoint, on neither disk, and nobody says so."""
    host = socket.gethostname()
    refused = f"process 1 on {host}: output_dir: {tmp_path / 'disk1' / 'run'} is not the folder of this name that"
    with failing(r"'saved; shard_1\.pt is missing', 'saved; it has no manifest", not looks):
        for one in (found := said("share", looks=looks)):
            assert one.startswith(refused), str(found)


@pytest.mark.parametrize("agrees", [True, False], ids=["agree", "without agreeing"])
def test_plans_that_differ(agrees: bool, words: list[str], said: Callable[..., list[str]], tmp_path: Path) -> None:
    """Both are told of both. Otherwise they train, and some draws are read by both, in the place of others."""
    planned = "the processes planned different runs: process 0: 21 rows, 1 steps of "
    with failing("trained", not agrees):
        for one in said("plan", words=words, agrees=agrees):
            assert one.startswith(planned)
            assert f"micro-batches of {BUDGET} tokens" in one
            assert f"; process 1: 21 rows, 1 steps of 2 padded micro-batches of {BUDGET + FURTHER} tokens" in one
    draws = [line["draw"] for line in seen_in(tmp_path / "seen")]
    assert (len(draws) > len(set(draws))) is not agrees


@pytest.mark.parametrize("without", [None, "ignoring", "waiting"])
def test_processes_that_end_together(without: str | None, words: list[str], said: Callable[..., list[str]]) -> None:
    """Each leaves with its own code, though torchrun sends SIGTERM as soon as one is gone."""
    with failing("'nothing', '75'", without is not None):
        assert said("end", words=words, without=without) == ["75", "75"]
