"""EVS with a number of tokens that follows the content: of those that EVS keeps, attention sees the ones that changed.

Shapes must be planned before anything is encoded, so no pruner may keep a number that depends on content. This one
keeps as many as EVS and hides from attention those that are alike to the token before: what is not seen has no
influence on any other token, and where tokens meet in attention alone that equals dropping it, positions preserved.

Invariant: unit 0 is always seen; at rate 0 nothing is hidden, since that is the dense pass. Cost: that of EVS. Hidden
tokens are computed like others, so a higher threshold saves nothing while training; what is learned is to do without
them. It needs a mask: no flash attention, and no recurrent layers (`inputs.check_pruner` refuses them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evs_train import evs
from evs_train.pruners.base import Choice, Pruner, Video, highest


@dataclass(frozen=True)
class EvsThreshold(Pruner):
    """Keep as EVS; hide what is more alike than `similarity` (cosine) to the token at the same place a unit before."""

    similarity: float = 0.9

    hides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.similarity, float) or not 0 < self.similarity < 1:
            raise ValueError(f"similarity must be a number with 0 < similarity < 1, got {self.similarity!r}")

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        scores = evs.dissimilarity(video.embeds).flatten()
        index = highest(scores, self.num_retained(video.num_units, video.tokens_per_unit, pruning_rate))
        if pruning_rate == 0:
            return Choice(index)
        # In float32, or the threshold would be rounded to the dtype of the scores.
        return Choice(index, seen=scores[index].float() >= 1.0 - self.similarity)


PRUNER = EvsThreshold
