"""A recipe in the words of transformers: the `TrainingArguments` of its run.

Invariant: what is not said here is transformers' default and has no key in a recipe. Cost: nothing is read but a
DeepSpeed file; where the recipe names one, transformers sets DeepSpeed up for every model that is loaded from then on.
"""

from __future__ import annotations

import math
import os

import torch
from transformers import TrainingArguments

from evs_train.config import Recipe
from evs_train.inputs import deepspeed_file


def training_arguments(recipe: Recipe, num_steps: int) -> TrainingArguments:
    """Of a run of `num_steps` optimizer steps. Raises RecipeError if there is no such DeepSpeed file."""
    train, optim = recipe.train, recipe.optim
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=recipe.output_dir,
        seed=recipe.seed,
        max_steps=num_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accumulation,
        average_tokens_across_devices=True,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        warmup_steps=math.ceil(optim.warmup_ratio * num_steps),
        lr_scheduler_type=optim.scheduler,
        max_grad_norm=optim.max_grad_norm,
        activation_checkpointing=bool(train.gradient_checkpointing),
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=recipe.model.dtype == "bfloat16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,  # without torchrun there is no group
        deepspeed=None if recipe.deepspeed is None else str(deepspeed_file(recipe.deepspeed)),
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=not on_cpu,
        ddp_timeout=math.ceil(60 * train.timeout_minutes),
        ddp_find_unused_parameters=False,  # the hook gives every trained parameter a gradient in every step
        remove_unused_columns=False,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a NaN while the optimizer still steps
        save_strategy="no" if train.save_every is None else "steps",
        save_steps=train.save_every or 0.5,
        report_to=[],  # `tracking.py` speaks to W&B, so that it can neither stop nor slow the run
    )
