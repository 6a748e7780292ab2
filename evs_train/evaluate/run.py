"""One evaluation, from its options to its results: questions shared out, answers recorded, results written.

Under torchrun the videos are shared out among the processes and the answers gathered by the first, which gets the
numbers of a single process, timings apart. Answers that are recorded already are not asked for again.

Invariant: nothing is answered before it is known that the output folder belongs to this evaluation and that all models
sample videos alike. Cost: that of the answers; each process holds one model at a time.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from evs_train.errors import DataError, EvsTrainError, MediaError, RecipeError
from evs_train.evaluate.data import Question, data_fingerprint
from evs_train.evaluate.layouts import read_questions
from evs_train.evaluate.local import LocalModel
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.records import (
    Record,
    RecordFile,
    agree_on_settings,
    model_identity,
    read_records,
    run_of_export,
)
from evs_train.evaluate.report import RESULTS_FILE
from evs_train.evaluate.server import ServerModel
from evs_train.evaluate.summary import summarise
from evs_train.generation import PrunedModel, settings_of
from evs_train.pruners import Method, method_name
from evs_train.redaction import redact

_PACKAGES = ("evs-train", "torch", "transformers", "decord2", "av", "numpy")
_LONGEST_WAIT = timedelta(days=7)  # for the slowest process

Watch = Callable[[int, int], None]
Task = tuple[int, Question, list[float]]
"""A model's place, what it is asked, and at which rates."""
Skipped = dict[str, str]
"""Why each question was left out, by its id."""


class Answers(Protocol):
    """What answers questions: a checkpoint that is loaded here, or a server."""

    def answer(self, question: Question, rates: Sequence[float]) -> list[Record]: ...


def evaluate(options: EvalOptions, watch: Watch = lambda done, total: None) -> dict[str, Any] | None:
    """Answer all questions at all rates and write the results; None in processes other than the first.

    Args:
        options: of the evaluation.
        watch: called with the number of questions done, and of all that this process has to do.

    Raises:
        DataError, MediaError: questions cannot be read or asked.
        ModelError, RecipeError: a model cannot be loaded, or the output folder holds another evaluation.
    """
    with _processes() as (rank, world):
        questions, skipped = read_questions(options)
        folder = options.folder
        if rank == 0:
            agree_on_settings(folder, _settings(options, questions))
        _together()
        recorded = read_records(folder)
        _together()  # all have read before anyone writes
        mine = share(questions, rank, world)
        done = {(one.model, one.question, one.rate) for one in recorded}
        file, new = RecordFile(folder, rank), list[Record]()
        todo = [
            (place, question, missing)
            for place in range(len(options.sides))
            for question in mine
            if (missing := [rate for rate in options.all_rates if (place, question.id, rate) not in done])
        ]
        for count, (question, answers) in enumerate(_answered(todo, options), start=1):
            if isinstance(answers, list):
                file.append(answers)
                new += answers
            elif options.on_error == "raise":
                raise answers
            else:
                skipped[question.id] = answers.message
            watch(count, len(todo))
        file.close()
        shares = _gathered((new, skipped), rank, world)
    if rank:
        return None
    for answers, left_out in shares:
        recorded += answers
        skipped |= left_out
    return _written(folder, options, questions, recorded, skipped)


def _answered(todo: Sequence[Task], options: EvalOptions) -> Iterator[tuple[Question, list[Record] | EvsTrainError]]:
    """What is answered to each question, in order, or why it cannot be asked. One model is loaded at a time."""
    for place, tasks in groupby(todo, key=lambda task: task[0]):
        model = _load(place, options)

        def attempt(task: Task, model: Answers = model) -> list[Record] | EvsTrainError:
            try:
                return model.answer(task[1], task[2])
            except (DataError, MediaError) as error:
                return error

        mine = list(tasks)
        if options.server:
            with ThreadPoolExecutor(options.parallel) as pool:
                yield from zip([task[1] for task in mine], pool.map(attempt, mine), strict=True)
        else:
            yield from ((task[1], attempt(task)) for task in mine)
        del model, attempt
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _settings(options: EvalOptions, questions: Sequence[Question]) -> dict[str, Any]:
    """What records must have in common to stand in one folder."""
    shared: dict[str, Any] = {
        "data": data_fingerprint(questions),
        "num_questions": len(questions),
        "max_new_tokens": options.max_new_tokens,
    }
    if options.server:
        return shared | {"models": ["server"], "request": options.request}
    if options.methods:
        shared["methods"] = options.methods
    sampled = [_sampled(model, options) for model in options.model]
    for model, one in zip(options.model, sampled, strict=True):
        if one != sampled[0]:
            raise RecipeError(
                f"{options.model[0]} samples videos by {sampled[0]}, {model} by {one}",
                "say how, for both: fps=..., or num_frames=..., and the like",
            )
    return shared | {
        "models": [model_identity(model) for model in options.model],
        "sampling": sampled[0],
        "dtype": options.dtype,
        "positions": options.positions,
        "revision": options.revision,
    }


