"""Steps whose loss or gradient is not finite: found, not taken, traced to their samples, and counted.

Invariant: weights, moments and the learning rate never see a number that is not finite. Where a rank's loss is NaN or
infinite, its gradient is made NaN; a NaN survives every sum over ranks and micro-batches; so the norm by which the
gradient is clipped says it to all ranks alike, and no further collective is needed. What the trainer then leaves out is
the whole step, on all ranks.

Whose samples it were is seen before gradients are summed: each parameter's gradient of each micro-batch is added up to
one number by a hook, and the numbers are looked at when a step has gone wrong.

Cost: one reduction per trained parameter and micro-batch, and nothing that waits for the device, but for the norm
itself, which the trainer must read before it may step. This module knows no optimizer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evs_train.collate import BatchPlan
from evs_train.errors import NotFiniteError, RecipeError

NOT_FINITE_FILE = "not_finite.jsonl"
Where = Literal["loss", "gradient", "sum"]


class FiniteGuard:
    """Watches the losses and gradients of one rank, and counts the steps that all ranks left out.

    Attributes:
        path: of the file that lists the samples.
        num_skipped: steps left out since the run began, those of earlier processes included.
    """

    def __init__(self, path: Path, max_skipped: int) -> None:
        self.path = path
        self.max_skipped = max_skipped
        self.num_skipped = 0
        self._sums = torch.empty(0)  # (P,) of the gradient of each trained parameter in the micro-batch that is open
        self._open: tuple[BatchPlan, Tensor] | None = None
        self._closed: list[tuple[BatchPlan, Tensor]] = []  # (2,) bool: loss and gradient are finite

    @contextlib.contextmanager
    def watching(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Hook the trained parameters of `model`, whose gradients come on `device`."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums = torch.zeros(len(trained), device=device)
        handles = [p.register_hook(_adding_up(place)) for p, place in zip(trained, self._sums, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, step: int, *, writes: bool) -> None:
        """Start at optimizer step `step`: what is listed of later steps, which will be trained again, does not count.

        `writes`: this process also removes it from the file.
        """
        lines: list[dict[str, Any]] = []
        if self.path.exists():
            written = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            lines = [line for line in written if line["step"] < step]
            if writes and len(lines) < len(written):
                draft = self.path.with_suffix(".draft")
                draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                os.replace(draft, self.path)
        self.num_skipped = len({line["step"] for line in lines})
        self._open, self._closed = None, []

    def checked(self, loss: Tensor, plan: BatchPlan) -> Tensor:
        """The loss of a micro-batch, for backward: as it is to the bit if it is finite, or else NaN with its gradient.

        An infinite loss may have a finite gradient: that of a sum does not know the sum.
        """
        self._close()
        detached = loss.detach()
        self._open = (plan, detached)
        return loss * (1 + 0 * detached)  # 0 * inf is NaN

    def _close(self) -> None:
        if self._open is not None:
            plan, loss = self._open
            self._closed.append((plan, torch.stack([loss.isfinite(), self._sums.isfinite().all()])))
            self._sums.zero_()
            self._open = None

    def step_is_over(self) -> None:
        """Forget the micro-batches of the step."""
        self._open, self._closed = None, []
        self._sums.zero_()

    def blamed(self, step: int, rank: int, *, everything: bool = False) -> list[dict[str, Any]]:
        """Lines about the micro-batches of this rank in which a number was not finite, or all of them. Waits."""
        self._close()
        lines = []
        for number, (plan, finite) in enumerate(self._closed):
            loss, gradient = finite.tolist()
            if everything or not (loss and gradient):
                where: Where = "loss" if not loss else "gradient" if not gradient else "sum"
                lines.append(
                    {
                        "step": step,
                        "rank": rank,
                        "micro_batch": number,
                        "where": where,
                        "draws": list(plan.draws),
                        "samples": list(plan.sample_ids),
                    }
                )
        return lines

    def skip(self, lines: list[dict[str, Any]], num_steps: int, *, writes: bool) -> None:
        """Count and record a step that was left out, from the lines of all ranks.

        Args:
            lines: see `blamed`.
            num_steps: of the run.
            writes: this process writes the file.

        Raises:
            NotFiniteError: too many; or no step of the run was taken.
        """
        self.num_skipped += 1
        if writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        if self.num_skipped > self.max_skipped or self.num_skipped == num_steps:
            samples = ", ".join(sample for line in lines for sample in line["samples"])
            raise NotFiniteError(
                f"step {lines[0]['step']}: loss or gradient is not finite ({lines[0]['where']}; samples {samples}); "
                f"{self.num_skipped} steps were skipped for that; listed in {self.path}",
                "the newest checkpoint is of finite steps only: look at these samples, lower optim.lr, or raise "
                "train.max_skipped_steps",
            )

    def metrics(self) -> dict[str, float]:
        """Steps left out since the run began."""
        return {"train/skipped_steps": float(self.num_skipped)}


def have_deepspeed_check(optimizer: Any) -> None:
    """Make DeepSpeed leave out steps whose gradient norm is not finite, whatever its file says of `bf16`.

    Stage 3 always does (read: `DeepSpeedZeroOptimizer_Stage3.step`), stages 1 and 2 do if `check_grad_overflow` is set.
    Its other optimizers step on any gradient, or were not looked at.

    Args:
        optimizer: DeepSpeed's own.

    Raises:
        RecipeError: it is of another kind.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: PLC0415 (only where it is used)
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: PLC0415

    if type(optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        raise RecipeError(
            f"deepspeed: the file leads to {type(optimizer).__name__}, which may step on a gradient that is not finite",
            "set zero_optimization.stage to 1, 2 or 3, without ZenFlow or SuperOffload",
        )
    optimizer.check_grad_overflow = True


def _adding_up(place: Tensor) -> Any:
    """A hook that writes the sum of a gradient to `place`, a scalar. No sum hides a NaN or an infinity."""

    def hook(gradient: Tensor) -> None:
        torch.sum(gradient, dim=tuple(range(gradient.dim())), dtype=torch.float32, out=place)

    return hook
