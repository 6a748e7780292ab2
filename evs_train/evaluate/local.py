"""Answers of a checkpoint that is loaded here, at several rates, and what they cost.

Invariant: media are decoded and encoded once for all rates of a question, and once for neighbouring questions about the
same media; prefill is timed at all rates in turns, so that whatever else happens on the machine falls on all of them.
Cost: see `score.py`; a question that is timed costs `ROUNDS` + 1 more prefills at each rate. Not here: records, ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evs_train.data.chat import Example, build_prompt
from evs_train.data.decoding import Decoding
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import Clip, read_image, read_video
from evs_train.evaluate.data import Question
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.records import Record
from evs_train.evaluate.score import continuations, is_right, log_likelihoods, said_freely
from evs_train.generation import Encoded, PrunedModel
from evs_train.models.base import Family
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS

ROUNDS = 3
"""Measured prefills at each rate, of which the median counts; one more goes before them."""


@dataclass(frozen=True)
class Cost:
    """Of one prefill: seconds, and the most GPU memory in use meanwhile (None without a GPU)."""

    seconds: float
    peak_bytes: int | None


class Prompts:
    """Questions decoded and tokenized, up to where the answer begins.

    Args:
        family: adapter of the checkpoint.
        sampling: of frames; a question's segment is put in.
        decoding: decoder and limits.
        template_kwargs: variables of the chat template.
        verify: decode each video from end to end before its first use.
        measure_changes: of the videos' pixels, for pruners that look at them.
    """

    def __init__(
        self,
        family: Family,
        sampling: FrameSampling,
        decoding: Decoding,
        template_kwargs: Mapping[str, Any],
        verify: bool,
        *,
        measure_changes: bool = False,
    ) -> None:
        self._family, self._sampling, self._decoding = family, sampling, decoding
        self._template_kwargs, self._verify, self._measure_changes = template_kwargs, verify, measure_changes
        self._last: tuple[Any, list[Clip], list[Any]] = (None, [], [])

    def of(self, question: Question) -> Example:
        """The prompt of a question. Media of the one before are not decoded again."""
        sample, key = question.sample, _media_of(question)
        last = self._last
        if last[0] != key:
            sampling = dataclasses.replace(self._sampling, segment=question.segment)
            clips = [read_video(one, sampling, verify=self._verify, decoding=self._decoding) for one in sample.videos]
            if question.segment is not None:
                clips = [from_its_start(clip) for clip in clips]
            self._last = last = (key, clips, [read_image(one, decoding=self._decoding) for one in sample.images])
        _, clips, images = last
        return build_prompt(
            sample,
            clips,
            images,
            self._family,
            template_kwargs=self._template_kwargs,
            measure_changes=self._measure_changes,
        )


class LocalModel:
    """A loaded checkpoint that answers questions.

    Args:
        place: of the model in the evaluation.
        model: the checkpoint.
        options: of the evaluation.
    """

    def __init__(self, place: int, model: PrunedModel, options: EvalOptions) -> None:
        self.place, self.model, self.options = place, model, options
        self._prompts = Prompts(
            model.family,
            model.sampling,
            model.decoding,
            model.template_kwargs,
            options.verify,
            measure_changes=model.pruner.needs_changes,
        )
        self._left_to_time = options.timed
        self._encoded: tuple[Any, Encoded] = (None, {})

    def answer(self, question: Question, rates: Sequence[float]) -> list[Record]:
        """One record for each rate.

        Raises:
            DataError, MediaError: the question cannot be asked.
        """
        prompt = self._prompts.of(question)
        encoded = self._encode(question, prompt)
        costs: dict[float, Cost] = {}
        encode_seconds = None
        if self._left_to_time and any(item.kind == "video" for item in prompt.items):
            self._left_to_time -= 1
            encode_seconds = self._seconds_to_encode(prompt)
            costs = prefill_costs(self.model, prompt, encoded, sorted({0.0, *rates}))
        choices = continuations(self.model, question) if question.choices else []
        records = []
        for rate in rates:
            scores: list[float] = []
            if choices:
                scores = log_likelihoods(self.model, prompt, encoded, rate, choices)
                said = question.choices[likeliest(scores, question.id)]
                verdicts: dict[str, Any] = {"correct": said == question.choices[question.correct]}
            else:
                said = said_freely(self.model, prompt, encoded, rate, max_new_tokens=self.options.max_new_tokens)
                verdicts = free_verdicts(said, question, self.options)
            records.append(
                Record(
                    model=self.place,
                    question=question.id,
                    video=question.video,
                    types=question.types,
                    rate=rate,
                    said=said,
                    scores=tuple(scores),
                    prefill_seconds=costs[rate].seconds if costs else None,
                    dense_seconds=costs[0.0].seconds if costs else None,
                    encode_seconds=encode_seconds,
                    peak_bytes=costs[rate].peak_bytes if costs else None,
                    **verdicts,
                    **token_counts(prompt, rate, self.model.pruner),
                )
            )
        return records

    def _encode(self, question: Question, prompt: Example) -> Encoded:
        key = _media_of(question)
        if self._encoded[0] != key:
            self._encoded = (key, self.model.encode(prompt))
        return self._encoded[1]

    def _seconds_to_encode(self, prompt: Example) -> float:
        return statistics.median(_timed(self.model, lambda: self.model.encode(prompt)).seconds for _ in range(ROUNDS))


def free_verdicts(said: str, question: Question, options: EvalOptions) -> dict[str, bool]:
    """Whether a generated answer is right, either way, and the way that counts."""
    verdicts = {match: is_right(said, question.answers, match) for match in ("exact", "contains")}
    return {**verdicts, "correct": verdicts[options.match]}


def token_counts(prompt: Example, rate: float, pruner: Pruner = EVS) -> dict[str, Any]:
    """Tokens of a prompt at a rate, and whether only the first unit is left of a video."""
    videos = [item for item in prompt.items if item.kind == "video"]
    kept = [pruner.num_retained(item.num_units, item.tokens_per_unit, rate) for item in videos]
    before = sum(item.num_tokens for item in videos)
    return {
        "video_tokens": before,
        "retained": sum(kept),
        "selected": pruner.selection.num_selected(sum(kept)) if pruner.selection and rate > 0 else None,
        "tokens": len(prompt.input_ids) - before + sum(kept),
        "first_unit_only": any(
            item.num_units > 1 and count == item.tokens_per_unit for item, count in zip(videos, kept, strict=True)
        ),
    }


def likeliest(scores: Sequence[float], name: str) -> int:
    """Place of the highest score. Equal ones, which bfloat16 often gives, are decided by the question's name.

    The first of them would favour A. By the name, all rates and checkpoints decide alike, and no letter is favoured.
    """
    best = [place for place, one in enumerate(scores) if one == max(scores)]
    return best[int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(best)]


def prefill_costs(model: PrunedModel, prompt: Example, encoded: Encoded, rates: Sequence[float]) -> dict[float, Cost]:
    """What a prefill costs at each rate: choosing the tokens and one forward over those kept, with its cache.

    The vision encoder is not in it; it runs alike at every rate.
    """

    @torch.no_grad()
    def prefill(rate: float) -> None:
        with model.prepared(prompt, rate, encoded) as inputs:
            model.model(**inputs, use_cache=True, logits_to_keep=1)

    costs: dict[float, list[Cost]] = {rate: [] for rate in rates}
    for turn in range(ROUNDS + 1):
        for rate in rates if turn % 2 else reversed(rates):
            cost = _timed(model, lambda rate=rate: prefill(rate))
            if turn:
                costs[rate].append(cost)
    return {
        rate: Cost(statistics.median(one.seconds for one in of_rate), of_rate[0].peak_bytes)
        for rate, of_rate in costs.items()
    }


def _timed(model: PrunedModel, call: Any) -> Cost:
    device = model.model.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return Cost(seconds, torch.cuda.max_memory_allocated(device) if on_gpu else None)


def from_its_start(clip: Clip) -> Clip:
    """A clip of a segment as if its first frame began the video: prompts tell times from there."""
    first, start = clip.frame_indices[0], clip.timestamps[0]
    indices = [index - first for index in clip.frame_indices]
    return dataclasses.replace(
        clip,
        frame_indices=indices,
        timestamps=clip.timestamps - start,
        total_frames=indices[-1] + 1,
        duration=float(clip.timestamps[-1] - start) + 1 / clip.fps,
    )


def _media_of(question: Question) -> Any:
    return question.sample.videos, question.sample.images, question.segment
