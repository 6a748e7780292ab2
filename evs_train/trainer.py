"""The training loop: transformers' Trainer with a fixed draw order, an exact token-weighted loss, and EVS metrics.

What differs from the plain Trainer, and why:
- the loader reads the micro-batches of `data/schedule.py` in their order, so rows and rates do not depend on the number
  of processes;
- the loss is the sum over supervised tokens divided by their number over all ranks and micro-batches. (transformers'
  Qwen classes say `accepts_loss_kwargs = False`, which would average averages; their forward does take the count.)
- learning rates by part, and metrics that say what pruning did;
- bad samples are counted over all ranks before a step's batches are used, so that all ranks end in the same step.

Invariant: one optimizer step's loss and gradient are the same for any split of its draws over ranks and micro-batches,
up to rounding. Cost over the plain Trainer: one gather of supervised logits without gradient per micro-batch for the
loss by rate, one all-reduce of a few numbers per log, and one of three numbers per step that keeps count of bad samples
over all ranks (where transformers has waited for the device already, to move the batch).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train.collate import BatchPlan
from evs_train.config import OptimSection
from evs_train.data.quarantine import BadSample, Found, NoneLeftError, Quarantine
from evs_train.data.template import IGNORE_INDEX
from evs_train.models.tuning import parameter_groups
from evs_train.prune import EvsHook

RATE_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Upper ends (inclusive) of the buckets in which the loss is reported; the first is for videos that stayed dense."""
_NO_VIDEO = len(RATE_BUCKETS)  # bucket of rows that have no video
_NUM_BUCKETS = len(RATE_BUCKETS) + 1

BACKENDS = ("decord", "pyav", "images")
_COUNTS = (
    "rows",
    "shortened",
    "rate",
    "video_rows",
    "rate_applied",
    "tokens",
    "padding",
    "supervised",
    "video_tokens_before",
    "video_tokens_after",
    *(f"decoded/{backend}" for backend in BACKENDS),
)


def bucket_of(applied_rate: float | None) -> int:
    """Bucket of a row that lost this share of its video tokens, or has no video (None)."""
    if applied_rate is None:
        return _NO_VIDEO
    return next(index for index, end in enumerate(RATE_BUCKETS) if applied_rate <= end)


def bucket_name(index: int) -> str:
    """Metric name of a bucket, such as `loss/rate_0.5-0.75`."""
    if index == _NO_VIDEO:
        return "loss/no_video"
    return "loss/rate_0" if index == 0 else f"loss/rate_{RATE_BUCKETS[index - 1]:g}-{RATE_BUCKETS[index]:g}"


class Tally:
    """Sums since the last log, and since the start: what was pruned, and the loss by rate. Local to a rank."""

    def __init__(self) -> None:
        self.total: dict[str, float] = dict.fromkeys(_COUNTS, 0.0)
        self._counts = dict.fromkeys(_COUNTS, 0.0)
        self._bucket_tokens = [0.0] * _NUM_BUCKETS
        self._bucket_loss: Tensor | None = None

    def add(self, plan: BatchPlan, logits: Tensor, labels: Tensor) -> None:
        """Count one micro-batch. `logits` (B, L, V) and `labels` (B, L) are those of the pruned batch."""
        applied = plan.applied_rates
        seen = {
            "rows": len(plan.draws),
            "shortened": sum(share < 1 for share in plan.shares),
            "rate": sum(plan.rates),
            "video_rows": sum(rate is not None for rate in applied),
            "rate_applied": sum(rate for rate in applied if rate is not None),
            "tokens": sum(plan.num_tokens),
            "padding": plan.shape[0] * plan.shape[1] - sum(plan.num_tokens),
            "supervised": sum(plan.num_supervised),
            "video_tokens_before": plan.video_tokens_before,
            "video_tokens_after": plan.video_tokens_after,
            **{f"decoded/{backend}": plan.decoded_by.count(backend) for backend in BACKENDS},
        }
        for name, value in seen.items():
            self._counts[name] += value
        buckets = [bucket_of(rate) for rate in applied]
        for bucket, count in zip(buckets, plan.num_supervised, strict=True):
            self._bucket_tokens[bucket] += count
        if self._bucket_loss is None:
            self._bucket_loss = torch.zeros(_NUM_BUCKETS, device=logits.device, dtype=torch.float64)
        # The positions are found by a sort, not by a boolean mask: their number is known, so nothing synchronises.
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()  # of the token that each place predicts
        places = torch.argsort((targets == IGNORE_INDEX).int(), stable=True)[: sum(plan.num_supervised)]
        predicted = logits.detach().flatten(0, 1)[places]  # (B, L, V) -> (S, V); the flattening is a view
        losses = F.cross_entropy(predicted.float(), targets[places], reduction="none")
        of_token = torch.tensor(buckets).repeat_interleave(torch.tensor(plan.num_supervised))
        self._bucket_loss.index_add_(0, of_token.to(logits.device, non_blocking=True), losses.double())

    def collect(self, reduce: Any, device: torch.device) -> dict[str, float]:
        """Counts and bucket losses since the last call, summed over ranks by `reduce(tensor)`."""
        losses = torch.zeros(_NUM_BUCKETS, dtype=torch.float64) if self._bucket_loss is None else self._bucket_loss
        counts = torch.tensor([*self._counts.values(), *self._bucket_tokens], dtype=torch.float64)
        summed = reduce(torch.cat([counts.to(device), losses.to(device)])).tolist()
        collected = dict(zip(_COUNTS, summed, strict=False))
        for name, value in collected.items():
            self.total[name] += value
        tokens = summed[len(_COUNTS) : -_NUM_BUCKETS]
        for index, (count, loss) in enumerate(zip(tokens, summed[-_NUM_BUCKETS:], strict=True)):
            if count:
                collected[bucket_name(index)] = loss / count
        self._counts = dict.fromkeys(_COUNTS, 0.0)
        self._bucket_tokens = [0.0] * _NUM_BUCKETS
        self._bucket_loss = None
        return collected


