"""A few steps of tiny models, whole in one process or sharded by FSDP2 over two.

`torchrun --nproc_per_node 2 -m tests.distributed.fsdp_worker ROWS OUTPUT equal|uneven CHECKPOINT...` writes what it
finds of each checkpoint to OUTPUT/NAME.json as soon as it is done. The group's timeout is short, so that processes that
wait for each other fail.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from evs_train.objectives import cross_entropies
from evs_train.prune import EvsHook
from tests.parity.rig import Rig

# Rows of the first process, and of the second: no video against two, two against one, image and video against nothing,
# and two rows against one.
STEPS = [(("text",), ("two",)), (("two",), ("still",)), (("both",), ("text",)), (("image", "two"), ("still",))]
RATE = 0.6


def shard(model: nn.Module) -> int:
    """Shard every layer of the language model and of the vision tower, then the root; returns how many layers."""
    layers = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    outermost = [a for a in layers if not any(a is not b and a in set(b.modules()) for b in layers)]
    for layer in outermost:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return len(outermost)


def run(rig: Rig, rank: int = 0, world: int = 1, equal_calls: bool = False) -> list[dict[str, float]]:
    """Loss and gradient norm of each step. One process takes the rows of both."""
    model: Any = rig.model.train()
    if world > 1:
        assert shard(model) > 4
    hook = EvsHook(rig.family, model, encoder_trains=True, equal_calls=equal_calls)
    hook.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    results = []
    for of_ranks in STEPS:
        batch = rig.batch(of_ranks[rank] if world > 1 else of_ranks[0] + of_ranks[1], RATE)
        tokens = summed(torch.tensor(sum(batch["plan"].num_supervised)), world)
        loss = cross_entropies(model(**batch).logits[0], hook.targets).sum() / tokens
        (loss * world).backward()  # FSDP takes the mean over processes; this loss is to be summed over them
        norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        results.append({"loss": float(summed(loss.detach().clone(), world)), "grad_norm": float(whole)})
    return results


def summed(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
    return value


def main(rows: Path, output: Path, calls: str, checkpoints: list[Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for checkpoint in checkpoints:
        found = run(Rig(checkpoint, rows), dist.get_rank(), dist.get_world_size(), equal_calls=calls == "equal")
        if dist.get_rank() == 0:
            (output / f"{checkpoint.name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [Path(word) for word in sys.argv[4:]])
