"""Time-outs of process groups; the rest of processes.py needs two nodes (tests/distributed/test_two_nodes.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from evs_train.processes import wait_at_most

MINUTES = 2.5


@pytest.fixture
def groups() -> Iterator[list[distributed.ProcessGroup]]:
    """The default group of a process alone, and one made from it, as DeepSpeed makes its own."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    distributed.new_group([0])
    yield list(distributed_c10d._world.pg_map)
    distributed.destroy_process_group()


def seconds(groups: list[distributed.ProcessGroup]) -> list[float]:
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_all_groups_wait_as_long_as_the_recipe_says_and_without_it_do_not(
    groups: list[distributed.ProcessGroup],
) -> None:
    assert len(groups) == 2
    assert 60 * MINUTES not in seconds(groups)
    wait_at_most(MINUTES)
    assert seconds(groups) == [60 * MINUTES] * 2
