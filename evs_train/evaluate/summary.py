"""Records to results: the curve of each model, the rate that can be recommended, and tests between models.

A rate is *within* the tolerance when the whole 95 % interval of the paired difference to dense lies above minus the
tolerance, *outside* when all of it lies below, and *open* when the questions are too few to tell. The recommended rate
is the highest that is within. Lower ones need not be; each point says which it is.

Invariant: results are a pure function of records, tolerance, match and seed; a rate is a point of the curve only if all
questions have a record at it. Cost: one resampling for each model and type of question. Nothing is read or written.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.records import Record
from evs_train.evaluate.statistics import (
    Estimate,
    compare,
    means,
    shown_tolerance,
    within_tolerance,
)

VERDICTS = {"yes": "within", "open": "open", "no": "outside"}

OfRate = dict[float, list[Record]]


def summarise(records: Sequence[Record], num_questions: int, names: Sequence[str], options: EvalOptions) -> Any:
    """The `models` and `comparisons` of the results.

    Args:
        records: of all models, rates and questions.
        num_questions: that every finished rate has.
        names: of the models, in their order.
    """
    curves = [_complete([one for one in records if one.model == place], num_questions) for place in range(len(names))]
    return {
        "models": [
            _model(name, curve, records, place, options)
            for place, (name, curve) in enumerate(zip(names, curves, strict=True))
        ],
        "comparisons": [
            _comparison(place, rate, curves[0][rate], curve[rate], options)
            for place, curve in enumerate(curves[1:], start=1)
            for rate in curve
            if rate in curves[0]
        ],
    }


def _complete(records: Sequence[Record], num_questions: int) -> OfRate:
    """Records by finished rate, each in the order of the questions' names."""
    of_rate: OfRate = {}
    for record in sorted(records, key=lambda one: (one.rate, one.question)):
        of_rate.setdefault(record.rate, []).append(record)
    return {rate: found for rate, found in of_rate.items() if len(found) == num_questions}


def _model(name: str, curve: OfRate, records: Sequence[Record], place: int, options: EvalOptions) -> dict[str, Any]:
    points = _points(curve, options)
    within = [point["rate"] for point in points if point.get("tolerance") == "within"]
    unfinished = {one.rate for one in records if one.model == place} - curve.keys()
    return {
        "name": name,
        "points": points,
        "recommended": max(within, default=None),
        "within": within,
        "open": [point["rate"] for point in points if point.get("tolerance") == "open"],
        "unfinished": sorted(unfinished),
    }


def _points(curve: OfRate, options: EvalOptions) -> list[dict[str, Any]]:
    if not curve:
        return []
    rates = list(curve)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(curve[rates[0]]):
        for label in record.types:
            groups.setdefault(label, []).append(index)
    everything = list(range(len(curve[rates[0]])))
    whole = _estimates(curve, everything, options)
    of_types = {label: _estimates(curve, indices, options) for label, indices in sorted(groups.items())}
    points = []
    for rate in rates:
        point: dict[str, Any] = {"rate": rate, "accuracy": asdict(whole[rate][0])}
        if 0.0 in curve and rate > 0:
            dense, change = whole[0.0][0].value, whole[rate][1]
            point |= {
                "difference": asdict(change),
                "tolerance": VERDICTS[within_tolerance(dense, change, options.tolerance)],
                "shown_tolerance": shown_tolerance(dense, change),
            }
        point["types"] = {
            label: {"num_questions": len(groups[label]), **asdict(found[rate][0])} for label, found in of_types.items()
        }
        if options.server and rate > 0 and 0.0 in curve and not any(one.proof for one in curve[rate]):
            counts = [(one.tokens, other.tokens) for one, other in zip(curve[rate], curve[0.0], strict=True)]
            point["same_tokens_as_dense"] = all(here is not None and here == dense for here, dense in counts)
        points.append(point | _answers(curve[rate]) | _tokens(curve[rate]) | _costs(curve[rate]))
    return points


def _estimates(curve: OfRate, indices: Sequence[int], options: EvalOptions) -> dict[float, tuple[Estimate, Estimate]]:
    """For each rate: accuracy, and difference to rate 0 (to itself where there is no 0), over some of the questions."""
    right = {rate: [float(is_correct(found[i], options)) for i in indices] for rate, found in curve.items()}
    dense = right.get(0.0)
    videos = [next(iter(curve.values()))[i].video for i in indices]
    changes = [[a - b for a, b in zip(column, dense or column, strict=True)] for column in right.values()]
    accuracies = means(list(right.values()), videos, 0.0, options.seed)
    differences = means(changes, videos, -1.0, options.seed)
    return dict(zip(curve, zip(accuracies, differences, strict=True), strict=True))


def is_correct(record: Record, options: EvalOptions) -> bool:
    """Whether an answer counts, by the way of matching that is asked for now."""
    if record.exact is None or record.contains is None:
        return record.correct
    return record.exact if options.match == "exact" else record.contains


def _answers(records: Sequence[Record]) -> dict[str, Any]:
    free = [one for one in records if one.exact is not None]
    if not free:
        return {}
    share = {match: sum(bool(getattr(one, match)) for one in free) / len(free) for match in ("exact", "contains")}
    return {"free_answers": {"num_questions": len(free), **share}}


def _tokens(records: Sequence[Record]) -> dict[str, Any]:
    known = [one for one in records if one.video_tokens is not None]
    before, after = sum(one.video_tokens or 0 for one in known), sum(one.retained or 0 for one in known)
    selected = [one.selected for one in known if one.selected is not None]
    proofs = [one.proof for one in records if one.proof is not None]
    return {
        "video_tokens": before,
        "retained_tokens": after,
        "retained_share": after / before if before else None,
        **({"selected_tokens": sum(selected), "selected_share": sum(selected) / before} if selected and before else {}),
        "prompt_tokens": statistics.fmean(counts) if (counts := [o.tokens for o in records if o.tokens]) else None,
        "first_unit_only": sum(one.first_unit_only for one in known) / len(known) if known else None,
        **({"proof": {name: proofs.count(name) for name in sorted(set(proofs))}} if proofs else {}),
    }


def _costs(records: Sequence[Record]) -> dict[str, Any]:
    timed = [one for one in records if one.prefill_seconds and one.dense_seconds and one.encode_seconds]
    if not timed:
        return {}
    prefill = [one.prefill_seconds or 0.0 for one in timed]
    dense = [one.dense_seconds or 0.0 for one in timed]
    encode = [one.encode_seconds or 0.0 for one in timed]
    with_encoder = [(p + e) / (d + e) for p, d, e in zip(prefill, dense, encode, strict=True)]
    peaks = [one.peak_bytes for one in timed if one.peak_bytes is not None]
    return {
        "prefill": {
            "num_questions": len(timed),
            "seconds": statistics.median(prefill),
            "of_dense": statistics.median(p / d for p, d in zip(prefill, dense, strict=True)),
            "of_dense_with_encoder": statistics.median(with_encoder),
            "encode_seconds": statistics.median(encode),
            "peak_bytes": max(peaks) if peaks else None,
        }
    }


def _comparison(
    place: int, rate: float, first: Sequence[Record], second: Sequence[Record], options: EvalOptions
) -> dict[str, Any]:
    found = compare(
        [is_correct(one, options) for one in first],
        [is_correct(one, options) for one in second],
        [one.video for one in first],
        options.seed,
    )
    return {"model": place, "against": 0, "rate": rate, **asdict(found)}
