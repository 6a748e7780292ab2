"""PruneVid's own table, as far as it can be checked without weights: tokens left and operations at published settings.

`OMP_NUM_THREADS=1 python -m benchmarks.prunevid [--videos DIR] [--out FILE]` writes JSON. The method is the one of
`evs_train/pruners/prunevid.py` with a ratio of clusters instead of a rate, on videos in the shapes of the table: real
clips (those of DIR that are there), one in which nothing changes and one in which everything does.

How many tokens are left follows from which places count as static, and that from the embeddings. Without weights there
are none, so two stand-ins are looked at: `pixels`, the pixels that a token covers, less their mean over the clip; and
`tower`, a small LLaVA-OneVision with random weights. The extremes bound the ratio for any embeddings.

Operations are those of the video's tokens in the language model: the linear layers and twice N*N*hidden of attention in
each layer, a causal mask not counted. The paper says no formula. Cost: a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import read_video
from evs_train.evs import select_tokens
from evs_train.pruners.base import Video
from evs_train.pruners.prunevid import PruneVid, contiguous

BETA, ALPHA, LAYER, DEPTH = 0.5, 0.4, 10, 32
"""Published: clusters to tokens, what part two keeps, and the zero-based layer behind which it does so, of so many."""
PRUNER = PruneVid(tau=0.8, segment_ratio=0.25, neighbours=7)
CLIPS = ("flipping_a_pancake.mkv", "nasa_13013.mp4", "av1_video.mkv")
RESULT = Path(__file__).parent / "results" / "prunevid.json"


@dataclass(frozen=True)
class Model:
    """Sizes of a row of the published table, and what stands in it: tokens retained and operations, of dense ones.

    LLaVA-OneVision 7B has Qwen2-7B's layers, PLLaVA 7B Vicuna's. 32 frames of 196 tokens are not said by the paper;
    VidCom2's says them of the same model.
    """

    name: str
    frames: int
    side: int
    layers: int
    hidden: int
    keys: int
    intermediate: int
    retained: float
    operations: float

    def of_dense(self, first: float, second: float, num_first: int) -> float:
        """Operations when `num_first` layers run on a share `first` of the tokens and the rest on `second`."""
        linear = 2 * self.hidden * (self.hidden + self.keys) + 3 * self.hidden * self.intermediate
        dense = self.frames * self.side**2

        def layer(share: float) -> float:
            return share * dense * (linear + 2 * share * dense * self.hidden)

        return (num_first * layer(first) + (self.layers - num_first) * layer(second)) / (self.layers * layer(1.0))


MODELS = (
    Model("LLaVA-OneVision", 32, 14, 28, 3584, 512, 18944, retained=0.170, operations=0.20),
    Model("PLLaVA", 16, 12, 32, 4096, 4096, 11008, retained=0.162, operations=0.23),
)


@dataclass(frozen=True)
class Left:
    """What is left of a video, as shares of its tokens: after merging over time, after clustering, after part two.

    `static` is the share of tokens at static places, `segments` the rule for them, `operations` of dense ones.
    """

    video: str
    features: str
    segments: str
    num_segments: int
    static: float
    over_time: float
    merged: float
    retained: float
    operations: float


def left_of(model: Model, video: str, features: str, embeds: Tensor) -> Iterator[Left]:
    """A video (T, N, D) with the pruner's segments, and with those of the paper's code."""
    rules: dict[str, Callable[[Tensor], Tensor]] = {"ours": PRUNER.segments, "published": published_segments}
    for rule, segments in rules.items():
        segment = segments(embeds)
        total, num_segments = embeds[..., 0].numel(), int(segment[-1]) + 1
        joined = PRUNER.grouped(embeds, segment, total).joined
        counts = PRUNER.published_counts(embeds, segment, BETA, ALPHA)
        over_time, merged, retained = (count / total for count in counts)
        operations = model.of_dense(merged, retained, layers_before(model.layers) + 1)
        static = float(joined.float().mean())
        yield Left(video, features, rule, num_segments, static, over_time, merged, retained, operations)


def layers_before(layers: int) -> int:
    """Part two's zero-based layer, for another depth."""
    return layers * LAYER // DEPTH


def published_segments(embeds: Tensor) -> Tensor:
    """(T,) as `PruneVid.segments`, by the paper's rule."""
    return torch.tensor(runs_of(repaired(PRUNER.scattered(embeds).tolist())))


def runs_of(labels: Sequence[int]) -> list[int]:
    """For each label the number of its run."""
    return [number for number, (_, run) in enumerate(groupby(labels)) for _ in run]


def same_segments(scattered: float, trials: int = 2000) -> float:
    """Share of made-up clusterings of 32 units for which our rule and the paper's give the same segments.

    A scene lasts five units on average, and each unit is in another cluster than its scene's with this probability.
    """
    draw, same = random.Random(0), 0
    for _ in range(trials):
        labels, scene = list[int](), 0
        for _ in range(32):
            scene = draw.randrange(8) if draw.random() < 0.2 else scene
            labels.append(draw.randrange(8) if draw.random() < scattered else scene)
        same += runs_of(repaired(labels)) == contiguous(torch.tensor(labels)).tolist()
    return same / trials


