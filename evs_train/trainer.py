"""The training loop: transformers' Trainer with a fixed draw order, an exact token-weighted loss, and EVS metrics.

What differs from the plain Trainer, and why:
- the loader reads the micro-batches of `data/schedule.py` in their order, so rows and rates do not depend on the number
  of processes;
- the loss is the sum over supervised tokens divided by their number over all ranks and micro-batches. The model is
  given no labels: it computes logits of those tokens only (`prune.py`), and the loss is taken here;
- a step may make further passes over its media (`objective`), whose losses are summed before the one backward;
- learning rates by part, and metrics that say what pruning did (`metrics.py`);
- bad samples are counted over all ranks before a step's batches are used, so that all ranks end in the same step. The
  same sum says whether any rank was told to end by a signal: then all save, and end;
- a step whose loss or gradient is not finite on any rank is not taken on any (`finite.py`);
- checkpoints are committed whole (`saving.py`);
- a resumed run takes from its checkpoint what was counted since the last log, too, and intervals and optimizer options
  from the recipe, where the plain Trainer takes the checkpoint's (`restore.py`).

Invariant: one optimizer step's loss and gradient are the same for any split of its draws over ranks and micro-batches,
up to rounding, and those of the loss over all logits. Cost over the plain Trainer: what `tally.py` counts, and one
all-reduce of four numbers per step that keeps count of bad samples over all ranks (where transformers has waited for
the device already, to move the batch). Without DeepSpeed, which does so itself, the host waits for the gradient's norm
before it steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainingArguments

from evs_train.beginning import AttachHook, BeginCounts
from evs_train.collate import BatchPlan
from evs_train.commit import Checkpoints
from evs_train.config import ObjectiveSection, OptimSection
from evs_train.data.quarantine import BadSample, Found, NoneLeftError, Quarantine
from evs_train.errors import PreemptedError
from evs_train.finite import FiniteGuard
from evs_train.metrics import metrics_of
from evs_train.models.tuning import parameter_groups
from evs_train.objectives import cross_entropies, teacher_kl
from evs_train.preemption import Preemption, outlive_signals
from evs_train.prune import EvsHook, Pass
from evs_train.restore import SinceLog, num_generators, read_counts, seed_anew, set_options, write_counts
from evs_train.saving import SavingTrainer
from evs_train.tally import Tally


class UptrainTrainer(SavingTrainer):
    """Trainer of a model whose batches are pruned by `hook`. See the module's docstring for what differs."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        hook: EvsHook,
        optim: OptimSection,
        objective: ObjectiveSection,
        quarantine: Quarantine,
        checkpoints: Checkpoints,
        keep_checkpoints: int,
        finite: FiniteGuard,
        args: TrainingArguments,
        **kwargs: Any,
    ) -> None:
        super().__init__(checkpoints=checkpoints, keep_checkpoints=keep_checkpoints, args=args, **kwargs)
        self.quarantine = quarantine
        self.finite = finite
        self.preemption = Preemption()
        self.model_accepts_loss_kwargs = True
        self.hook = hook
        self.optim_section = optim
        self.objective = objective
        names = [f"pass_{name}" for name in (*objective.further_passes, "drawn")] if objective.further_passes else []
        self.tally = Tally([*names, "teacher_kl"] if objective.kind == "teacher" else names, hides=hook.pruner.hides)
        self.losses: list[float] = []
        self.seconds = 0.0
        self._last_log = 0.0  # 0: the clock starts with the first batch, not with loading
        hook.autocast = self.accelerator.autocast
        self.add_callback(AttachHook(hook))
        self._counts = BeginCounts(quarantine, finite)
        self.add_callback(self._counts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.preemption, self.finite.watching(self.model, self.args.device):
            return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # An item of the data set is a micro-batch, whatever number of rows it has.
        loader: Any = self._get_dataloader(
            self.train_dataset, "Training", batch_size=1, sampler_fn=self._get_train_sampler, is_training=True
        )
        plain: DataLoader[Any] = loader.base_dataloader  # inside accelerate's
        outlive_signals(plain)
        return loader  # type: ignore[no-any-return]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = list(parameter_groups(model, self.hook.family, self.optim_section))
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        begun: tuple[int, int] = super()._init_training_state(max_steps, *rest)
        self.state.compute_steps(self.args, max_steps)  # of logs and checkpoints; the checkpoint's own stand there
        return begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):  # a DeepSpeed file may name another
            groups = parameter_groups(self.model, self.hook.family, self.optim_section)
            set_options(self.optimizer, self.lr_scheduler, groups, (self.args.adam_beta1, self.args.adam_beta2))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        counts = SinceLog(
            self._globalstep_last_logged,
            self._tr_loss.item(),
            time.perf_counter() - self._last_log,
            self.tally.sums(),
        )
        write_counts(Path(output_dir), self.args.process_index, counts)

    def _load_rng_state(self, checkpoint: str) -> None:
        """Random numbers and counts, before the first step and behind all that draws or counts without training."""
        folder, rank, num_ranks = Path(checkpoint), self.args.process_index, self.args.world_size
        if num_generators(folder) == num_ranks:
            super()._load_rng_state(checkpoint)
        else:
            seed_anew(self.args.seed, self.state.global_step, rank)
        counts = read_counts(folder, rank, num_ranks)
        self._globalstep_last_logged = counts.last_log
        self._tr_loss += counts.loss
        self._total_loss_scalar -= counts.loss  # which is of this process's steps only
        self._last_log -= counts.seconds
        self.tally.add_sums(counts.sums, self.args.device)
        self._before_step = self._tr_loss.clone(), self.tally.state()  # if this step is left out, these stay

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._last_log = self._last_log or time.perf_counter()
        with self.hook.stopwatch.section("data", device=False):
            batches = list(islice(epoch_iterator, num_batches))
            told_to_end = self._judge(batches)
        if told_to_end:
            self._save_and_end()
        with self.hook.stopwatch.section("data", device=False):
            self._before_step = self._tr_loss.clone(), self.tally.state()
            return super().get_batch_samples(iter(batches), num_batches, device)

    def _judge(self, batches: Sequence[dict[str, Any]]) -> bool:
        """Count the bad samples of one step over all ranks, and end the run where there are too many.

        Returns:
            Whether some rank was told to end by a signal.

        Raises:
            BudgetError: on every rank in the same step.
            EvsTrainError: `data.on_error` is `raise` and this rank met a bad sample; torchrun ends the others.
        """
        met: list[tuple[Sequence[BadSample], str | None]] = []  # of each draw, and what it shows instead
        none_left = False
        for batch in batches:
            if "error" in batch:
                if not isinstance(batch["error"], NoneLeftError):
                    raise batch["error"]
                none_left = True
                met += batch["bad"]
            else:
                met += zip(batch["plan"].bad, batch["plan"].sample_ids, strict=True)
        lines = [line for bad, shown in met for line in self.quarantine.lines_of(bad, shown)]
        # A process alone has nothing to reduce, and waits for no device.
        device = self.args.device if self.accelerator.num_processes > 1 else torch.device("cpu")
        mine = torch.tensor(
            [len(met), len(lines), none_left, self.preemption.requested], dtype=torch.int64, device=device
        )
        num_draws, num_lines, none_left, num_told = self.accelerator.reduce(mine, "sum").tolist()
        everyones = gather_object(lines) if num_lines else []
        self.quarantine.add(Found(num_draws, everyones, none_left), writes=self.is_world_process_zero())
        return bool(num_told)

    def _save_and_end(self) -> None:
        """Save the last step that was done, if it is not saved yet. Raises PreemptedError on every rank."""
        step = self.state.global_step
        if step > self._counts.saved_step:
            self.control.should_save = True  # with what was counted since the last log
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, None)
        raise PreemptedError(
            f"told to end by a signal; {f'step {step} is saved' if step else 'no step was done yet'} in "
            f"{self.args.output_dir}",
            "go on with train.resume=true" if step else "start it again",
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip, and see to it that a gradient which is not finite is not stepped on, by any rank.

        DeepSpeed has stepped by now, or has found the norm not finite itself and skipped. Otherwise an optimizer
        without gradients does nothing. In both cases the scheduler does not go on.
        """
        norm = super()._clip_grad_norm(model)
        optimizer: Any = self.optimizer
        if not self.is_deepspeed_enabled:
            optimizer._is_overflow = not math.isfinite(norm)  # what accelerate sets where it skips
            if optimizer.step_was_skipped:
                model.zero_grad(set_to_none=True)
        if optimizer.step_was_skipped:
            self._leave_out_step()
        self.finite.step_is_over()
        return norm

    def _leave_out_step(self) -> None:
        """Record the step, and take what it counted out of what is logged: a NaN would stay there."""
        step, rank = self.state.global_step, self.accelerator.process_index
        loss, counts = self._before_step
        self._tr_loss.copy_(loss)
        self.tally.restore(counts)
        self._globalstep_last_logged += 1  # Trainer divides by the steps since
        self._initial_global_step += 1
        lines = gather_object(self.finite.blamed(step, rank))
        lines = lines or gather_object(self.finite.blamed(step, rank, everything=True))
        self.finite.skip(lines, self.state.max_steps, writes=self.is_world_process_zero())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert num_items_in_batch is not None  # every batch has labels
        plan: BatchPlan = inputs["plan"]
        outputs = model(**inputs)
        self.tally.add(plan, self.hook.hidden)
        further, passes = self.objective.further_passes, self.hook.passes
        loss = self._loss_of(plan, outputs, "pass_drawn" if further else None)
        if self.objective.kind == "teacher":
            loss = loss + self.objective.teacher_weight * self._kl_to(passes[0], outputs)
        elif further:
            for rate, one in zip(further, passes, strict=True):
                loss = loss + self._loss_of(one.plan, one.outputs, f"pass_{rate}")
            loss = loss / (1 + len(passes))
        self.hook.passes = []  # their logits need not wait for the next step
        loss = loss * self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over processes
        loss = self.finite.checked(loss, plan)
        return (loss, outputs) if return_outputs else loss

    def _loss_of(self, plan: BatchPlan, outputs: Any, name: str | None) -> Tensor:
        """The loss of a pass that is trained on, summed over its supervised tokens; counted as `name`."""
        losses = cross_entropies(outputs["logits"][0], self.hook.targets)
        self.tally.add_pass(plan, losses, name)
        loss = losses.sum()
        if outputs.get("aux_loss") is not None:  # of the routers of experts, where the checkpoint's config asks for it
            weight = self.hook.model.config.get_text_config().router_aux_loss_coef
            loss = loss + weight * sum(plan.num_supervised) * outputs["aux_loss"]
        return loss

    def _kl_to(self, teacher: Pass, outputs: Any) -> Tensor:
        """KL to the teacher's prediction, summed over supervised tokens."""
        expected = teacher.outputs["logits"][0]  # (S, V)
        kl = teacher_kl(outputs["logits"][0], expected, self.objective.temperature)
        self.tally.add_computed(teacher.plan)
        self.tally.add_sum("pass_teacher", cross_entropies(expected, self.hook.targets).sum())
        self.tally.add_sum("teacher_kl", kl)
        return kl

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._metrics()}
            self.losses.append(logs["loss"])
        super().log(logs, start_time)

    def _metrics(self) -> dict[str, float]:
        """Metrics since the last log, over all ranks (times: of this rank). Called on every rank."""
        now = time.perf_counter()
        elapsed, self._last_log = now - self._last_log, now
        self.seconds += elapsed
        sums = self.tally.collect(lambda t: self.accelerator.reduce(t, "sum"), self.args.device)
        metrics = metrics_of(sums, self.hook.stopwatch.collect(), elapsed)
        metrics |= self.quarantine.metrics() | self.finite.metrics()
        if self.hook.cache is not None:
            metrics |= self.hook.cache.metrics(lambda t: self.accelerator.reduce(t, "sum"), self.args.device)
        if self.lr_scheduler is not None and self.optimizer is not None:
            for group in self.optimizer.param_groups:
                metrics[f"lr/{group['name'].removesuffix('_no_decay')}"] = float(group["lr"])
        return metrics
