"""What two processes must share, agree on and wait for: each check with its guard, and without it."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.commit import Checkpoints, Found
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
    planned = "the processes planned different runs: process 0: 21 rows (fingerprint "
    with failing("trained", not agrees):
        for one in said("plan", words=words, agrees=agrees):
            assert one.startswith(planned)
            assert f"micro-batches of {BUDGET} tokens" in one
            assert "; process 1: 21 rows (fingerprint " in one
            assert f"), 1 steps of 2 padded micro-batches of {BUDGET + FURTHER} tokens" in one
    draws = [line["draw"] for line in seen_in(tmp_path / "seen")]
    assert (len(draws) > len(set(draws))) is not agrees


def test_rows_that_differ(words: list[str], said: Callable[..., list[str]], world: Path, tmp_path: Path) -> None:
    """As many rows on both, but not the same ones."""
    text = world.read_text(encoding="utf-8")
    for rank, of_rank in enumerate((text, text.replace("circle", "disc"))):
        (tmp_path / f"rows{rank}.jsonl").write_text(of_rank, encoding="utf-8")
    one, other = said("read", words=[*words, f"data.media_root={world.parent}"])
    assert one == other
    assert one.startswith("the processes planned different runs: process 0: 21 rows (fingerprint ")


@pytest.mark.parametrize("without", [None, "ignoring", "waiting"])
def test_processes_that_end_together(without: str | None, words: list[str], said: Callable[..., list[str]]) -> None:
    """Each leaves with its own code, though torchrun sends SIGTERM as soon as one is gone."""
    with failing("'nothing', '75'", without is not None):
        assert said("end", words=words, without=without) == ["75", "75"]


def test_a_process_that_cannot_write_its_shard_says_why(
    words: list[str], said: Callable[..., list[str]], tmp_path: Path
) -> None:
    """So does the other one, whose folder it has removed. The checkpoint before stays whole."""
    found = said("write", words=[*words, "deepspeed=zero2", "train.steps=2", "train.save_every=1"])
    for one, why in zip(found, ("Parent directory", "inline_container"), strict=True):
        assert re.search(rf"run/\.staging-checkpoint-2-\w+ could not be written, with \d+ bytes free.*{why}", one), (
            found
        )
    assert Checkpoints(tmp_path / "run").newest_whole() == Found(tmp_path / "run" / "checkpoint-1", {})
    assert not list((tmp_path / "run").glob(".staging-*"))
