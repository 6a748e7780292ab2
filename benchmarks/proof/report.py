"""Results of the arms to one report: JSON with every figure, a picture, and a table in Markdown.

Gap closed at q: (arm(q) - plug(q)) / (dense(0) - plug(q)), where plug is the base as it is, and dense is the arm that
was trained as long without pruning. Where plug-and-play loses less than `MIN_GAP` there is no gap to close, and none is
given. Invariant: the report is a function of the result files. Cost: seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.environment import environment
from benchmarks.proof.plan import ARMS, DENSE, NVIDIA, PLUG
from benchmarks.proof.statistics import Draws, Figure, Right
from benchmarks.proof.world import NEEDS
from evs_train.errors import DataError

MIN_GAP = 0.02
"""Of accuracy."""

OfRate = dict[str, Right]
PACKAGES = ("evs-train", "torch", "transformers", "accelerate", "numpy")


def write_report(folder: Path) -> str:
    """Write `report.json`, `report.png` and `report.md` into `folder`; returns the last one's text."""
    found = report_of(read_results(folder / "results")) | {"environment": environment(PACKAGES)}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture(found, folder / "report.png")
    text = "\n\n".join(tables(found)) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results in the order of `plan.ARMS`.

    Raises:
        DataError: there is none for the base, or they are not of one world.
    """
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if PLUG not in {one["arm"] for one in results}:
        raise DataError(f"{folder} holds no result of the base", "run the study first")
    if len({one["fingerprint"] for one in results}) > 1:
        raise DataError(f"{folder} holds results of several worlds", "keep those of one")
    return sorted(results, key=lambda one: (list(ARMS).index(one["arm"]), one["seed"]))


def report_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every figure of the report."""
    first = results[0]
    cameras = np.array(first["cameras"])
    of_arm: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        of_arm.setdefault(one["arm"], []).append(one)
    draws = Draws(len(cameras), max(map(len, of_arm.values())))
    rates = list(first["right"])
    right = {name: {rate: _right(found, rate) for rate in rates} for name, found in of_arm.items()}
    groups: dict[str, Any] = {f"question: {name}": (slice(None), [i]) for i, name in enumerate(first["questions"])}
    groups |= {f"camera: {name}": (cameras == name, slice(None)) for name in dict.fromkeys(cameras.tolist())}
    whole = _figures(right, draws)
    parts = {name: _figures(_part(right, *where), draws) for name, where in groups.items()}
    return {
        "fingerprint": first["fingerprint"],
        "num_clips": len(cameras),
        "questions": first["questions"],
        "rates": [float(rate) for rate in rates],
        "arms": {
            name: _of_arm(found, name, whole, draws)
            | {"groups": {part: _curve(of_part, name) for part, of_part in parts.items()}}
            for name, found in of_arm.items()
        },
    }


def _right(found: Sequence[dict[str, Any]], rate: str) -> Right:
    """(seeds, clips, questions)."""
    return np.array([[[float(c) for c in row] for row in one["right"][rate]] for one in found])


def _part(right: Mapping[str, OfRate], clips: Any, questions: Any) -> dict[str, OfRate]:
    """Answers to some questions about some clips; NaN for the other clips, so that draws stay the same."""
    cut: dict[str, OfRate] = {}
    for name, of_rate in right.items():
        cut[name] = {}
        for rate, values in of_rate.items():
            kept = np.full_like(values, np.nan)
            kept[:, clips] = values[:, clips]
            cut[name][rate] = kept[:, :, questions]
    return cut


def _figures(right: Mapping[str, OfRate], draws: Draws) -> dict[str, dict[str, Figure]]:
    return {name: {rate: draws.mean(values) for rate, values in of_rate.items()} for name, of_rate in right.items()}


def _curve(figures: Mapping[str, Mapping[str, Figure]], name: str) -> dict[str, Any]:
    """Accuracy at each rate and, where plug-and-play leaves a gap, the share of it that the arm closes."""
    curve: dict[str, Any] = {}
    for rate, figure in figures[name].items():
        curve[rate] = {"accuracy": figure.with_interval()}
        if DENSE in figures and name != PLUG:
            plug = figures[PLUG][rate]
            gap = figures[DENSE]["0"] - plug
            if gap.value >= MIN_GAP:
                curve[rate]["gap_closed"] = ((figure - plug) / gap).with_interval()
    return curve


