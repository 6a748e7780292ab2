"""What can be said of speed and memory without running a model: three tables of docs/performance.md.

`python -m benchmarks.perf.estimates` prints them: the limit of the speed-up for released models, from operations alone
(a machine whose memory is never in the way), and the memory that `evs-train check` would estimate for recipes on one
GPU and on many. These are computed from shapes: no weights, no GPU, a minute. The third has such estimates beside the
peaks that `make bench` measured and left in its file.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.perf import scale, step
from benchmarks.perf.harness import Bench
from benchmarks.perf.limit import Cost, cost_of, tokens_of
from benchmarks.perf.machine import Machine
from benchmarks.perf.runs import ScriptedRun, Step, Workload, clip_facts, conversation, estimate, expected_peak
from benchmarks.perf.shapes import QWEN_2B, Shape, nemotron, qwen3_vl_8b, write_checkpoint
from evs_train.collate import Collator
from evs_train.inputs import Inputs
from evs_train.rates import Rates
from evs_train.recipe import load_recipe
from evs_train.samplers import Fixed

BY_OPERATIONS = Machine(flops=1.0, bytes=math.inf)
LORA = ("tuning.method=lora", "deepspeed=null")
WORKS = (
    Workload(QWEN_2B, "full", checkpointing=True),
    Workload(QWEN_2B, "lora", checkpointing=True),
    Workload(qwen3_vl_8b(), "full", checkpointing=True),
    Workload(qwen3_vl_8b(), "lora", checkpointing=True),
    Workload(nemotron(52), "lora", checkpointing=True),
)
FRAMES = (64, 128, 256)


@dataclass(frozen=True)
class Setting:
    """A recipe with its overrides, on so many GPUs."""

    name: str
    shape: Shape
    recipe: str
    overrides: tuple[str, ...]
    num_gpus: int
    frames: int


SETTINGS = (
    Setting("one 24 GB GPU", QWEN_2B, "qwen3_vl_8b", LORA, 1, 64),
    Setting("one 80 GB GPU", qwen3_vl_8b(), "qwen3_vl_8b", LORA, 1, 128),
    Setting("one 80 GB GPU", QWEN_2B, "qwen3_vl_8b", ("deepspeed=null",), 1, 128),
    Setting("8 GPUs of 80 GB", qwen3_vl_8b(), "qwen3_vl_8b", (), 8, 128),
    Setting("8 GPUs of 80 GB", nemotron(52), "nemotron", (), 8, 128),
    Setting("4 nodes of 8 GPUs", qwen3_vl_8b(), "qwen3_vl_8b", (), 32, 256),
)
MEMORY_RATES = (0.0, 0.75)
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    """Print the tables."""
    for table in (limits(), memories(), measured(RESULTS / "perf_cpu.json")):
        print("\n".join(table), end="\n\n")
    return 0


def limits() -> Iterator[str]:
    """Lines of Markdown: share of the vision side in a dense step, limit at each rate; layers are recomputed."""
    yield from _heading("model", "tuning", "frames", "vision, dense", *(f"rate {rate:g}" for rate in step.RATES[1:]))
    for work in WORKS:
        for frames in FRAMES:
            dense, *pruned = _costs(work, frames)
            gains = (f"{dense.seconds / one.seconds:.2f}" for one in pruned)
            yield _line(work.shape.name, work.tuning, frames, f"{dense.vision / dense.seconds:.0%}", *gains)


def _costs(work: Workload, frames: int) -> list[Cost]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("gpu", torch.device("cpu"), Path(folder))
        run = ScriptedRun(work, [Step((frames,), rate) for rate in step.RATES], bench)
        example = run.reader.blank(run.samples[0], run.facts)
        model = run.planned_model()
        plans = [run.collator.plan([example], number) for number in range(len(step.RATES))]
        tokens = [tokens_of([plan], run.family) for plan in plans]
        return [cost_of(model, run.family, one, BY_OPERATIONS, checkpointing=work.checkpointing) for one in tokens]


def memories() -> Iterator[str]:
    """Lines of Markdown: GiB on each GPU for one row, dense and pruned."""
    parts = ("weights", "gradients", "optimizer", "pixels", "activations", "in all")
    yield from _heading("setting", "model", "recipe", "frames", "rate", "patches", "tokens", *parts)
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            yield from _memories_of(setting, Path(folder))


def _memories_of(setting: Setting, folder: Path) -> Iterator[str]:
    write_checkpoint(setting.shape, folder / "model")
    (folder / "rows.json").write_text(json.dumps([conversation("0", folder)]), encoding="utf-8")
    words = [f"recipe={setting.recipe}", f"model.path={folder / 'model'}", f"data.rows={folder / 'rows.json'}"]
    recipe = load_recipe([*words, f"output_dir={folder / 'run'}", *setting.overrides])
    inputs = Inputs(recipe, setting.num_gpus)
    example = inputs.reader.blank(inputs.samples[0], [clip_facts(setting.frames, setting.shape.side)])
    model = inputs.planned_model()
    for rate in MEMORY_RATES:
        collator = Collator(Rates(Fixed(rate)), inputs.family.pad_token_id, inputs.family.merge_media)
        tokens = tokens_of([collator.plan([example], step=0)], inputs.family)
        one = estimate(inputs, model, tokens, setting.num_gpus)
        figures = (one.weights, one.gradients, one.optimizer, one.inputs, one.activations, one.total)
        shown = " ".join(f"`{word}`" for word in (setting.recipe, *setting.overrides))
        yield _line(
            setting.name, setting.shape.name, shown, setting.frames, f"{rate:g}", f"{one.num_patches:,}",
            f"{one.num_tokens:,}", *(f"{figure:.1f}" for figure in figures),
        )  # fmt: skip


def measured(path: Path) -> Iterator[str]:
    """Lines of Markdown: GiB as estimated now and as measured, of the longest clips of models in `step` and `scale`."""
    yield from _heading("model", "tuning", "frames", "rate", "estimated, GiB", "measured, GiB", "estimated / measured")
    results = json.loads(path.read_text(encoding="utf-8"))
    works = (*step.PLANS[results["size"]].works, scale.PLANS[results["size"]].work)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(results["size"], torch.device("cuda" if results["size"] == "gpu" else "cpu"), Path(folder))
        for name in ("step", "scale"):
            rows = [row for row in results["groups"][name]["rows"] if "peak_gib" in row]
            longest = {row["model"]: row["frames"] for row in sorted(rows, key=lambda row: row["frames"])}
            for row in rows:
                if row["frames"] == longest[row["model"]]:
                    work = next(one for one in works if (one.shape.name, one.tuning) == (row["model"], row["tuning"]))
                    said, found = _estimated(work, Step((row["frames"],), row["rate"]), bench), row["peak_gib"]
                    figures = (f"{row['rate']:g}", f"{said:.2f}", f"{found:.2f}", f"{said / found:.0%}")
                    yield _line(row["model"], row["tuning"], row["frames"], *figures)


def _estimated(work: Workload, one: Step, bench: Bench) -> float:
    """GiB that a step would be measured to take at most."""
    run = ScriptedRun(work, [one], bench)
    plan = run.collator.plan([run.reader.blank(run.samples[0], run.facts)], step=0)
    return expected_peak(estimate(run, run.planned_model(), tokens_of([plan], run.family)), bench.device)


def _heading(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield "|" + "---|" * len(names)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
