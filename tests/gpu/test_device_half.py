"""What only a GPU can show: the device half does not synchronise, and bfloat16 on the device keeps rate 0 exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evs_train.evs import select_tokens
from evs_train.prune import compact
from tests.parity.rig import Rig, attention_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ALL = ("two", "image", "text", "still", "both")


def to_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    return [to_device(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def cuda_rig(family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    rig = Rig(tiny_checkpoint(family_name), mixed_rows, torch.bfloat16)
    rig.model.cuda()
    return rig


def test_pruning_does_not_synchronise(cuda_rig: Rig) -> None:
    batch = to_device(cuda_rig.batch(ALL, 0.75))
    videos = batch["plan"].videos
    embeds = [torch.randn(p.item.num_units, p.item.tokens_per_unit, 64, device="cuda") for p in videos]
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = [select_tokens(one, p.pruning_rate) for one, p in zip(embeds, videos, strict=True)]
        compact(batch, chosen, pad_token_id=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rate_zero_is_exact_in_bfloat16(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> None:
    rig = Rig(tiny_checkpoint("qwen3_vl"), mixed_rows, torch.bfloat16)
    rig.model.cuda()
    batch = to_device(rig.batch(ALL, 0.0))
    config, ids = rig.family.config, batch["input_ids"]
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    plain = rig.model(input_ids=ids, attention_mask=attention_mask(batch), mm_token_type_ids=kinds, **batch["media"])
    pruned, _ = rig.full(batch)
    assert torch.equal(pruned.logits, plain.logits)