def repaired(labels: list[int]) -> list[int]:
    """Labels of units made contiguous, as the paper's code is described to do it.

    Of each label the longest runs stay, unless they are single units; what is left open gets the label of the longer
    run beside it, the left one where both are as long. From left to right: what was joined counts for what follows.
    """
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(length for one, length in runs if one == label) for label in labels}
    patched: list[int | None] = []
    for label, length in runs:
        patched += [label if length == longest[label] > 1 else None] * length
    begin = 0
    while begin < len(patched):
        end = begin + _run(patched[begin:])
        if patched[begin] is None:
            left, right = _run(patched[:begin][::-1]), _run(patched[end:])
            beside = patched[end] if right > left else patched[begin - 1] if left else 0
            patched[begin:end] = [beside for _ in range(begin, end)]
        begin = end
    return [label or 0 for label in patched]


def _run(labels: list[int | None]) -> int:
    """How many of the first labels are equal."""
    return len(list(next(groupby(labels))[1])) if labels else 0


def extremes(model: Model) -> dict[str, Tensor]:
    """A video in which nothing changes, and one in which everything does."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(model.frames, model.side**2, 64, generator=generator)
    return {"nothing changes": everything[:1].repeat(model.frames, 1, 1), "everything changes": everything}


def static_share(model: Model, length: int) -> float:
    """Share of static places at which the published ratio comes out, where all segments have so many frames."""
    return (1 - model.retained / (BETA * ALPHA)) / (1 - 1 / length)


def frames_of(file: Path, count: int) -> Tensor:
    """(T, 3, 384, 384) frames evenly apart, as LLaVA-OneVision's processor makes them."""
    frames = torch.from_numpy(read_video(file, FrameSampling(num_frames=count), verify=False).frames)
    resized = F.interpolate(frames.permute(0, 3, 1, 2).float(), (384, 384), mode="bicubic", antialias=True)
    return resized.clamp(0, 255) / 127.5 - 1


def pixels(frames: Tensor, side: int) -> Tensor:
    """(T, side * side, D) the pixels under each token, at 8 x 8, less their mean over the clip."""
    small = F.interpolate(frames, (8 * side, 8 * side), mode="area")
    cells = F.unfold(small - small.mean((0, 2, 3), keepdim=True), 8, stride=8)  # (T, D, side * side)
    return cells.transpose(1, 2)


@torch.no_grad()
def tower(frames: Tensor, side: int) -> Tensor:
    """(T, side * side, D) what a LLaVA-OneVision of the released geometry, small and with random weights, says."""
    vision: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    text = vision | {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    vision |= {"model_type": "siglip_vision_model", "num_attention_heads": 4, "vision_use_head": False}
    vision |= {"image_size": 384, "patch_size": 14}
    tokens = {"image_token_index": 62, "video_token_index": 63}
    config = hf.LlavaOnevisionConfig(text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = hf.LlavaOnevisionForConditionalGeneration(config).eval()
    rows = [model.get_video_features(one[None], return_dict=True).pooler_output[0, :196] for one in frames.split(1)]
    grid = torch.stack(rows).mT.unflatten(2, (14, 14))  # (T, D, 14, 14)
    return F.interpolate(grid, (side, side), mode="area").flatten(2).mT


def seconds_of_a_choice() -> dict[str, float]:
    """Best of three, for LLaVA-OneVision 7B's embeddings at rate 0.75."""
    embeds = torch.randn(32, 196, 3584, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Any]] = {
        "prunevid": lambda: PRUNER.choose(Video(embeds), 0.75),
        "evs": lambda: select_tokens(embeds, 0.75),
    }
    best = dict.fromkeys(calls, math.inf)
    for _ in range(3):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begun)
    return {name: round(seconds, 3) for name, seconds in best.items()}


def measured(model: Model, videos: Path) -> dict[str, Any]:
    """One row of the table: what is published, what is found, and where between the extremes it lies."""
    found = [left for name, embeds in extremes(model).items() for left in left_of(model, name, "made", embeds)]
    for name in CLIPS:
        if (videos / name).is_file():
            frames = frames_of(videos / name, model.frames)
            found += left_of(model, name, "pixels", pixels(frames, model.side))
            found += left_of(model, name, "tower", tower(frames, model.side))
    at_published = {
        f"{count} of {model.layers} layers before": model.of_dense(model.retained / ALPHA, model.retained, count)
        for count in sorted({LAYER, LAYER + 1, layers_before(model.layers), layers_before(model.layers) + 1})
    }
    return {
        "model": model.name,
        "published": {"retained": model.retained, "operations": model.operations},
        "static_share_of_published": {
            f"segments of {length}": round(static_share(model, length), 3) for length in (2, 4, model.frames)
        },
        "operations_of_published": {name: round(value, 4) for name, value in at_published.items()},
        "found": [
            {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(left).items()}
            for left in found
        ],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=Path("../shared/videos"), help="folder of real clips")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = {
        "environment": environment(["torch", "transformers"]),
        "settings": {**asdict(PRUNER), "beta": BETA, "alpha": ALPHA, "layer": f"{LAYER}/{DEPTH}"},
        "table": [measured(model, arguments.videos) for model in MODELS],
        "same_segments": {f"{share:g}": round(same_segments(share), 3) for share in (0.0, 0.05, 0.1, 0.2, 0.4)},
        "seconds": seconds_of_a_choice(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
