"""The loss of a training step is the model's own, which takes all logits and, of experts, what their routers add."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_the_loss_of_a_step_is_the_models_own(
    family: str,
    num_processes: int,
    tiny_checkpoint: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tiny_checkpoint(family)
    if family == "qwen3_vl_moe":
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "model"))
        fields = json.loads((checkpoint / "config.json").read_text())
        fields["text_config"] |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
        (checkpoint / "config.json").write_text(json.dumps(fields))
    options = {"train__batch_size": 4, "evs__rate": 0.5, "tuning__freeze": []}
    trainer = Run(recipe_of(arguments(checkpoint, world, tmp_path / "run", **options))).build_trainer()
    hook, model = trainer.hook, trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))

    own = model(**hook.prune(batch))
    assert (own.get("aux_loss") is not None) == (family == "qwen3_vl_moe")
    own.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    hook.attach(model)
    # A loss of the step's share of tokens; averaging gradients over processes takes the factor away again.
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", num_processes)
    num_items = torch.tensor(2 * sum(batch["plan"].num_supervised))
    loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items)
    loss.backward()
    torch.testing.assert_close(loss, own.loss * num_processes / 2, rtol=1e-6, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name] * 2 / num_processes, gradient, rtol=1e-4, atol=atol, msg=name)
