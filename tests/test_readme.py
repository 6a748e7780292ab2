"""What README tells the reader to type works as written."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from evs_train.recipe import load_recipe
from evs_train.samplers import build_sampler

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Command lines in the shell blocks of `text`, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_laptop_commands_train_prune_export_and_answer(tmp_path: Path) -> None:
    section = README.split("## The real recipe on a laptop\n")[1].split("\n## ")[0]
    lines = commands(section)
    assert len(lines) == 3
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    logs = [json.loads(line) for line in (tmp_path / "runs/laptop/metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert all(math.isfinite(log["loss"]) for log in logs)
    pruned = [log["evs/video_tokens_after"] < log["evs/video_tokens_before"] for log in logs]
    assert pruned == [False, True, True, True]
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    answers = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answers.returncode == 0, answers.stderr[-4000:]
    assert re.findall(r"^(0\.\d+) ", answers.stdout, flags=re.MULTILINE) == ["0.0", "0.5", "0.75"]
    config = json.loads((tmp_path / "runs/laptop/export/config.json").read_text())
    assert config["video_pruning_rate"] == 0.7
    assert config["model_type"] == "NemotronH_Nano_Omni_Reasoning_V3"


def test_every_training_command_is_a_valid_recipe() -> None:
    programs = ("launch/uptrain.py", "launch/multinode.sh")
    trainings = [(line, program) for line in commands(README) for program in programs if program in line]
    assert len(trainings) >= 4
    for line, program in trainings:
        words = shlex.split(line)
        load_recipe(words[words.index(program) + 1 :])


def test_every_sampler_shown_can_be_built() -> None:
    specs = re.findall(r"`(\{kind: .*?\})`", README)
    assert len(specs) >= 6
    for spec in specs:
        build_sampler(yaml.safe_load(spec))
