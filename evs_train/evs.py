"""Efficient Video Sampling: which tokens of a video are kept, exactly as the serving engines decide it.

The rule (arXiv 2510.14624, section 3; the arithmetic agrees with vLLM, SGLang, TensorRT-LLM and transformers'
`nemotron_h_omni`): a token is as important as it differs from the token at the same place one temporal unit before.
`retained_tokens` says how many are kept and needs only Python numbers, so every shape is known on the host before the
video is encoded; `select_tokens` says which, on the device.

Invariant: nothing here synchronises host and device, and every output shape follows from input shapes and the rate.
Cost: one cosine per token and one stable sort of T*N numbers per video; no host-device transfer.
This module does not know batches, token ids or models; see `prune.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_UNIT_SCORE = 255.0
"""Dissimilarity given to all tokens of unit 0. Above any 1 - cosine (at most 2) and exact in bfloat16."""


def retained_tokens(num_units: int, tokens_per_unit: int, pruning_rate: float) -> int:
    """Number of tokens EVS keeps of one video: `max(N, int(T * N * (1 - q)))`.

    Computed with Python integers and doubles on purpose. The engines truncate a double, so 0.9 of 10 000 tokens keeps
    999, and float32 gives other counts.

    Args:
        num_units: T, temporal units (grids) of the video, at least 1.
        tokens_per_unit: N, tokens per unit after the spatial merge, at least 1.
        pruning_rate: q, the share of tokens to remove, 0 <= q < 1.

    Raises:
        ValueError: an argument is out of range.
    """
    check_arguments(num_units, tokens_per_unit, pruning_rate)
    return max(tokens_per_unit, int(num_units * tokens_per_unit * (1.0 - pruning_rate)))


def check_arguments(num_units: int, tokens_per_unit: int, pruning_rate: float) -> None:
    """Raise ValueError where these are no video and no rate: see `retained_tokens`."""
    if num_units < 1 or tokens_per_unit < 1:
        raise ValueError(f"a video has at least one unit of one token, got T={num_units}, N={tokens_per_unit}")
    if not 0.0 <= pruning_rate < 1.0:
        raise ValueError(f"pruning_rate must be in [0, 1), got {pruning_rate}")


def dissimilarity(embeds: Tensor) -> Tensor:
    """Score of every token: `1 - cosine` to the token at the same place in the unit just before.

    Args:
        embeds: (T, N, D) post-projector embeddings of one video. The scores are computed in this dtype, as serving
            does: in bfloat16 many scores tie, and an upcast would choose other tokens.

    Returns:
        (T, N), dtype of `embeds`; unit 0 holds `FIRST_UNIT_SCORE`. Carries no gradient.
    """
    embeds = embeds.detach()
    with torch.autocast(embeds.device.type, enabled=False):  # CUDA's autocast would upcast the cosine to float32
        similarity = F.cosine_similarity(embeds[1:], embeds[:-1], dim=-1)  # (T - 1, N)
    first = torch.full_like(embeds[:1, :, 0], FIRST_UNIT_SCORE)  # (1, N)
    return torch.cat([first, 1 - similarity])


def select_tokens(embeds: Tensor, pruning_rate: float) -> Tensor:
    """Indices of the tokens EVS keeps of one video, in raster order.

    The K highest scores of the whole video win; among equal scores the earlier token wins (stable descending sort).

    Args:
        embeds: (T, N, D) post-projector embeddings of one video.
        pruning_rate: q, 0 <= q < 1.

    Returns:
        (K,) int64 on the device of `embeds`, ascending, indices into the flattened (T * N) tokens, with
        K = `retained_tokens(T, N, q)`.
    """
    num_units, tokens_per_unit = embeds.shape[:2]
    num_tokens = num_units * tokens_per_unit
    num_retained = retained_tokens(num_units, tokens_per_unit, pruning_rate)
    if num_retained == num_tokens:
        return torch.arange(num_tokens, device=embeds.device)
    order = torch.argsort(dissimilarity(embeds).flatten(), descending=True, stable=True)  # (T * N,)
    return order[:num_retained].sort().values