class _AttachHook(TrainerCallback):
    """Hooks the model after DeepSpeed has, when training begins.

    DeepSpeed's hook turns on the gathering of weights that a module reads of another one, as GLM's vision tower does
    (ZeRO-3). The tower runs in our hook, so that one must come later.
    """

    def __init__(self, hook: EvsHook) -> None:
        self.hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.hook.attach(model)


class _BeginQuarantine(TrainerCallback):
    """Counts of bad samples go on from the step that a resumed run begins with."""

    def __init__(self, quarantine: Quarantine) -> None:
        self.quarantine = quarantine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.quarantine.begin(state.global_step, writes=state.is_world_process_zero)


class UptrainTrainer(Trainer):
    """Trainer of a model whose batches are pruned by `hook`. See the module's docstring for what differs."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *, hook: EvsHook, optim: OptimSection, quarantine: Quarantine, args: TrainingArguments, **kwargs: Any
    ) -> None:
        super().__init__(args=args, **kwargs)
        self.quarantine = quarantine
        self.model_accepts_loss_kwargs = True
        self.hook = hook
        self.optim_section = optim
        self.tally = Tally()
        self.losses: list[float] = []
        self.seconds = 0.0
        self._last_log = 0.0  # 0: the clock starts with the first batch, not with loading
        hook.autocast = self.accelerator.autocast
        self.add_callback(_AttachHook(hook))
        self.add_callback(_BeginQuarantine(quarantine))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # An item of the data set is a micro-batch, whatever number of rows it has.
        loader: DataLoader[Any] = self._get_dataloader(
            self.train_dataset, "Training", batch_size=1, sampler_fn=self._get_train_sampler, is_training=True
        )
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = list(parameter_groups(model, self.hook.family, self.optim_section))
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._last_log = self._last_log or time.perf_counter()
        with self.hook.stopwatch.section("data", device=False):
            batches = list(islice(epoch_iterator, num_batches))
            self._judge(batches)
            return super().get_batch_samples(iter(batches), num_batches, device)

    def _judge(self, batches: Sequence[dict[str, Any]]) -> None:
        """Count the bad samples of one step over all ranks, and end the run where there are too many.

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
        mine = torch.tensor([len(met), len(lines), none_left], dtype=torch.int64, device=device)
        num_draws, num_lines, none_left = self.accelerator.reduce(mine, "sum").tolist()
        everyones = gather_object(lines) if num_lines else []
        self.quarantine.add(Found(num_draws, everyones, none_left), writes=self.is_world_process_zero())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        plan: BatchPlan = inputs["plan"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.hook.family.averages_loss and num_items_in_batch is not None:
            loss = loss * sum(plan.num_supervised) / num_items_in_batch
        with torch.no_grad():
            self.tally.add(plan, outputs["logits"], self.hook.labels)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._pruning_metrics()}
            self.losses.append(logs["loss"])
        super().log(logs, start_time)

    def _pruning_metrics(self) -> dict[str, float]:
        """Metrics since the last log, over all ranks (times: of this rank). Called on every rank."""
        now = time.perf_counter()
        elapsed, self._last_log = now - self._last_log, now
        self.seconds += elapsed
        sums = self.tally.collect(lambda t: self.accelerator.reduce(t, "sum"), self.args.device)
        times = self.hook.stopwatch.collect()
        metrics = {name: value for name, value in sums.items() if name.startswith("loss/")}
        metrics |= {
            "evs/rate": sums["rate"] / max(sums["rows"], 1),
            "evs/rate_applied": sums["rate_applied"] / max(sums["video_rows"], 1),
            "evs/video_tokens_before": sums["video_tokens_before"],
            "evs/video_tokens_after": sums["video_tokens_after"],
            "evs/supervised_tokens": sums["supervised"],
            "evs/padding": sums["padding"] / max(sums["padding"] + sums["tokens"], 1),
            "data/shortened": sums["shortened"],
            **{f"data/decoded/{backend}": sums[f"decoded/{backend}"] for backend in BACKENDS},
            "speed/tokens_per_second": sums["tokens"] / elapsed,
            "speed/samples_per_second": sums["rows"] / elapsed,
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "time/rest": elapsed - sum(times.values()),
            "memory/peak_gib": _peak_memory() / 2**30,
            **self.quarantine.metrics(),
        }
        if self.lr_scheduler is not None and self.optimizer is not None:
            for group in self.optimizer.param_groups:
                metrics[f"lr/{group['name'].removesuffix('_no_decay')}"] = float(group["lr"])
        return metrics


def _peak_memory() -> int:
    """Bytes: the device's peak allocation, or this process's largest resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
