"""Which rows a run trains on, at which rates and with which pixels: the same for any processes and workers, and after
a kill in mid-epoch, from which a run goes on without reading what came before.

Everything is seen where the trainer is handed its batches, in real processes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.decoding import DECODER, Reply
from evs_train.errors import MediaError
from tests.distributed.order_worker import seen_in, watch
from tests.runs import arguments, torchrun

STEPS = 4
KILLED_AT = 2
GLOBAL_BATCH = 8
FIRST_DRAW = KILLED_AT * GLOBAL_BATCH
"""Of those that the killed run did not keep."""
WORKERS = (0, 2, 4)
WORKER = ("-m", "tests.distributed.order_worker")
# Processes to (rows of a micro-batch, micro-batches of a step): all make the same global batch.
SPLITS = {1: (4, 2), 2: (2, 2), 4: (2, 1)}

Seen = list[dict[str, Any]]


Words = Callable[..., list[str]]


def mixture_in(folder: Path, world: Path) -> Path:
    """A copy of the world as a weighted mixture: an epoch is 21 draws, in which some rows come twice and some not."""
    shutil.copytree(world.parent, folder)
    rows = [json.loads(line) for line in world.read_text(encoding="utf-8").splitlines()]
    entries = []
    for name, weight, chosen in (
        ("clips", 2, [row for row in rows if "video" in row]),
        ("others", 1, [row for row in rows if "video" not in row]),
    ):
        (folder / f"{name}.json").write_text(json.dumps(chosen), encoding="utf-8")
        entries.append({"json_path": f"{name}.json", "weight": weight})
    file = folder / "mixture.yaml"
    file.write_text(json.dumps({"datasets": entries}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def mixture(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_in(tmp_path_factory.mktemp("order") / "world", world)


@pytest.fixture(scope="module")
def words_of(tiny_checkpoint: Callable[[str], Path]) -> Words:
    def words(rows: Path, output: Path, processes: int, workers: int, **options: Any) -> list[str]:
        batch_size, accumulation = SPLITS[processes]
        settings: dict[str, Any] = {
            "data__num_workers": workers,
            "data__on_error": "raise",
            "data__index": output.with_name("none.arrow"),
            "evs__rate": {"kind": "uniform", "min": 0.0, "max": 0.9},
            "evs__scope": "sample",
            "train__batch_size": batch_size,
            "train__grad_accumulation": accumulation,
            "train__steps": STEPS,
            **options,
        }
        return arguments(tiny_checkpoint("qwen3_vl"), rows, output, **settings)

    return words


@pytest.fixture(scope="module")
def reference(words_of: Words, mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What one process without workers trains on."""
    folder = tmp_path_factory.mktemp("reference")
    watch(words_of(mixture, folder / "run", 1, 0), folder / "seen")
    return seen_in(folder / "seen")


def job(words: list[str], seen: Path, killed_at: int | None = None) -> dict[str, Any]:
    return {"words": words, "seen": str(seen), "killed_at": killed_at}


def do(jobs: list[dict[str, Any]], processes: int, folder: Path) -> tuple[int, str]:
    """Do jobs in real processes, or in this one if it is to be one; exit code and stderr."""
    if processes == 1:
        for one in jobs:
            watch(one["words"], Path(one["seen"]))
        return 0, ""
    file = folder / f"jobs{processes}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = torchrun([str(file)], processes, program=WORKER)
    return done.returncode, done.stderr


