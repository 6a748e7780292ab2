"""Where gradients arrive, for every way of tuning: in all that trains, in nothing else, and the base stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evs_train.config import PARTS, LoraSection, ModelSection, Part, TuningSection
from evs_train.models.loading import load_weights
from evs_train.models.tuning import apply_tuning, encoder_trains, part_of
from evs_train.prune import EvsHook
from tests.models.test_loading import LORA_TARGETS
from tests.parity.rig import Rig, mean_loss

ALL = ("two", "image", "text", "still", "both")
LR = 1e-3

Tuned = Callable[[TuningSection], tuple[nn.Module, Rig, EvsHook]]


@pytest.fixture
def tuned(family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Tuned:
    """Makes a fresh model of the family, tuned, the rig that makes its batches, and its hook."""

    def make(tuning: TuningSection) -> tuple[nn.Module, Rig, EvsHook]:
        rig = rig_of(family_name, tiny_checkpoint(family_name), mixed_rows)
        section = ModelSection(path=str(tiny_checkpoint(family_name)), dtype="float32")
        torch.manual_seed(0)
        plain = load_weights(section, rig.family.config, torch.float32)
        model = apply_tuning(plain, rig.family, tuning).train()
        hook = EvsHook(rig.family, plain, encoder_trains=encoder_trains(model, rig.family))
        hook.attach(model)
        return model, rig, hook

    return make


_RIGS: dict[str, Rig] = {}


def rig_of(family: str, checkpoint: Path, rows: Path) -> Rig:
    if family not in _RIGS:
        _RIGS[family] = Rig(checkpoint, rows)
    return _RIGS[family]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.capability("LoRA reaches", "linear layers of the language model")
@pytest.mark.parametrize("parts", [("language_model",), PARTS], ids="+".join)
def test_adapters_train_and_nothing_else(
    family_name: str, tuned: Tuned, parts: tuple[Part, ...], record_property: Callable[[str, object], None]
) -> None:
    wanted: set[str] = {LORA_TARGETS[family_name, part] for part in parts}
    lora = LoraSection(r=4, parts=list(parts), targets=None if parts == ("language_model",) else sorted(wanted))
    model, rig, hook = tuned(TuningSection(method="lora", lora=lora))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    base = {name: p.clone() for name, p in model.named_parameters() if name not in adapters}
    assert {part_of(name, rig.family) for name in adapters} == set(parts)
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)

    optimizer = torch.optim.AdamW(adapters.values(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(3):
        loss = mean_loss(model(**rig.batch(ALL, 0.5)), hook)
        loss.backward()
        losses.append(loss.item())
        found = gradients(model)
        assert found.keys() == adapters.keys()
        # B starts at zero, so A is not heard until B has moved.
        without = {name for name, gradient in found.items() if not gradient.any()}
        assert without == ({name for name in adapters if ".lora_A." in name} if step == 0 else set())
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    assert not any(".experts." in name for name in adapters)
    reached = "tower and projector" if parts == PARTS else "linear layers of the language model"
    record_property("cell", f"{reached} except routed experts" if rig.family.lora_note and parts != PARTS else reached)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())


FREEZE: list[list[Part]] = [["vision"], ["vision", "projector"], ["language_model"], ["projector", "language_model"]]


@pytest.mark.parametrize("freeze", FREEZE, ids="+".join)
def test_gradients_reach_exactly_what_is_not_frozen(tuned: Tuned, freeze: list[Part]) -> None:
    model, rig, hook = tuned(TuningSection(freeze=freeze))
    trained = {n for n, _ in model.named_parameters() if part_of(n, rig.family) in set(PARTS) - set(freeze)}
    for names in (ALL, ("image", "text"), ("text",)):
        model.zero_grad(set_to_none=True)
        mean_loss(model(**rig.batch(names, 0.5)), hook).backward()
        found = gradients(model)
        assert found.keys() == trained, names
        heard = {part_of(name, rig.family) for name, gradient in found.items() if gradient.any()}
        # Text alone moves the language model only: the tower's gradients are there, and zero.
        assert heard == set(PARTS) - set(freeze) - ({"vision", "projector"} if names == ("text",) else set()), names


def test_training_keeps_no_cache(tuned: Tuned) -> None:
    """Keys, values and states of all layers would be held for nothing, and Mamba's training kernel would not run."""
    model, rig, _ = tuned(TuningSection(freeze=[]))
    assert model(**rig.batch(("two",), 0.5)).past_key_values is None
