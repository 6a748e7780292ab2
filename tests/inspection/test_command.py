"""`evs-train inspect` from its words to its file and its errors."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image

from evs_train.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> str:
    return f"model={tiny_checkpoint('qwen3_vl')}"


def test_a_png_is_the_default(
    model: str, wide_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(wide_clip), model, "rate=.5", "num_frames=4", "dtype=bfloat16"]) == 0
    with Image.open(tmp_path / "wide_kept.png") as read:
        assert read.format == "PNG"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote wide_kept.png"
    assert lines[1] == "units: 2 of 24 tokens; scored with evs.score=engine in bfloat16"
    assert lines[2] == "rate 0.5: kept 24/48 tokens (50.0%)"


def test_a_folder_of_frames_to_a_film(model: str, tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    out = tmp_path / "new" / "a=b.mp4"
    words = ["inspect", model, "rate=[.5,.75,.9]", "frames_fps=4", "fps=2", f"out={out}", str(tmp_path)]
    assert main(words) == 0
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_a_video_whose_name_looks_like_a_key(model: str, tmp_path: Path, wide_clip: Path) -> None:
    clip = tmp_path / "rate=1.mp4"
    clip.write_bytes(wide_clip.read_bytes())
    assert main(["inspect", str(clip), model, "rate=.5", f"out={tmp_path / 'o.png'}"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "rate=.5"], "no video is named"),
        (["CLIP", "CLIP2", "MODEL"], "2 videos are named"),
        (["gone.mp4", "MODEL", "rate=.5"], "video not found: gone.mp4"),
        (["CLIP", "rate=.5"], "model=... is missing"),
        (["CLIP", "MODEL", "rates=.5"], "did you mean rate?"),
        (["CLIP", "MODEL", "num_frame=4"], "did you mean num_frames?"),
        (["CLIP", "MODEL", "rate=1"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=-0.1"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=[.5,1.5]"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=[]"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=false"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=most"], "rate must be a number in [0, 1)"),
        (["CLIP", "MODEL", "rate=[.5"], "the value of rate is not valid YAML"),
        (["CLIP", "MODEL", "rate=.5", "out=o.gif"], ".png, .html, .mp4"),
        (["CLIP", "MODEL", "rate=.5", "out=o"], ".png, .html, .mp4"),
        (["CLIP", "MODEL", "rate=.5", "out=FILE/o.png"], "its folder cannot be written to"),
        (["CLIP", "MODEL", "rate=.5", "out=FOLDER.png"], "is a folder"),
        (["CLIP", "MODEL", "rate=.5", "dtype=float16"], "dtype must be bfloat16 or float32"),
        (["FOLDER.png", "MODEL", "rate=.5"], "how many of its frames make a second"),
        (["FOLDER.png", "MODEL", "rate=.5", "frames_fps=2"], "no folder of images"),
        (["FILE", "MODEL", "rate=.5"], "FILE"),
        (["CLIP", "MODEL", "rate=.5", "fps=fast"], "fps: "),
        (["CLIP", "MODEL", "rate=.5", "fps=2", "num_frames=4"], "set fps or num_frames, not both"),
        (["CLIP", "model=gone/for/good", "rate=.5"], "does not exist"),
        (["CLIP", "MODEL"], "add rate=0.75"),
    ],
)
def test_errors(
    words: list[str],
    message: str,
    model: str,
    wide_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("no video", encoding="utf-8")
    (tmp_path / "FOLDER.png").mkdir()
    named = {"MODEL": model, "CLIP": str(wide_clip), "CLIP2": "other.mp4"}
    assert main(["inspect", *(named.get(word, word) for word in words)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER.png"]


def test_wrong_words_are_answered_before_torch_is_imported(wide_clip: Path) -> None:
    code = f"""
import sys
from evs_train.cli import main
code = main(["inspect", {str(wide_clip)!r}, "model=x", "rate=2"])
sys.exit(9 if "torch" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr


def test_the_page_s_picture_is_made_by_the_page_s_commands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "docs/inspect.png" in text)
    commands = block.replace("python ", f"{shlex.quote(sys.executable)} ")
    commands = commands.replace("evs-train ", f"{shlex.quote(sys.executable)} -m evs_train.cli ")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["bash", "-euc", commands]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shown = ROOT / "docs" / "inspect.png"
    with Image.open(shown) as here, Image.open(tmp_path / "docs" / "inspect.png") as made:
        assert made.size == here.size
    assert shown.stat().st_size < 150_000
