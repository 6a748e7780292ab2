"""What a run prints of what it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.models import FAMILIES
from launch import uptrain
from tests.runs import arguments


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize(
    ("family", "tuning", "said"),
    [
        ("qwen3_vl_moe", ["tuning.method=lora"], True),
        ("nemotron_h_omni", ["tuning.method=lora"], True),
        ("qwen3_vl_moe", ["tuning.method=full"], False),
        ("qwen3_vl_moe", ["tuning.method=lora", "tuning.lora={parts: [vision], targets: [qkv]}"], False),
        ("qwen3_vl", ["tuning.method=lora"], False),
    ],
)
def test_a_run_with_adapters_says_what_they_do_not_reach(
    family: str,
    tuning: list[str],
    said: bool,
    dry_run: str,
    tiny_checkpoint: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = arguments(tiny_checkpoint(family), world, tmp_path / "run", train__steps=1, train__batch_size=1)
    assert uptrain.main([*words, *tuning, f"dry_run={dry_run}"]) == 0
    printed = capfd.readouterr().out
    assert "trainable" in printed
    assert ("they get no adapters" in printed) == said
    assert not said or FAMILIES[family].lora_note in printed
