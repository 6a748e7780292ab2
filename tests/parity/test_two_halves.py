"""Tower and projector run apart are the encoder, to the bit: what `data.cache_features` rests on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evs_train.data.chat import PIXELS, Kind
from evs_train.data.features import inverse, memory_order
from evs_train.models.base import Features, joined
from evs_train.models.tuning import part_of
from tests.parity.rig import Rig

ROWS = ("two", "image", "still", "both")
KINDS: tuple[Kind, ...] = ("image", "video")


@pytest.fixture
def rig(family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    rig = Rig(tiny_checkpoint(family_name), mixed_rows)
    rig.reseed(1)
    for name, parameter in rig.model.named_parameters():
        parameter.requires_grad_(part_of(name, rig.family) == "projector")
    return rig


def towers(rig: Rig, kind: Kind) -> list[list[Tensor]]:
    """What the tower says of each medium by itself."""
    media = [rig.batch([row])["media"] for row in ROWS]
    return [rig.family.tower(rig.model, one, kind) for of_row in media for one in rig.family.split_media(of_row, kind)]


def gradients(rig: Rig, features: list[Features]) -> dict[str, Tensor]:
    """Of the projector, for a loss in which every number counts."""
    rig.model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    layers = [layer for of_one in features for layer in of_one]
    torch.stack([(layer * torch.randn(layer.shape, generator=generator)).sum() for layer in layers]).sum().backward()
    return {name: p.grad.clone() for name, p in rig.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_they_give_the_values_and_gradients_of_encode(rig: Rig, kind: Kind) -> None:
    media = rig.batch(ROWS)["media"]
    without_pixels = {name: value for name, value in media.items() if name not in PIXELS.values()}
    whole = rig.family.encode(rig.model, media, kind)
    halves = rig.family.project(rig.model, without_pixels, kind, towers(rig, kind))
    assert len(whole) == len(halves) == {"image": 2, "video": 4}[kind]
    for one, other in zip(whole, halves, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    expected, found = gradients(rig, whole), gradients(rig, halves)
    assert expected.keys() == found.keys() != set()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_encode_says_of_each_medium_alone_what_it_says_of_several(rig: Rig, kind: Kind) -> None:
    """What is kept where the projector is frozen, too."""
    batch = rig.batch(ROWS)
    media = [one for row in ROWS for one in rig.family.split_media(rig.batch([row])["media"], kind)]
    with torch.no_grad():
        alone = [features for one in media for features in rig.family.encode(rig.model, one, kind)]
        whole = rig.family.encode(rig.model, batch["media"], kind)
    assert len(alone) == len(whole) == {"image": 2, "video": 4}[kind]
    assert all(
        torch.equal(a, b) for one, other in zip(alone, whole, strict=True) for a, b in zip(one, other, strict=True)
    )
    num_tokens = sum(planned.item.num_tokens for planned in batch["plan"].items if planned.item.kind == kind)
    values = sum(layer.numel() for features in alone for layer in features)
    # LLaVA's newline behind each video is no token of it.
    assert values == pytest.approx(num_tokens * rig.family.feature_values(), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_gives_so_many_values_and_no_gradient(rig: Rig, kind: Kind) -> None:
    rig.model.requires_grad_(True)
    of_kind = [planned.item for planned in rig.batch(ROWS)["plan"].items if planned.item.kind == kind]
    said = towers(rig, kind)
    assert not any(one.requires_grad for outputs in said for one in outputs)
    values = sum(one.numel() for outputs in said for one in outputs)
    expected = sum(item.num_tokens for item in of_kind) * rig.family.tower_values(kind)
    # LLaVA's newlines are tokens that the tower knows nothing of, and tiles have padding that is cut off behind it.
    tolerance = 0.1 if rig.family.model_type == "llava_onevision" and kind == "image" else 0
    assert values == pytest.approx(expected, rel=tolerance)


def test_a_layout_in_memory_outlives_joining() -> None:
    """Matrix products may round otherwise for other strides, and so would the first epoch and the second."""
    parts: list[Any] = [torch.randn(n, 7, 5).transpose(1, 2) for n in (2, 3)]
    whole = joined(parts)
    assert torch.equal(whole, torch.cat(parts))
    assert whole.stride() == (35, 1, 5)
    order = memory_order(whole)
    assert whole.permute(order).is_contiguous()
    assert whole.permute(order).permute(inverse(order)).stride() == whole.stride()
