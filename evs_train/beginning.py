"""What is done when a training begins, once DeepSpeed or DDP has wrapped the model: the hook, the counts, their checks.

Invariant: counts of a resumed run are those of the steps before its checkpoint. Cost: nothing per step.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train.data.quarantine import Quarantine
from evs_train.finite import FiniteGuard, have_deepspeed_check
from evs_train.prune import EvsHook


class AttachHook(TrainerCallback):
    """Hooks the model after DeepSpeed has, when training begins.

    DeepSpeed's hook turns on the gathering of weights that a module reads of another one, as GLM's vision tower does
    (ZeRO-3). The tower runs in our hook, so that one must come later.
    Also takes back what transformers does where activations are recomputed: it lets gradients reach all embeddings,
    which reentrant checkpoints need and ours do not. In a tower whose patch embedding is among them, frozen layers
    would be computed again and have a backward pass.
    """

    def __init__(self, hook: EvsHook) -> None:
        self.hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.hook.attach(model)
        self.hook.model.disable_input_require_grads()


class BeginCounts(TrainerCallback):
    """Counts go on from the step that a resumed run begins with. Also knows of which step the last checkpoint is."""

    def __init__(self, quarantine: Quarantine, finite: FiniteGuard) -> None:
        self.quarantine, self.finite = quarantine, finite
        self.saved_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.quarantine.begin(state.global_step, writes=state.is_world_process_zero)
        self.finite.begin(state.global_step, writes=state.is_world_process_zero)
        self.saved_step = state.global_step
        if args.deepspeed is not None:
            have_deepspeed_check(kwargs["optimizer"].optimizer)  # inside accelerate's

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step
