"""Pruning-rate samplers: which share of the video tokens a training step, or a sample, drops.

Invariant: a rate is a pure function of (seed, index, step, num_units). There is no generator state, so a resumed run,
another rank or another order of calls draws the same rates. Every rate lies in [0, 1).

Cost: about 20 microseconds a draw; the first Beta draw at a new (mode, maximum) searches 40 000 points (about 2 ms).

What it does NOT do: decide the scope (one rate a batch or one a sample), which is the caller's choice of `index`; cap a
rate for a short video unless asked to (`cap_rate`); count tokens.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np

from evs_train.errors import RecipeError

RATE_STREAM = 0x455653  # keeps these draws apart from others made with the same recipe seed, such as the data order
_PERCENTILES = (5, 25, 50, 75, 95)
_HIGHEST_MODE_SHARE = 0.998  # of the maximum: past it the grid of `fit_beta` has no point near and the fit lands at 0
_SHORT_VIDEO_MODE_SHARE = 0.75 / 0.83  # where NVIDIA's beta-.75 has its mode within [0, maximum]


class RateSampler(ABC):
    """Draws pruning rates. A subclass is a frozen dataclass: its fields are the recipe's keys."""

    @abstractmethod
    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        """Return a rate in [0, 1), taking all randomness from `generator`; see `rate` for the other arguments."""

    def rate(self, seed: int, index: int, *, step: int, num_units: int | None) -> float:
        """Return the pruning rate of draw `index`, in [0, 1).

        Args:
            seed: the recipe's seed, at least 0.
            index: number of the draw, at least 0: the optimizer step for scope `batch`, the draw number for `sample`.
            step: the optimizer step, from 0; only `warmup` looks at it.
            num_units: temporal units T of the video; only `unit_beta` looks at it. None: no limit from the video.
        """
        # A mixture takes its coin and its inner draw from one generator in turn, so nested draws are independent.
        sequence = np.random.SeedSequence([seed, RATE_STREAM, index])
        return self._draw(np.random.Generator(np.random.Philox(sequence)), step=step, num_units=num_units)


@dataclass(frozen=True)
class Fixed(RateSampler):
    """Always `rate` (Megatron `static-q`). Written in a recipe as a bare number too."""

    value: float

    def __post_init__(self) -> None:
        _check_rate("rate", self.value)

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Uniform(RateSampler):
    """Uniform on [min, max)."""

    min: float
    max: float

    def __post_init__(self) -> None:
        _check_rate("min", self.min)
        _check_rate("max", self.max)
        if self.max <= self.min:
            raise ValueError(f"max must be above min, got min {self.min} and max {self.max}")

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        return float(self.min + (self.max - self.min) * generator.random())


@dataclass(frozen=True)
class Beta(RateSampler):
    """Beta scaled to [0, max] with its peak at `mode` (Megatron `beta-m`, where max is 0.83)."""

    mode: float
    max: float = 0.83

    def __post_init__(self) -> None:
        _check_rate("mode", self.mode)
        _check_rate("max", self.max)
        if self.mode > _HIGHEST_MODE_SHARE * self.max:
            raise ValueError(f"mode must be below max (at most 0.998 of it), got mode {self.mode} and max {self.max}")

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        return _scaled_beta(generator, float(self.mode), float(self.max))


