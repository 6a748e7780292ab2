"""What the tests in this folder share: one process that forks others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery, nursery


@pytest.fixture(scope="package")
def nurse(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery"), tiny_checkpoint("qwen3_vl")) as one:
        yield one
