"""The proof from its world to its results: renders, trains the base, trains and scores each arm, one file an arm.

Invariant: all arms of a folder start from the same base, read the same rows in the same order (by seed), take equally
many steps, and answer the same held-out questions, whose fingerprint stands in every result. An arm whose result is
there is not run again, so a study may be stopped at any time and goes on where it was (the base from its newest
checkpoint, an arm from its start). Cost: plan.py says how much each size runs; docs/proof.md how long it took.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof import world
from benchmarks.proof.base import build_base
from benchmarks.proof.plan import ARMS, Arm, Size
from benchmarks.proof.runs import ExampleCache, StudyRun
from benchmarks.proof.scoring import answers
from evs_train.checkpoint import read_record
from evs_train.config import Recipe
from evs_train.errors import DataError
from evs_train.export import export_run
from evs_train.inputs import Inputs
from evs_train.models.loading import load_weights
from evs_train.recipe import load_recipe

HERE = Path(__file__).parent
Say = Callable[[str], None]
LATER_LR = 1e-3  # half of the first


class Study:
    """One folder of results.

    Args:
        folder: holds world, base, arms and results.
        size: how much is run.
        say: is told what is done.
    """

    def __init__(self, folder: Path, size: Size, say: Say = print) -> None:
        self.folder, self.size, self.say = folder, size, say
        self.cache = folder / "prepared"
        self.results = folder / "results"

    def run(self) -> None:
        """Do what is not done yet."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.results.mkdir(parents=True, exist_ok=True)
        self.fingerprint = world.write_world(
            self.folder / "world", num_train=self.size.num_train, num_heldout=self.size.num_heldout, progress=self.say
        )
        self.say(f"held-out split {self.fingerprint}")
        base = self.train_base()
        for name, seed in self.plan():
            file = self.results / f"{_slug(name)}-{seed}.json"
            if file.is_file():
                self._check_same_study(file)
                self.say(f"{name}, seed {seed}: done before")
                continue
            result = self.run_arm(base, name, ARMS[name], seed)
            file.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            file.with_suffix(".tmp").rename(file)

    def plan(self) -> Iterator[tuple[str, int]]:
        """Arms and seeds, seed by seed, so that a study that is stopped can compare arms."""
        for seed in self.size.seeds:
            for name in self.size.arms:
                if ARMS[name].overrides is not None or seed == self.size.seeds[0]:
                    yield name, seed

    def train_base(self) -> Path:
        """The base checkpoint, trained dense from random weights, and then again with the learning rate warmed up anew.

        After the first time motion was still being learned, so arms that went on dense gained what had nothing to do
        with pruning.
        """
        base = build_base(self.folder / "random", width=self.size.width)
        for number, steps in enumerate(self.size.base_steps):
            output = self.folder / f"base-{number}"
            words = ["recipe=" + str(HERE / "base.yaml"), f"model.path={base}", f"train.steps={steps}"]
            base = output / "export"
            if (base / "config.json").is_file():
                continue
            if any(output.glob("checkpoint-*")):
                words.append("train.resume=true")
            if number:
                words.append(f"optim.lr={LATER_LR}")
            self.say(f"base: {steps} steps")
            self._run_of(words, output).train()
            base = export_run(output).path
        return base

    def run_arm(self, base: Path, name: str, arm: Arm, seed: int) -> dict[str, Any]:
        """Train one arm and let it answer; the content of its result file."""
        result: dict[str, Any] = {"arm": name, "seed": seed, "fingerprint": self.fingerprint}
        output = self.folder / "arms" / f"{_slug(name)}-{seed}"
        words = ["recipe=" + str(HERE / "arm.yaml"), f"model.path={base}", f"evs.method={arm.method}"]
        if arm.overrides is None:
            self.say(f"{name}: scoring the base")
            recipe = self._recipe(words, output)
            model = load_weights(recipe.model, Inputs(recipe).family.config, torch.float32)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        else:
            self.say(f"{name}, seed {seed}: {self.size.arm_steps} steps")
            words += [f"train.steps={self.size.arm_steps}", f"seed={seed}", *arm.overrides]
            run = self._run_of(words, output)
            begin = time.process_time()
            summary = run.train()
            model = run.trained
            result |= {
                "steps": summary.steps,
                "seconds_per_step": summary.seconds / summary.steps,
                "cpu_seconds_per_step": (time.process_time() - begin) / summary.steps,
                "tokens_per_step": summary.tokens_per_second * summary.seconds / summary.steps,
                "mean_rate": summary.mean_rate,
                "versions": read_record(output)["versions"],
            }
            shutil.rmtree(output / "final")  # the answers are what is kept
        heldout = Inputs(self._recipe([*words, f"data.rows={self.folder / 'world' / 'heldout.jsonl'}"], output))
        rows = ExampleCache(heldout.reader, self.cache, self.say)
        ids = [sample.id.split("-") for sample in heldout.samples]
        found = answers(heldout.family, model, rows, self.size.rates, heldout.pruner)
        return result | {"questions": list(world.FACTS), "cameras": [camera for _, camera, _ in ids], "right": found}

    def _check_same_study(self, file: Path) -> None:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["fingerprint"] != self.fingerprint:
            raise DataError(
                f"{file}: comes from another world", "its arms cannot be compared with new ones: name another folder"
            )
        if result.get("steps", self.size.arm_steps) != self.size.arm_steps:
            raise DataError(
                f"{file}: took {result['steps']} steps instead of {self.size.arm_steps}",
                "its arms cannot be compared with new ones: name another folder",
            )

    def _run_of(self, words: list[str], output: Path) -> StudyRun:
        return StudyRun(self._recipe(words, output), self.cache, self.say)

    def _recipe(self, words: list[str], output: Path) -> Recipe:
        rows = f"data.rows={self.folder / 'world' / 'train.jsonl'}"
        size = f"train.batch_size={self.size.batch}"
        recipe = load_recipe([words[0], rows, size, f"output_dir={output}", *words[1:]])
        rates = {part: lr / self.size.width for part, lr in recipe.optim.lr_by_part.items()}
        optim = recipe.optim.model_copy(update={"lr": recipe.optim.lr / self.size.width, "lr_by_part": rates})
        return recipe.model_copy(update={"optim": optim})


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
