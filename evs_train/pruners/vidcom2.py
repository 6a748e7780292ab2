"""VidCom2 as vLLM serves it: tokens that are unlike their video and their frame, more of them from frames that are so.

The rule (arXiv 2505.14454; its arithmetic as read in vllm-project/vllm PR 47750, merged, and in the authors'
xuyang-liu16/VidCom2): the channels that vary least over the video are kept, tokens normalised over them, and each is
compared by Gaussian kernels with the mean of the video and with the mean of its frame. What is alike is redundant. A
frame's budget grows with how little it is like the video; the budgets are then brought to the exact total.

Invariant: the budgets stay on the device. A token is within its frame's budget if its rank in the frame is below it,
and the total is reached by an order of all tokens, so every shape is known beforehand.
Cost: O(T * N * C) for C channels and four sorts; memory for three tensors of (T, N, C / 2), in the dtype of the scores.

Differences from vLLM: among equal scores the earlier token wins here, where its sorts are not stable and leave that
open; equal scores are frequent in bfloat16. In which order its sums are taken was not read either, which may show in
their last bit. Differences from the authors'
code: that keeps whatever the rounded budgets add up to, and has no exact total. The paper's formula is another one
(cosine to means over all channels); vLLM's authors say that the published accuracy is the code's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train import evs
from evs_train.pruners.base import Choice, Pruner, Video

VARIANCES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the Gaussian kernels whose sum is the likeness of a token to a mean."""
CHANNEL_SHARE = 0.5
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(Pruner):
    """Keep what is unlike the video and its frame; `evs.score_dtype: model` computes in the engine's dtype.

    In bfloat16 a frame's score has steps of 1/64 before it is divided by the temperature, so its budgets are coarse.
    """

    def num_retained(self, num_units: int, tokens_per_unit: int, pruning_rate: float) -> int:
        """`max(T, int(T * N * (1 - q)))`: a token per frame is the floor, where EVS has a whole unit."""
        evs.check_arguments(num_units, tokens_per_unit, pruning_rate)
        return max(num_units, int(num_units * tokens_per_unit * (1.0 - pruning_rate)))

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        num_tokens = video.num_units * video.tokens_per_unit
        count = self.num_retained(video.num_units, video.tokens_per_unit, pruning_rate)
        if count == num_tokens:
            return Choice(torch.arange(num_tokens, device=video.embeds.device))
        with torch.autocast(video.embeds.device.type, enabled=False):  # it would compute part of this in float32
            to_video, to_frame = likeness(video.embeds)
            within = ranks(to_video + to_frame) < budgets(to_video, 1.0 - pruning_rate)[:, None]
        # Those within the budgets first, and of either kind the least alike first: that is to drop the most alike
        # where the budgets add up to more than the total, and to add the least alike where they add up to less.
        by_score = torch.argsort((to_video + to_frame).flatten(), stable=True)
        order = by_score[torch.argsort((~within).flatten()[by_score].int(), stable=True)]
        return Choice(order[:count].sort().values)


def likeness(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token to the mean of the video and to that of its frame, each (T, N): 0 to 5, high where redundant.

    `embeds`: (T, N, C); the dtype is kept throughout.
    """
    variance = embeds.flatten(0, 1).var(dim=0, correction=0)  # (C,)
    calm = torch.argsort(variance, stable=True)[: max(1, int(len(variance) * CHANNEL_SHARE))]
    tokens = F.normalize(embeds[..., calm], dim=-1)  # (T, N, C / 2)
    return _kernels(tokens, tokens.mean(dim=(0, 1))), _kernels(tokens, tokens.mean(dim=1, keepdim=True))


def _kernels(tokens: Tensor, mean: Tensor) -> Tensor:
    distances = (tokens - mean).square().sum(dim=-1)  # (T, N)
    total = torch.zeros_like(distances)
    for variance in VARIANCES:
        total = total + torch.exp(-distances / (2 * variance))
    return total


def budgets(to_video: Tensor, retention: float) -> Tensor:
    """(T,) int64 tokens that each frame may keep, 1 to N, from how alike its tokens are to the video (T, N)."""
    per_frame = to_video.shape[1]
    scores = -to_video.mean(dim=1)
    shares = torch.softmax((scores - scores.max()) / TEMPERATURE, dim=0)
    kept = retention * (1 + shares - shares.mean())
    return (kept * per_frame).round().clamp(1, per_frame).long()  # round: halves to the even number


def ranks(scores: Tensor) -> Tensor:
    """(T, N) int64 place of each token in its frame's ascending order; of equal ones the earlier comes first."""
    return torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1)


PRUNER = VidCom2
