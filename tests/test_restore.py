"""Counts and random numbers of a checkpoint, for as many processes as before and for another number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evs_train.restore import SinceLog, num_generators, read_counts, seed_anew, write_counts
from evs_train.tally import Tally


def test_each_rank_finds_its_own_counts(tmp_path: Path) -> None:
    counts = [SinceLog(3, 0.1 * rank, 1.5, [0.1 * rank, 2.0]) for rank in range(11)]
    for rank, one in enumerate(counts):
        write_counts(tmp_path, rank, one)
    assert [read_counts(tmp_path, rank, 11) for rank in range(11)] == counts


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_another_number_of_ranks_keeps_sums_and_the_mean_loss(num_ranks: int, tmp_path: Path) -> None:
    """The loss of a step is the mean over ranks of what each has added up."""
    length = len(Tally().sums())
    counts = [SinceLog(3, float(rank), 1.5, [float(rank)] * length) for rank in range(4)]
    for rank, one in enumerate(counts):
        write_counts(tmp_path, rank, one)
    found = [read_counts(tmp_path, rank, num_ranks) for rank in range(num_ranks)]
    assert {one.last_log for one in found} == {3}
    assert sum(one.loss for one in found) / num_ranks == pytest.approx(sum(one.loss for one in counts) / 4)
    tallies = [Tally() for _ in found]
    for one, tally in zip(found, tallies, strict=True):
        tally.add_sums(one.sums, torch.device("cpu"))
    assert [sum(values) for values in zip(*(tally.sums() for tally in tallies), strict=True)] == [6.0] * length


def test_a_tally_goes_on_to_the_bit() -> None:
    one, other = Tally(["a"]), Tally(["a"])
    one.add_sum("a", torch.tensor(0.1, dtype=torch.float64))
    other.add_sums(json.loads(json.dumps(one.sums())), torch.device("cpu"))
    for tally in (one, other):
        tally.add_sum("a", torch.tensor(0.7, dtype=torch.float64))
    assert one.sums() == other.sums()
    assert one.sums()[-1] == 0.1 + 0.7


def test_generators_are_counted(tmp_path: Path) -> None:
    assert num_generators(tmp_path) == 0
    (tmp_path / "rng_state.pth").touch()
    assert num_generators(tmp_path) == 1
    (tmp_path / "rng_state.pth").unlink()
    for rank in range(3):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert num_generators(tmp_path) == 3


def test_new_random_numbers_differ_by_seed_step_and_rank() -> None:
    drawn = []
    for place in [(0, 4, 0), (0, 4, 1), (0, 5, 0), (1, 4, 0), (0, 4, 0)]:
        seed_anew(*place)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[4]
