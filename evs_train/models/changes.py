"""How the pixels of each token change from one temporal unit to the next, from what a processor made of a video.

For pruners that compare pixels rather than features (`Pruner.needs_changes`). Runs on the host, where videos are read.
Invariant: (T, N) float32, unit 0 holds 0; further rows the mean absolute difference of the processor's pixels to the
unit before, over the token's area, all channels and the unit's frames, each with its like in the unit before.
Cost: a pass over the pixels and a copy of them in memory. Not here: which family has which layout of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train.data.chat import PIXELS, Media, MediaItem, Prepared


def of_frames(prepared: Prepared) -> tuple[Tensor, ...]:
    """Of each video, whose pixels are frames (F, C, H, W); an odd one at the end stands for a whole unit.

    A picture is cut into one area for each token of the grid, of equal size. Where that does not come out even,
    neighbours share their border pixels.
    """
    videos = prepared.media.get(PIXELS["video"], ())
    return tuple(_of_frames(frames, item) for frames, item in zip(videos, _videos(prepared), strict=True))


def of_patches(prepared: Prepared, videos: Sequence[Media]) -> tuple[Tensor, ...]:
    """Of each video, whose pixels are flat patches with those of one token next to each other.

    `videos`: of `Family.split_media`, each with (T * N * patches per token, values).
    """
    changes = []
    for video, item in zip(videos, _videos(prepared), strict=True):
        units = video[PIXELS["video"]].view(item.num_units, item.tokens_per_unit, -1)
        changes.append(_behind_zeros(_differences(units).mean(dim=-1)))
    return tuple(changes)


def _of_frames(frames: Tensor, item: MediaItem) -> Tensor:
    per_unit = -(-len(frames) // item.num_units)
    missing = item.num_units * per_unit - len(frames)
    whole = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames
    units = whole.view(item.num_units, per_unit, *frames.shape[1:])
    of_pixels = _differences(units).mean(dim=(1, 2))  # (T - 1, H, W)
    return _behind_zeros(F.adaptive_avg_pool2d(of_pixels[:, None], (item.height, item.width)).flatten(1))


def _videos(prepared: Prepared) -> list[MediaItem]:
    return [item for item in prepared.items if item.kind == "video"]


def _differences(units: Tensor) -> Tensor:
    """(T - 1, ...) float32, of (T, ...) units."""
    return (units[1:].float() - units[:-1].float()).abs_()


def _behind_zeros(changes: Tensor) -> Tensor:
    """(T, N) of (T - 1, N)."""
    return torch.cat([changes.new_zeros(1, changes.shape[1]), changes])
