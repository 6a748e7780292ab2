"""What batches of a token budget gain over a fixed number of rows, where videos differ much in length.

`python -m benchmarks.batches` writes `benchmarks/results/batches.json` and prints a table. Nothing is trained: batches
are planned for rows whose durations follow a log-normal distribution, and their sizes summed up, so the figures are
exact and the same on every machine, but for the seconds that planning takes.

*efficiency* is the share of useful tokens in what the ranks compute or wait for: in each round of micro-batches, every
rank takes as long as the one with the most tokens, padding included. *largest* is the largest micro-batch, which memory
must hold. A fixed number of rows is shown at several numbers; the budget has the size of the longest row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from evs_train.data.budget import Budget, BudgetBatches
from evs_train.data.lengths import Length, PlannedRow
from evs_train.data.order import DrawOrder
from evs_train.data.schedule import FixedBatches, Schedule
from evs_train.rates import Rates
from evs_train.samplers import build_sampler

RESULTS = Path(__file__).parent / "results" / "batches.json"
NUM_ROWS = 20_000
MEDIAN_SECONDS, SIGMA = 30.0, 1.2  # half of the videos are between 13 and 67 s, one in a hundred is above 490 s
FPS, FRAMES_PER_UNIT, MAX_FRAMES, TOKENS_PER_UNIT, TEXT_TOKENS = 2.0, 2, 768, 128, 200
SHARE_OF_TEXT = 0.1
RATES: tuple[Any, ...] = (0.0, 0.75, {"kind": "uniform", "min": 0.0, "max": 0.9})
RANKS, PER_STEP = 8, 16
FIXED = (1, 2, 4)


@dataclass(frozen=True)
class Sizes:
    """Tokens of each micro-batch: useful ones, and those that are computed."""

    useful: list[int]
    computed: list[int]

    def figures(self) -> dict[str, float]:
        rounds = [self.computed[first : first + RANKS] for first in range(0, len(self.computed), RANKS)]
        waited = sum(max(one) * len(one) for one in rounds)
        return {
            "padding": 1 - sum(self.useful) / sum(self.computed),
            "imbalance": sum(max(one) * len(one) / sum(one) - 1 for one in rounds) / len(rounds),
            "efficiency": sum(self.useful) / waited,
            "mean": sum(self.computed) / len(self.computed),
            "largest": max(self.computed),
        }


def rows(seed: int = 0) -> list[PlannedRow]:
    """Rows of one video each, and some of text alone."""
    generator = np.random.default_rng(seed)
    seconds = generator.lognormal(np.log(MEDIAN_SECONDS), SIGMA, NUM_ROWS)
    frames = np.clip(seconds * FPS, 4, MAX_FRAMES).astype(int)
    texts = generator.random(NUM_ROWS) < SHARE_OF_TEXT
    planned = []
    for number, (count, is_text) in enumerate(zip(frames.tolist(), texts.tolist(), strict=True)):
        units = () if is_text else (count // FRAMES_PER_UNIT,)
        video = sum(units) * TOKENS_PER_UNIT
        length = Length(TEXT_TOKENS + video, 50, 0, units, (TOKENS_PER_UNIT,) * len(units))
        planned.append(PlannedRow(str(number), f"row {number}", (length,), is_whole=True))
    return planned


def sizes(schedule: Schedule, planned: Sequence[PlannedRow], order: DrawOrder, rates: Rates, *, packing: bool) -> Sizes:
    """Sum up a schedule, whichever it is, from the rows it shows."""
    useful, computed = [], []
    for number in range(schedule.num_steps * schedule.per_step):
        batch = schedule.batch(number)
        lengths = [
            planned[order.row(slot.draw, slot.attempt)].full.retained_tokens(
                lambda units, draw=slot.draw: rates.of_video(draw, batch.step, units)  # noqa: B023 (called at once)
            )
            for slot in batch.slots
        ]
        useful.append(sum(lengths))
        computed.append(sum(lengths) if packing else len(lengths) * max(lengths))
    return Sizes(useful, computed)


def main() -> None:
    """Plan, sum up, print and write."""
    planned = rows()
    order = DrawOrder(NUM_ROWS, seed=0)
    longest = max(row.full.num_tokens for row in planned)
    results: list[dict[str, Any]] = []
    for rate in RATES:
        rates = Rates(build_sampler(rate))
        budget_tokens = longest if not isinstance(rate, float) else int(longest * (1 - rate)) + TEXT_TOKENS
        for packing in (False, True):
            for size in FIXED:
                schedule: Schedule = FixedBatches(NUM_ROWS // (size * PER_STEP), PER_STEP, size)
                found = sizes(schedule, planned, order, rates, packing=packing).figures()
                results.append({"rate": rate, "packing": packing, "batches": f"{size} rows", **found})
            begun = time.perf_counter()
            bound = BudgetBatches(
                planned, order, rates, Budget(budget_tokens, packing=packing),
                per_step=PER_STEP, at_once=RANKS, num_draws=NUM_ROWS,
            )  # fmt: skip
            seconds = time.perf_counter() - begun
            found = sizes(bound, planned, order, rates, packing=packing).figures()
            name = f"budget {budget_tokens}"
            found["planning_us_per_row"] = seconds / NUM_ROWS * 1e6
            results.append({"rate": rate, "packing": packing, "batches": name, **found})
    _print(results)
    settings = {
        "rows": NUM_ROWS, "median_seconds": MEDIAN_SECONDS, "sigma": SIGMA, "fps": FPS, "max_frames": MAX_FRAMES,
        "tokens_per_unit": TOKENS_PER_UNIT, "text_tokens": TEXT_TOKENS, "share_of_text": SHARE_OF_TEXT, "ranks": RANKS,
        "micro_batches_per_step": PER_STEP,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    written = {"environment": environment(["numpy"]), "settings": settings, "results": results}
    RESULTS.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _print(results: Sequence[dict[str, Any]]) -> None:
    print("rate      rows      batches          padding  imbalance  efficiency     mean  largest  planning, us/row")
    for one in results:
        rate = f"{one['rate']:g}" if isinstance(one["rate"], float) else "0..0.9"
        joined = "packed" if one["packing"] else "padded"
        planning = f"{one['planning_us_per_row']:.0f}" if "planning_us_per_row" in one else ""
        print(
            f"{rate:9} {joined:9} {one['batches']:15} {one['padding']:8.1%} {one['imbalance']:10.1%} "
            f"{one['efficiency']:11.1%} {one['mean']:8.0f} {one['largest']:8d}  {planning}"
        )


if __name__ == "__main__":
    # Without options; but --help must not write over the results.
    argparse.ArgumentParser(description="Plans batches, and writes benchmarks/results/batches.json.").parse_args()
    main()
