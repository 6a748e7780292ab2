"""The curves as a picture: accuracy against pruning rate with its intervals, and what a prefill costs.

Points at which only the first temporal unit of some videos is left are hollow. Invariant: the same results give the
same picture, on any machine, whatever matplotlib is configured to. Nothing is shown on a screen.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_COLORS = ("#1f5fa8", "#c2571a", "#2d7d46", "#7a3b9a")
_DOTS_PER_INCH = 144


def draw(results: dict[str, Any]) -> bytes:
    """PNG of the curves of all models."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for model, color in zip(results["models"], _COLORS * len(results["models"]), strict=False):
        _accuracy(left, model, color)
        _cost(right, model, color)
    left.set_xlabel("pruning rate")
    left.set_ylabel("accuracy, with 95 % interval over videos")
    right.set_xlabel("pruning rate")
    right.set_ylabel("share of dense")
    for axes in (left, right):
        axes.set_xlim(-0.03, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    right.set_ylim(0, None)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _accuracy(axes: Any, model: dict[str, Any], color: str) -> None:
    points = model["points"]
    rates = [point["rate"] for point in points]
    values, lows, highs = ([point["accuracy"][key] for point in points] for key in ("value", "low", "high"))
    axes.plot(rates, values, color=color, label=model["name"])
    axes.fill_between(rates, lows, highs, color=color, alpha=0.15, linewidth=0)
    for point, value in zip(points, values, strict=True):
        face = "white" if point["first_unit_only"] else color
        axes.plot(point["rate"], value, marker="o", color=color, markerfacecolor=face)
    if model["recommended"] is not None:
        axes.axvline(model["recommended"], color=color, linestyle=":", label=f"recommended: {model['recommended']:g}")


def _cost(axes: Any, model: dict[str, Any], color: str) -> None:
    kept = [(point["rate"], point["retained_share"]) for point in model["points"] if point["retained_share"]]
    timed = [(point["rate"], point["prefill"]) for point in model["points"] if "prefill" in point]
    if kept:
        axes.plot(*zip(*kept, strict=True), color=color, linestyle="--", label=f"{model['name']}: video tokens")
    if timed:
        rates = [rate for rate, _ in timed]
        axes.plot(rates, [cost["of_dense"] for _, cost in timed], "o-", color=color, label=f"{model['name']}: prefill")
        whole = [cost["of_dense_with_encoder"] for _, cost in timed]
        axes.plot(rates, whole, "-", color=color, alpha=0.45, label=f"{model['name']}: prefill and encoder")
