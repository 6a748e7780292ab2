"""A control: tokens at random. What a rule gains by looking at the video is what it gains over this one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evs_train.pruners.base import Choice, Pruner, Video


@dataclass(frozen=True)
class RandomTokens(Pruner):
    """Keep any tokens, all sets of them being equally likely. Drawn on the host, the same on every device."""

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        count = self.num_retained(video.num_units, video.tokens_per_unit, pruning_rate)
        generator = torch.Generator().manual_seed(video.seed)
        order = torch.randperm(video.num_units * video.tokens_per_unit, generator=generator)
        index = order[:count].sort().values
        return Choice(index.to(video.embeds.device, non_blocking=video.embeds.device.type != "cpu"))


PRUNER = RandomTokens