@dataclass(frozen=True)
class UnitBeta(RateSampler):
    """Beta on [0, (T-1)/T] for a video of T temporal units, peak at `mode` (Megatron `frame-based-m`).

    A short video may have (T-1)/T at or below `mode`, or within 0.2 % of it, where there is no such Beta. Our reading,
    which is not NVIDIA's text: the peak then sits at 0.75/0.83 of the maximum, as in the published beta-.75. T = 1
    always gives 0. Without a T the maximum is 1.
    """

    mode: float

    def __post_init__(self) -> None:
        _check_rate("mode", self.mode)

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        maximum = 1.0 if num_units is None else (num_units - 1) / num_units
        if maximum == 0.0:
            return 0.0
        mode = self.mode if self.mode <= _HIGHEST_MODE_SHARE * maximum else _SHORT_VIDEO_MODE_SHARE * maximum
        return min(_scaled_beta(generator, float(mode), maximum), math.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class Choice(RateSampler):
    """One of `rates`, with probability proportional to `weights` (equal without them)."""

    rates: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rates, tuple) or not self.rates:
            raise ValueError(f"rates must be a list of at least one rate, got {self.rates!r}")
        for position, rate in enumerate(self.rates):
            _check_rate(f"rates[{position}]", rate)
        if self.weights is None:
            return
        one_each = isinstance(self.weights, tuple) and len(self.weights) == len(self.rates)
        if not one_each or not all(_is_number(weight) and 0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights must be {len(self.rates)} positive numbers like rates, got {self.weights!r}")

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        cumulative = np.cumsum(self.weights or (1.0,) * len(self.rates))
        position = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        return float(self.rates[min(position, len(self.rates) - 1)])


@dataclass(frozen=True)
class Mixture(RateSampler):
    """Rate 0 with probability `dense`, otherwise a draw of `of`: keeps dense video in the training mix."""

    dense: float
    of: RateSampler

    def __post_init__(self) -> None:
        if not _is_number(self.dense) or not 0 <= self.dense <= 1:
            raise ValueError(f"dense must be a probability in [0, 1], got {self.dense!r}")

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        if generator.random() < self.dense:
            return 0.0
        return self.of._draw(generator, step=step, num_units=num_units)


@dataclass(frozen=True)
class Warmup(RateSampler):
    """A draw of `of` times min(1, (step + 1) / steps): the ceiling rises linearly and is reached at step steps - 1."""

    steps: int
    of: RateSampler

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        return self.of._draw(generator, step=step, num_units=num_units) * min(1.0, (step + 1) / self.steps)


SAMPLERS: dict[str, type[Fixed | Uniform | Beta | UnitBeta | Choice | Mixture | Warmup]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "beta": Beta,
    "unit_beta": UnitBeta,
    "choice": Choice,
    "mixture": Mixture,
    "warmup": Warmup,
}
_RECIPE_NAMES = {"value": "rate"}  # a field called `rate` would hide the method


@lru_cache(maxsize=4096)
def fit_beta(mode: float, maximum: float) -> tuple[float, float]:
    """Return (alpha, beta) of the Beta that, scaled to [0, maximum], peaks at `mode`.

    The point of a 200 x 200 grid on [1.01, 10] that minimises (mode error)^2 (alpha/beta)^4, as in Megatron-LM's branch
    `nano-v3-vl`; (0.75, 0.83) gives (9.1417, 1.8683).
    """
    grid = np.linspace(1.01, 10.0, 200)
    alpha, beta = np.meshgrid(grid, grid, indexing="ij")  # (200, 200) each
    mode_error = np.abs((alpha - 1) / (alpha + beta - 2) * maximum - mode)
    best = np.unravel_index(np.argmin(mode_error**2 * (alpha / beta) ** 4), alpha.shape)
    return float(alpha[best]), float(beta[best])


def cap_rate(rate: float, num_units: int) -> float:
    """Return rate q, lowered if need be so that a video of T = `num_units` keeps two units' worth of tokens or more.

    Unit 0 is always kept whole, so from rate 1 - 1/T on a model sees unit 0 alone and would learn to guess the rest.
    The cap is 1 - 2/T: int(T * N * (1 - q)) >= 2 * N for every N, exactly, in the doubles that the engines compute
    with. So T = 2 and T = 1 stay dense (cap 0): two units are all such a video has, and it is cheap anyway.
    """
    if num_units <= 2:
        return 0.0
    limit = 1.0 - 2.0 / num_units
    while Fraction(1.0 - limit) < Fraction(2, num_units):  # a double off by one rounding would cost a token
        limit = math.nextafter(limit, 0.0)
    return min(rate, limit)


def build_sampler(spec: float | Mapping[str, Any], key: str = "evs.rate") -> RateSampler:
    """Return the sampler that the recipe describes: a number, or a mapping with `kind` and the fields of that kind.

    Args:
        spec: for example 0.75, or {"kind": "beta", "mode": 0.75, "max": 0.83}; the kinds are the keys of `SAMPLERS`.
        key: where `spec` stands in the recipe, for messages.

    Raises:
        RecipeError: unknown kind or key, missing key, value out of range; names the key.
    """
    if _is_number(spec):
        if not 0 <= spec < 1:
            raise RecipeError(f"{key} must be a pruning rate with 0 <= rate < 1, got {spec}", "0.75 drops 75 %")
        return Fixed(spec)
    if not isinstance(spec, Mapping):
        raise RecipeError(f"{key} must be a number or a mapping with a kind, got {spec!r}", "for example 0.75")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise RecipeError(f"{key}.kind: unknown sampler {kind!r}", _did_you_mean(str(kind), list(SAMPLERS)))
    sampler_class = SAMPLERS[kind]
    names = {_RECIPE_NAMES.get(field.name, field.name): field for field in fields(sampler_class)}
    arguments: dict[str, Any] = {}
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in names:
            raise RecipeError(f"{key}.{name}: unknown key of {kind}", _did_you_mean(str(name), list(names)))
        argument = build_sampler(value, f"{key}.of") if name == "of" else value
        arguments[names[name].name] = tuple(argument) if isinstance(argument, list) else argument
    for name, field in names.items():
        if field.default is MISSING and field.name not in arguments:
            raise RecipeError(f"{key}.{name} is missing", f"{kind} takes {', '.join(names)}")
    try:
        return sampler_class(**arguments)
    except ValueError as error:  # raised by __post_init__, its message starts with the name of the key
        raise RecipeError(f"{key}.{error}") from error


def describe(sampler: RateSampler, num_units: int | None = None) -> dict[str, Any]:
    """Return a JSON-able record: kind and parameters as in the recipe, then `mean` and `percentiles` (5 to 95).

    The figures come from 4096 draws with seed 0, after any warm-up, for a video of `num_units` temporal units.
    """
    rates = [sampler.rate(0, i, step=2**62, num_units=num_units) for i in range(4096)]
    percentiles = np.percentile(rates, _PERCENTILES).round(4).tolist()
    figures = {
        "mean": round(float(np.mean(rates)), 4),
        "percentiles": dict(zip(map(str, _PERCENTILES), percentiles, strict=True)),
    }
    return _to_spec(sampler) | figures


def _to_spec(sampler: RateSampler) -> dict[str, Any]:
    """Return the mapping from which `build_sampler` makes an equal sampler."""
    spec: dict[str, Any] = {"kind": next(kind for kind, cls in SAMPLERS.items() if type(sampler) is cls)}
    for field_name, value in vars(sampler).items():
        name = _RECIPE_NAMES.get(field_name, field_name)
        if value is not None:
            plain = list(value) if isinstance(value, tuple) else value
            spec[name] = _to_spec(value) if isinstance(value, RateSampler) else plain
    return spec


def _scaled_beta(generator: np.random.Generator, mode: float, maximum: float) -> float:
    return float(generator.beta(*fit_beta(mode, maximum))) * maximum


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rate(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a pruning rate with 0 <= rate < 1, got {value!r}")


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
