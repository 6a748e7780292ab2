"""No key, password or home path in anything that a run, its tracking, its export or its evaluation writes.

Secrets are planted wherever a user might put them, everything is done, and every file, every line that was printed and
every byte that went to a W&B server is searched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import feather
from transformers.trainer_pt_utils import safe_globals

from evs_train import check as check_module
from evs_train import redaction
from evs_train.checkpoint import read_record
from evs_train.data.index import MediaIndex
from evs_train.errors import RecipeError, report
from evs_train.evaluate.command import run as evaluate
from evs_train.evaluate.options import parse_options
from evs_train.evaluate.records import run_identity
from evs_train.export import export_run
from evs_train.redaction import redact, restore
from evs_train.uptrain import Run
from tests.faults.wandb_server import Server
from tests.runs import ROOT, arguments, recipe_of

ENVIRONMENT = {
    "WANDB_API_KEY": "c0ffee00c0ffee11c0ffee22c0ffee33c0ffee44",
    "HF_TOKEN": "hf_" + "PlantedTokenOfTheHub" * 2,
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED12",
    "AWS_SECRET_ACCESS_KEY": "plantedSecretAccessKey/of+amazon",
    "AWS_SESSION_TOKEN": "plantedSessionTokenOfAmazon==",
    "https_proxy": "http://alice:plantedproxypassword@127.0.0.1:9",
    "MY_SERVICE_PASSWORD": "plantedpasswordofaservice",
}
IN_TEXT = ("plantedurlpassword", "plantedquerytoken", "ghp_" + "plantedgithubtoken1234")
SECRETS = [*ENVIRONMENT.values(), *IN_TEXT, "plantedproxypassword"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that all inputs and outputs lie in, and secrets in the environment."""
    home = tmp_path / "home-of-alice"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice-who-trains")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(home))
    monkeypatch.setattr(sys, "argv", ["uptrain.py", f"data.rows=https://u:{IN_TEXT[0]}@host/x", str(home)])
    monkeypatch.chdir(tmp_path)
    return home


def searched(content: bytes, home: Path, where: str) -> Iterator[str]:
    """What of the secrets, the home folder and the machine is in `content`."""
    for one in [*SECRETS, str(home), "home-of-alice", "alice-who-trains"]:
        if one.encode() in content:
            place = content.index(one.encode())
            yield f"{where}: {one!r} in {content[max(0, place - 80) : place + 80]!r}"


def files_with_secrets(folder: Path, home: Path, *, inputs: set[Path]) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in inputs:
            for part, content in unpacked(path):
                found += searched(path.name.encode() + content, home, f"{path.relative_to(folder)}{part}")
        if path.is_symlink():
            found += searched(os.readlink(path).encode(), home, f"link {path.name}")
    return found


def unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and what is packed in it: tables, and members of archives, which torch's files are."""
    yield "", path.read_bytes()
    if path.suffix == ".arrow":
        yield ", unpacked", json.dumps(feather.read_table(path).to_pylist()).encode()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                yield f", {member}", member.encode() + archive.read(member)


