"""A control: whole units evenly apart. It is what fewer frames would be, at the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evs_train.pruners.base import Choice, Pruner, Video


@dataclass(frozen=True)
class WholeUnits(Pruner):
    """Keep units evenly apart, unit 0 among them. Where the number is no multiple of a unit the last one is cut off."""

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        per_unit = video.tokens_per_unit
        count = self.num_retained(video.num_units, per_unit, pruning_rate)
        num_units = -(-count // per_unit)
        device = video.embeds.device
        units = torch.arange(num_units, device=device) * video.num_units // num_units
        return Choice((units[:, None] * per_unit + torch.arange(per_unit, device=device)).flatten()[:count])


PRUNER = WholeUnits