def _of_arm(
    found: Sequence[dict[str, Any]], name: str, figures: Mapping[str, Mapping[str, Figure]], draws: Draws
) -> dict[str, Any]:
    curve = _curve(figures, name)
    for rate, point in curve.items():
        if NVIDIA in figures and name != NVIDIA:
            point["to_nvidia"] = (figures[name][rate] - figures[NVIDIA][rate]).with_interval()
    trained = [one for one in found if "steps" in one]
    out: dict[str, Any] = {"seeds": [one["seed"] for one in found], "rates": curve}
    if DENSE in figures:
        out["dense_change"] = (figures[name]["0"] - figures[DENSE]["0"]).with_interval()
    if trained:
        out |= {
            key: float(np.mean([one[key] for one in trained]))
            for key in ("steps", "seconds_per_step", "cpu_seconds_per_step", "tokens_per_step", "mean_rate")
        }
        out["of_seed"] = {
            str(one["seed"]): {rate: float(_right([one], rate).mean()) for rate in one["right"]} for one in found
        }
    return out


def tables(found: Mapping[str, Any]) -> list[str]:
    """Markdown: accuracy, gap closed and cost of each arm, then accuracy by question and camera at each rate."""
    rates = [f"{rate:g}" for rate in found["rates"]]
    head = ["arm", "seeds", *(f"q = {rate}" for rate in rates), "dense, to dense SFT", "CPU s a step", "tokens a step"]
    rows, gaps = [], []
    for name, arm in found["arms"].items():
        points = arm["rates"]
        cells = [_percent(points[rate]["accuracy"]) for rate in rates]
        change = _points(arm["dense_change"]) if "dense_change" in arm else "-"
        cost = ["-", "-"]
        if "steps" in arm:
            cost = [f"{arm['cpu_seconds_per_step']:.2f}", f"{arm['tokens_per_step']:,.0f}"]
        rows.append([name, str(len(arm["seeds"])), *cells, change, *cost])
        gaps.append(
            [name, *(_percent(points[rate]["gap_closed"]) if "gap_closed" in points[rate] else "-" for rate in rates)]
        )
    made = [
        f"Accuracy in percent with 95 % intervals; {found['num_clips']} held-out clips, "
        f"{len(found['questions'])} questions each; held-out split {found['fingerprint'][:16]}.",
        _table(head, rows),
        "Gap closed, in percent.",
        _table(["arm", *(f"q = {rate}" for rate in rates)], gaps),
    ]
    groups = list(next(iter(found["arms"].values()))["groups"])
    for rate in rates:
        of_groups = [
            [name, *(f"{100 * arm['groups'][part][rate]['accuracy']['value']:.1f}" for part in groups)]
            for name, arm in found["arms"].items()
        ]
        made += [
            f"Accuracy at q = {rate} by question and camera, in percent.",
            _table(["arm", *(part.split(": ")[1] for part in groups)], of_groups),
        ]
    return made


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _percent(figure: Mapping[str, float]) -> str:
    return "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{key: 100 * value for key, value in figure.items()})


def _points(figure: Mapping[str, float]) -> str:
    return "{value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**{key: 100 * value for key, value in figure.items()})


def picture(found: Mapping[str, Any], file: Path) -> None:
    """Accuracy and gap closed against the rate, then accuracy of each question and camera."""
    mpl.use("Agg")
    groups = list(next(iter(found["arms"].values()))["groups"])
    columns = 4
    figure, axes = plt.subplots(
        math.ceil((2 + len(groups)) / columns), columns, figsize=(16, 10), sharex=True, layout="constrained"
    )
    panels = list(axes.flat)
    colours = mpl.colormaps["tab20"]
    for place, (name, arm) in enumerate(found["arms"].items()):
        colour = colours(2 * place % 20 + place // 10 % 2)  # neighbours in the map are two shades of one colour
        style = {"color": colour, "linestyle": "--" if PLUG in name else "-", "marker": ".", "label": name}
        _line(panels[0], arm["rates"], "accuracy", style)
        _line(panels[1], arm["rates"], "gap_closed", style)
        for panel, part in zip(panels[2:], groups, strict=False):
            _line(panel, arm["groups"][part], "accuracy", style)
    titles = [
        "all questions",
        "gap closed",
        *(f"{p} ({NEEDS[p.split(': ')[1]]})" if p.startswith("q") else p for p in groups),
    ]
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("pruning rate")
        panel.grid(alpha=0.3)
    panels[1].set_ylim(-0.5, 1.2)
    for panel in panels[len(titles) :]:
        panel.axis("off")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=5, loc="outside lower center")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _line(panel: Any, curve: Mapping[str, Any], key: str, style: Mapping[str, Any]) -> None:
    points = [(float(rate), point[key]) for rate, point in curve.items() if key in point]
    if points:
        rates, values = zip(*points, strict=True)
        below = [max(0.0, one["value"] - one["low"]) for one in values]
        above = [max(0.0, one["high"] - one["value"]) for one in values]
        panel.errorbar(rates, [one["value"] for one in values], [below, above], capsize=2, linewidth=1.2, **style)