def _sampled(model: str, options: EvalOptions) -> dict[str, Any]:
    _, section = settings_of(model, options.sampled)
    keys = ("fps", "num_frames", "min_frames", "max_frames", "video_kwargs", "image_kwargs", "template_kwargs")
    return {key: getattr(section, key) for key in keys}


def _load(place: int, options: EvalOptions) -> Answers:
    if options.server:
        return ServerModel(options.server, options)
    device = options.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    checkpoint, method = options.sides[place]
    model = PrunedModel.load(
        checkpoint,
        method=method,
        dtype=options.dtype,
        device=device,
        positions=options.positions,
        data=options.sampled | {"frames_fps": options.frames_fps},
        attn_implementation=options.attn_implementation,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    return LocalModel(place, model, options)


def share(questions: Sequence[Question], rank: int, world: int) -> list[Question]:
    """The questions of a process: all of a video go to the same one, in their order."""
    place_of: dict[str, int] = {}
    for question in questions:
        place_of.setdefault(question.video, len(place_of))
    return [question for question in questions if place_of[question.video] % world == rank]


def _written(
    folder: Path, options: EvalOptions, questions: Sequence[Question], records: list[Record], skipped: Skipped
) -> dict[str, Any]:
    asked = [question for question in questions if question.id not in skipped]
    names = [name_of_side(model, method) for model, method in options.sides]
    kept = [one for one in records if one.question not in skipped]
    results: dict[str, Any] = {
        "version": 1,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": {
            "paths": options.data,
            "layout": options.layout,
            "fingerprint": data_fingerprint(questions),
            "num_questions": len(asked),
            "num_videos": len({question.video for question in asked}),
            "num_choices": sum(bool(question.choices) for question in asked),
        },
        "options": options.model_dump(),
        "environment": _environment(options),
        **summarise(kept, len(asked), names, options),
        "skipped": skipped,
    }
    for (path, method), found in zip(options.sides, results["models"], strict=True):
        found |= {"path": path, "method": method, "run": None if options.server else run_of_export(path)}
    results = redact(results)
    staged = folder / f"{RESULTS_FILE}.partial"
    staged.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    staged.rename(folder / RESULTS_FILE)
    return results


def name_of_model(model: str) -> str:
    """What a model is called in tables: the last two parts of its path, which tell runs apart, or its address."""
    return model if "://" in model else "/".join(Path(model).parts[-2:])


def name_of_side(model: str, method: Method | None) -> str:
    """What one side of a comparison is called: its model, and its method where one is named."""
    if method is None:
        return name_of_model(model)
    options = {} if isinstance(method, str) else {key: value for key, value in method.items() if key != "kind"}
    said = "".join(f" {key}={value}" for key, value in options.items())
    return f"{name_of_model(model)}, {method_name(method)}{said}"


def _environment(options: EvalOptions) -> dict[str, Any]:
    device = "server" if options.server else "cpu"
    if device == "cpu" and torch.cuda.is_available() and options.device != "cpu":
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; under torchrun they are connected (on the CPU: only records are exchanged)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield torch.distributed.get_rank(), world
    finally:
        torch.distributed.destroy_process_group()


def _together() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _gathered(own: Any, rank: int, world: int) -> list[Any]:
    if world == 1:
        return [own]
    shares: list[Any] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(own, shares)
    return shares or []