def test_the_reference_holds_every_case(reference: Seen) -> None:
    assert [line["draw"] for line in reference] == list(range(STEPS * GLOBAL_BATCH))
    assert [line["step"] for line in reference] == [draw // GLOBAL_BATCH for draw in range(STEPS * GLOBAL_BATCH)]
    assert len({line["rate"] for line in reference}) == len(reference)
    assert {kind for line in reference for kind, *_ in line["media"]} == {"video", "image"}
    assert any(not line["media"] for line in reference)
    by_row: dict[str, set[str]] = {}
    for line in reference:
        by_row.setdefault(line["id"], set()).add(json.dumps([pixels for *_, pixels in line["media"]]))
    assert all(len(pixels) == 1 for pixels in by_row.values())  # a row that comes again shows the same
    videos = {pixels for row, (pixels,) in by_row.items() if row.startswith("clip")}
    assert len(videos) == sum(row.startswith("clip") for row in by_row)  # and no other row shows it
    assert max(Counter(line["id"] for line in reference).values()) > 1


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_rows_rates_and_pixels_are_the_same_for_any_processes_and_workers(
    processes: int, reference: Seen, mixture: Path, words_of: Words, tmp_path: Path
) -> None:
    jobs = [
        job(words_of(mixture, tmp_path / f"run{workers}", processes, workers), tmp_path / f"seen{workers}")
        for workers in WORKERS
    ]
    code, errors = do(jobs, processes, tmp_path)
    assert code == 0, errors[-4000:]
    for workers in WORKERS:
        seen = tmp_path / f"seen{workers}"
        of_ranks = [len(file.read_text().splitlines()) for file in seen.iterdir()]
        assert of_ranks == [STEPS * GLOBAL_BATCH // processes] * processes
        assert seen_in(seen) == reference, f"{workers} workers"


@pytest.fixture(scope="module")
def ruined(world: Path, reference: Seen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture, in which media are ruined that the first steps show, and later ones do not need.

    The files keep their sizes, by which a resumed run knows its data.
    """
    mixture = mixture_in(tmp_path_factory.mktemp("ruined") / "world", world)
    before, after = ({line["id"] for line in part} for part in (reference[:FIRST_DRAW], reference[FIRST_DRAW:]))
    assert before & after, "no row comes again"
    rows = [row for name in ("clips", "others") for row in json.loads((mixture.parent / f"{name}.json").read_text())]
    media = [(row["id"], row.get("video", row.get("image"))) for row in rows]
    files = [mixture.parent / name for row, name in media if name and row in before - after]
    assert {file.suffix for file in files} == {".mp4", ".png"}
    for file in files:
        file.write_bytes(bytes(file.stat().st_size))
    return mixture


@pytest.fixture(scope="module")
def killed(mixture: Path, reference: Seen, words_of: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two processes left that was killed in mid-epoch, right behind a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    words = words_of(mixture, folder / "run", 2, 2, train__save_every=KILLED_AT)
    code, errors = do([job(words, folder / "seen", KILLED_AT)], 2, folder)
    assert code != 0
    assert "SIGKILL" in errors, errors[-4000:]
    assert seen_in(folder / "seen") == reference[:FIRST_DRAW]
    assert [path.name for path in (folder / "run").glob("checkpoint-*")] == [f"checkpoint-{KILLED_AT}"]
    return folder / "run"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_goes_on_with_the_next_row_and_reads_none_before(
    processes: int, killed: Path, ruined: Path, reference: Seen, words_of: Words, tmp_path: Path
) -> None:
    """With another number of workers, and of processes, than the run had that was killed."""
    jobs = []
    for workers in (0, 4):
        output = Path(shutil.copytree(killed, tmp_path / f"run{workers}"))
        jobs.append(job(words_of(ruined, output, processes, workers, train__resume=True), tmp_path / f"seen{workers}"))
    code, errors = do(jobs, processes, tmp_path)
    assert code == 0, errors[-4000:]
    for workers in (0, 4):
        assert seen_in(tmp_path / f"seen{workers}") == reference[FIRST_DRAW:], f"{workers} workers"


def test_the_ruined_media_would_have_been_noticed(ruined: Path, words_of: Words, tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        watch(words_of(ruined, tmp_path / "run", 1, 0), tmp_path / "seen")


def test_a_resumed_run_decodes_what_it_shows_and_nothing_else(
    killed: Path,
    mixture: Path,
    reference: Seen,
    words_of: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Media of rows that come again in the next epoch too: once for each draw, in the order of draws."""
    requested = []
    request = DECODER.request

    def counted(name: str, *args: Any) -> Reply:
        requested.append(Path(name).stem)
        return request(name, *args)

    monkeypatch.setattr(DECODER, "request", counted)
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    watch(words_of(mixture, output, 1, 0, train__resume=True), tmp_path / "seen")
    shown = [line["id"].rsplit("-", 1)[1] for line in reference[FIRST_DRAW:] if line["media"]]
    assert requested == shown