def test_nothing_secret_is_written_printed_or_sent(
    tiny_checkpoint: Callable[[str], Path],
    world: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base, data, output = home / "base", home / "data", home / "runs" / "one"
    copy_inputs(tiny_checkpoint("qwen3_vl"), world, home)
    (data / "bad.mp4").write_bytes(b"not a video")
    rows = data / "rows.jsonl"
    bad = {"id": "bad", "video": str(data / "bad.mp4"), "conversations": [
        {"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "A cat."}
    ]}  # fmt: skip
    rows.write_text((data / world.name).read_text() + json.dumps(bad) + "\n" + json.dumps({**bad, "id": "bad2"}) + "\n")
    questions = data / "questions.jsonl"
    asked = {
        "id": "q",
        "question": "What?",
        "answer": "A",
        "options": ["one", "two"],
        "video": str(data / "clips/000000.mp4"),
    }
    questions.write_text(json.dumps(asked) + "\n")
    inputs = files_in(home)
    words = arguments(
        base, rows, output, tuning__method="lora", train__steps=6, train__save_every=3, train__pictures_every=2,
        train__batch_size=4, data__max_bad_share=1.0,
        tracking__wandb=True, tracking__timeout=20.0,
        tracking__name=f"trial of https://alice:{IN_TEXT[0]}@host/x?token={IN_TEXT[1]}",
        tracking__tags=[ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], IN_TEXT[2], ENVIRONMENT["HF_TOKEN"]],
    )  # fmt: skip
    with Server().running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        recipe = recipe_of(words)
        check_module.check(Run(recipe))
        Run(recipe).train()
        assert server.seen
        sent = b"".join(server.seen)
    exported = export_run(output, 0.5)
    folder = output / "eval"
    evaluate(
        parse_options(
            [f"model={exported.path}", f"data={questions}", f"out={folder}", "rates=[0.5]", "timed=0", "dtype=float32"]
        )
    )
    report(RecipeError(f"{home}/x.yaml: {ENVIRONMENT['HF_TOKEN']}", f"see {home}"))

    assert (output / "quarantine.jsonl").read_text().count("~/data/bad.mp4") >= 1
    assert json.loads((output / "record.json").read_text())["recipe"]["model"]["path"] == "~/base"
    assert list(output.glob("wandb/run-*/*.wandb"))
    for name in ("results.json", "report.html"):
        assert (folder / name).is_file()
    # The key goes to the server in a header, which is what it is for; nothing else of it.
    sent = re.sub(rb"(?i)authorization: basic \S+", b"", sent)
    printed = "".join(capfd.readouterr()).encode()
    assert b"~/x.yaml: ***" in printed
    found = [
        *files_with_secrets(home, home, inputs=inputs),
        *searched(sent, home, "sent"),
        *searched(printed, home, "printed"),
    ]
    assert not found, "\n".join(found)
    assert not_safe(output) == OF_TRANSFORMERS

    # What is redacted is found again: the index knows its files, and the run its evaluation.
    index = MediaIndex.read(data / ".evs_index" / "media.arrow")
    assert index.find(str(data / "bad.mp4")) is not None
    assert json.loads((folder / "results.json").read_text())["models"][0]["run"] == run_identity(read_record(output))
    words.append("train.resume=true")
    with pytest.raises(RecipeError, match="is the end of the run"):
        Run(recipe_of(words)).train()


def test_full_weights_hold_nothing_secret(tiny_checkpoint: Callable[[str], Path], world: Path, home: Path) -> None:
    base, rows = copy_inputs(tiny_checkpoint("qwen3_vl"), world, home)
    inputs, output = files_in(home), home / "runs" / "one"
    Run(recipe_of(arguments(base, rows, output, train__steps=1, train__save_every=1))).train()
    exported = export_run(output, 0.5)
    for folder in (output / "checkpoint-1", output / "final", exported.path):
        assert (folder / "model.safetensors").is_file()
    found = files_with_secrets(home, home, inputs=inputs)
    assert not found, "\n".join(found)
    assert not_safe(output) == OF_TRANSFORMERS


def test_shards_of_deepspeed_hold_nothing_secret(
    tiny_checkpoint: Callable[[str], Path], world: Path, home: Path
) -> None:
    """Also not what its configuration says, which it keeps in each shard. A run by our own command, with its export."""
    base, rows = copy_inputs(tiny_checkpoint("qwen3_vl"), world, home)
    monitor = {"enabled": False, "output_path": str(home / "monitor"), "job_name": ENVIRONMENT["HF_TOKEN"]}
    shipped = json.loads((ROOT / "launch" / "deepspeed" / "zero2.json").read_text())
    (home / "zero.json").write_text(json.dumps({**shipped, "csv_monitor": monitor}))
    inputs, output = files_in(home), home / "runs" / "one"
    words = arguments(
        base, rows, output, deepspeed=home / "zero.json", train__steps=1, train__save_every=1, export__enabled=True
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "launch/uptrain.py", *words],
        cwd=ROOT,
        env={**os.environ, **alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:].decode()
    found = files_with_secrets(home, home, inputs=inputs)
    assert not found, "\n".join(found)
    assert len(not_safe(output) - OF_TRANSFORMERS) == 2


def copy_inputs(checkpoint: Path, world: Path, home: Path) -> tuple[Path, Path]:
    """Copies of a base and of rows in the home folder."""
    shutil.copytree(checkpoint, home / "base")
    shutil.copytree(world.parent, home / "data")
    return home / "base", home / "data" / world.name


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


OF_TRANSFORMERS = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def not_safe(output: Path) -> set[str]:
    """Names of files of the run that are pickles, or archives of such; final/ and export/ must have none."""
    found = {path for path in files_in(output) if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")}
    assert not [path for path in found if not path.relative_to(output).parts[0].startswith("checkpoint-")], found
    for path in found:
        if path.name in OF_TRANSFORMERS:
            with safe_globals():  # of NumPy, in the random state
                torch.load(path, weights_only=True)
    return {path.name for path in found}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_is_packed_is_searched(home: Path, compression: int) -> None:
    with zipfile.ZipFile(home / "x.pt", "w", compression) as archive:
        archive.writestr("data.pkl", f"{'-' * 99}{ENVIRONMENT['HF_TOKEN']}")
    assert any("x.pt, data.pkl: " in line for line in files_with_secrets(home, home, inputs=set()))


@pytest.mark.parametrize("what", ["_secrets", "_homes"])
def test_without_redaction_something_is_found(home: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    text = f"{home}/x {ENVIRONMENT['MY_SERVICE_PASSWORD']}"
    assert not list(searched(redact(text).encode(), home, "text"))
    monkeypatch.setattr(redaction, what, list if what == "_secrets" else lambda: None)
    assert list(searched(redact(text).encode(), home, "text"))


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("HOME/a/b.mp4: damaged", "~/a/b.mp4: damaged"),
        ("see HOME", "see ~/"),
        ("HOME-of-others/x HOMEr/x /mntHOME/x", None),
        ("'HOME/a' and (HOME/b)", "'~/a' and (~/b)"),
        ("https://u:p@host/x", "https://***@host/x"),
        ("https://tokenastheuser@host/x", "https://***@host/x"),
        ("https://host/x?a=1&token=abc&b=2", "https://host/x?a=1&token=***&b=2"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("s3://AKIAIOSFODNN7EXAMPLE/x", "s3://***/x"),
        ("a mail to u@host", None),
        ("rate 0.75 of max_tokens 5, <|video_pad|>", None),
    ],
)
def test_texts(home: Path, text: str, becomes: str | None) -> None:
    given = text.replace("HOME", str(home))
    wanted = given if becomes is None else becomes
    assert redact(given) == redact(redact(given)) == wanted
    if "***" not in wanted and "see" not in wanted:
        assert restore(wanted) == given


def test_values_under_secret_names_and_short_ones(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG_TOKEN", "true")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/keys/service.json")
    given = {
        "api_key": "x",
        "Authorization": "Bearer x",
        "max_tokens": 5,
        "eos_token": "</s>",
        "on": ["true", "/keys/service.json"],
    }
    assert redact(given) == {**given, "api_key": "***", "Authorization": "***"}
    assert restore({"a": ["~/x", "~", "a~/b"]}) == {"a": [f"{home}/x", "~", "a~/b"]}
