"""Rate samplers: purity, distributions, recipe errors, and the cap in the arithmetic of the engines."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from evs_train.errors import RecipeError
from evs_train.samplers import SAMPLERS, build_sampler, cap_rate, describe, fit_beta

BETA: dict[str, Any] = {"kind": "beta", "mode": 0.75, "max": 0.83}
SPECS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "rate": 0.75},
    "uniform": {"kind": "uniform", "min": 0.1, "max": 0.9},
    "beta": BETA,
    "unit_beta": {"kind": "unit_beta", "mode": 0.75},
    "choice": {"kind": "choice", "rates": [0.0, 0.5, 0.75], "weights": [1, 1, 2]},
    "mixture": {"kind": "mixture", "dense": 0.2, "of": BETA},
    "warmup": {"kind": "warmup", "steps": 100, "of": BETA},
}


def draws(spec: float | dict[str, Any], count: int = 4000, seed: int = 1, **kwargs: Any) -> np.ndarray:
    sampler = build_sampler(spec)
    options = {"step": 10**6, "num_units": None} | kwargs
    return np.array([sampler.rate(seed, index, **options) for index in range(count)])


def test_every_kind_is_covered_here() -> None:
    assert set(SPECS) == set(SAMPLERS)


@pytest.mark.parametrize("kind", SPECS)
def test_rate_is_pure_and_within_range(kind: str) -> None:
    sampler = build_sampler(SPECS[kind])
    forward = {i: sampler.rate(7, i, step=i, num_units=8) for i in range(200)}
    order = list(range(200))
    random.Random(0).shuffle(order)
    shuffled = {i: build_sampler(SPECS[kind]).rate(7, i, step=i, num_units=8) for i in order}
    resumed = {i: build_sampler(SPECS[kind]).rate(7, i, step=i, num_units=8) for i in range(150, 200)}
    assert forward == shuffled
    assert resumed == {i: forward[i] for i in range(150, 200)}
    assert all(0 <= rate < 1 for rate in forward.values())


def test_seed_and_index_matter_and_neighbours_are_independent() -> None:
    spec = {"kind": "uniform", "min": 0.0, "max": 0.9}
    first, second = draws(spec, seed=1), draws(spec, seed=2)
    assert len(set(first)) == len(first)
    for a, b in [(first[:-1], first[1:]), (first, second)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_known_values_stay_the_same() -> None:
    """A change here changes the rates of every resumed run."""
    assert draws(BETA, 3, seed=0) == pytest.approx(GOLDEN_BETA, abs=1e-12)


GOLDEN_BETA = [0.6468400221466342, 0.6594901713043209, 0.8083367776910725]


def test_bare_number_is_fixed() -> None:
    assert build_sampler(0.75) == build_sampler(SPECS["fixed"])
    assert set(draws(0.75, 5)) == {0.75}
    assert set(draws(0, 5)) == {0.0}


def test_uniform_moments() -> None:
    rates = draws({"kind": "uniform", "min": 0.1, "max": 0.9})
    assert rates.mean() == pytest.approx(0.5, abs=0.015)
    assert rates.std() == pytest.approx(0.8 / 12**0.5, abs=0.01)
    assert rates.min() < 0.11
    assert rates.max() > 0.89


def test_beta_is_nvidias() -> None:
    assert fit_beta(0.75, 0.83) == pytest.approx((9.1417, 1.8683), abs=5e-5)
    rates = draws(BETA, 8000)
    assert np.percentile(rates, [5, 25, 50, 75, 95]) == pytest.approx([0.52, 0.64, 0.71, 0.76, 0.80], abs=0.01)
    assert rates.max() < 0.83


def test_fit_beta_weighs_the_mode_error_by_the_fourth_power() -> None:
    assert fit_beta(0.8, 0.83) == pytest.approx((3.6754, 1.1004), abs=5e-5)  # (7.2894, 1.2359) with a square


@pytest.mark.parametrize("mode", [0.0, 0.3, 0.7495, 0.75, 0.9])
def test_unit_beta_never_loses_its_mode(mode: float) -> None:
    """A mode very near the maximum is off the grid, and the fit would jump to a mean near 0."""
    for num_units in range(2, 60):
        rates = draws({"kind": "unit_beta", "mode": mode}, 50, num_units=num_units)
        assert np.median(rates) > 0.6 * min(mode, (num_units - 1) / num_units), num_units


@pytest.mark.parametrize(
    ("mode", "maximum"), [(0.998 * 0.83, 0.83), (0.1, 0.83), (0.5, 0.83), (0.82, 0.83), (0.3, 0.5)]
)
def test_fit_beta_peaks_at_the_mode(mode: float, maximum: float) -> None:
    alpha, beta = fit_beta(mode, maximum)
    assert (alpha - 1) / (alpha + beta - 2) * maximum == pytest.approx(mode, abs=1e-3)


def test_unit_beta_maximum_follows_the_video() -> None:
    spec = SPECS["unit_beta"]
    assert set(draws(spec, 20, num_units=1)) == {0.0}
    for num_units in (2, 4, 8, 64):
        rates = draws(spec, 2000, num_units=num_units)
        assert 0.9 * (num_units - 1) / num_units < rates.max() <= (num_units - 1) / num_units
    # T = 4 has its maximum at the mode: the shape is that of beta .75 on [0, .83], scaled.
    assert np.median(draws(spec, num_units=4)) == pytest.approx(0.706 * 0.75 / 0.83, abs=0.01)
    assert draws(spec, num_units=None).max() > 0.95


def test_choice_follows_the_weights() -> None:
    rates = draws(SPECS["choice"])
    assert [float(np.mean(rates == q)) for q in (0.0, 0.5, 0.75)] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    equal = draws({"kind": "choice", "rates": [0.0, 0.5]})
    assert float(np.mean(equal == 0.5)) == pytest.approx(0.5, abs=0.03)


def test_mixture_adds_a_point_mass_at_zero() -> None:
    rates = draws(SPECS["mixture"])
    assert float(np.mean(rates == 0)) == pytest.approx(0.2, abs=0.02)
    assert np.median(rates[rates > 0]) == pytest.approx(0.706, abs=0.01)


def test_nested_draws_are_independent_of_the_coin() -> None:
    """If coin and inner draw shared their random number, low inner rates would never survive the coin."""
    rates = draws({"kind": "mixture", "dense": 0.5, "of": {"kind": "uniform", "min": 0.1, "max": 0.9}})
    pruned = rates[rates > 0]
    assert pruned.mean() == pytest.approx(0.5, abs=0.02)
    assert pruned.min() < 0.12


def test_warmup_scales_linearly_up_to_its_last_step() -> None:
    sampler = build_sampler({"kind": "warmup", "steps": 4, "of": 0.8})
    rates = [sampler.rate(0, step, step=step, num_units=None) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 35, 256, 299])
def test_capped_rate_keeps_two_units_exactly(num_tokens: int) -> None:
    for num_units in range(1, 600):
        cap = cap_rate(0.999999, num_units)
        total = num_units * num_tokens
        kept = max(num_tokens, int(total * (1 - cap)))
        assert kept == min(total, 2 * num_tokens), (num_units, num_tokens, cap)
        assert cap_rate(cap * 0.9, num_units) == cap * 0.9


def test_cap_for_short_videos_and_identity_below() -> None:
    assert cap_rate(0.75, 1) == cap_rate(0.75, 2) == 0.0
    assert cap_rate(0.75, 3) == pytest.approx(1 / 3)
    assert cap_rate(0.75, 8) == 0.75
    assert cap_rate(0.75, 7) < 0.75


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fast", ["evs.rate", "number or a mapping"]),
        (True, ["evs.rate", "number or a mapping"]),
        ({"rate": 0.5}, ["evs.rate.kind", "None", "fixed, uniform"]),
        ({"kind": "uniforn", "min": 0, "max": 0.5}, ["evs.rate.kind", "uniforn", "did you mean uniform?"]),
        ({"kind": ["beta"], "mode": 0.5}, ["evs.rate.kind", "beta"]),
        ({"kind": "beta", "mdoe": 0.7}, ["evs.rate.mdoe", "did you mean mode?"]),
        ({"kind": "uniform", "min": 0}, ["evs.rate.max", "missing"]),
        (1.0, ["evs.rate must", "0 <= rate < 1", "1.0"]),
        (-0.1, ["evs.rate must", "-0.1"]),
        (float("nan"), ["evs.rate must", "nan"]),
        ({"kind": "fixed", "rate": 1}, ["evs.rate.rate", "0 <= rate < 1"]),
        ({"kind": "fixed", "rate": "0.5"}, ["evs.rate.rate", "'0.5'"]),
        ({"kind": "uniform", "min": 0.5, "max": 0.5}, ["evs.rate.max", "above min"]),
        ({"kind": "uniform", "min": 0, "max": 1}, ["evs.rate.max", "0 <= rate < 1"]),
        ({"kind": "beta", "mode": 0.83, "max": 0.83}, ["evs.rate.mode", "below max"]),
        ({"kind": "beta", "mode": 0.8299, "max": 0.83}, ["evs.rate.mode", "below max"]),
        ({"kind": "unit_beta", "mode": 1}, ["evs.rate.mode"]),
        ({"kind": "choice", "rates": []}, ["evs.rate.rates", "at least one"]),
        ({"kind": "choice", "rates": 0.5}, ["evs.rate.rates", "list"]),
        ({"kind": "choice", "rates": [0, 1.2]}, ["evs.rate.rates[1]", "1.2"]),
        ({"kind": "choice", "rates": [0, 0.5], "weights": [1]}, ["evs.rate.weights", "2 positive numbers"]),
        ({"kind": "choice", "rates": [0, 0.5], "weights": [1, 0]}, ["evs.rate.weights", "positive", "(1, 0)"]),
        ({"kind": "mixture", "dense": 1.5, "of": 0.5}, ["evs.rate.dense", "[0, 1]"]),
        ({"kind": "mixture", "dense": 0.2, "of": {"kind": "fixed", "rate": 2}}, ["evs.rate.of.rate", "2"]),
        ({"kind": "warmup", "steps": 0, "of": 0.5}, ["evs.rate.steps", "at least 1"]),
    ],
)
def test_bad_recipes_name_the_key(spec: Any, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        build_sampler(spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", SPECS)
def test_describe_is_json_and_builds_the_same_sampler(kind: str) -> None:
    sampler = build_sampler(SPECS[kind])
    record = describe(sampler)
    assert json.loads(json.dumps(record)) == record == describe(build_sampler(SPECS[kind]))
    figures = {"mean", "percentiles"}
    assert build_sampler({name: value for name, value in record.items() if name not in figures}) == sampler


def test_describe_figures() -> None:
    record = describe(build_sampler(SPECS["warmup"]))  # described as it is after the warm-up
    assert record["of"] == BETA
    assert list(record["percentiles"].values()) == pytest.approx([0.52, 0.64, 0.71, 0.76, 0.80], abs=0.01)
    assert record["mean"] == pytest.approx(0.69, abs=0.01)
    assert describe(build_sampler(SPECS["unit_beta"]), num_units=2)["percentiles"]["95"] < 0.5
