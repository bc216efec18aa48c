"""Fits of the loss surface: exact on noise-free points, with the biases that Approach 2 is known to have."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.special import huber

from eval.scaling_laws.frontier import flops_from_points, flops_to_reach, optimum
from eval.scaling_laws.huber import fit_huber
from eval.scaling_laws.isoflop import fit_budgets, fit_parabola
from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.surface import Surface
from eval.scaling_laws.vpnls import fit_vpnls
from tests.eval.invented_points import ASYMMETRIC, CHINCHILLA, SYMMETRIC, best_tokens, columns, isoflop_grid

PARAMETERS = ("E", "A", "B", "alpha", "beta")
surfaces = pytest.mark.parametrize("surface", [SYMMETRIC, CHINCHILLA, ASYMMETRIC], ids=["equal", "chinchilla", "far"])


@pytest.mark.parametrize(("surface", "width"), [(SYMMETRIC, 16), (CHINCHILLA, 2), (ASYMMETRIC, 16)])
@pytest.mark.parametrize(("fit", "precision"), [(fit_vpnls, 1e-6), (fit_huber, 1e-4)], ids=["vpnls", "huber"])
def test_every_parameter_of_a_noise_free_surface_is_found(surface, width, fit, precision):
    found = fit(*columns(isoflop_grid(surface, width)))
    for name in PARAMETERS:
        assert getattr(found.surface, name) == pytest.approx(getattr(surface, name), rel=precision)
    assert found.bounds == [] and found.points == 75 and found.objective < 1e-15


def test_gamma_is_found():
    surface = Surface(1.5, 300.0, 600.0, 0.5, 0.4, gamma=0.7)
    found = fit_huber(*columns(isoflop_grid(surface, 16)), free_gamma=True).surface
    assert found.gamma == pytest.approx(0.7, rel=1e-3)
    assert found.loss(1e8, 1e10) == pytest.approx(surface.loss(1e8, 1e10), rel=1e-6)


def test_weights_count_points():
    n, d, loss = columns(isoflop_grid(CHINCHILLA, 4, count=5))
    loss = loss * np.exp(0.01 * np.random.default_rng(0).normal(size=len(loss)))
    twice = np.ones(len(n))
    twice[:7] = 2
    weighted = fit_vpnls(n, d, loss, twice).surface
    repeated = fit_vpnls(*(np.concatenate([each, each[:7]]) for each in (n, d, loss))).surface
    assert (weighted.alpha, weighted.beta) == pytest.approx((repeated.alpha, repeated.beta), rel=1e-6)


@pytest.mark.parametrize("fit", [fit_vpnls, fit_huber])
def test_a_fit_of_noisy_losses_is_a_minimum(fit):
    n, d, loss = columns(isoflop_grid(CHINCHILLA, 4, count=5))
    loss = loss * np.exp(0.01 * np.random.default_rng(1).normal(size=len(loss)))

    def objective(surface: Surface) -> float:
        expected = surface.loss(n, d)
        if fit is fit_vpnls:
            return float(np.sum((loss - expected) ** 2))
        return float(np.sum(huber(1e-3, np.log(expected / loss))))

    found = fit(n, d, loss)
    assert found.objective == pytest.approx(objective(found.surface), rel=1e-9)
    for name in PARAMETERS:
        for factor in (0.999, 1.001):
            moved = dataclasses.replace(found.surface, **{name: factor * getattr(found.surface, name)})
            assert objective(moved) > found.objective


def test_huber_is_robust_where_least_squares_is_not():
    n, d, loss = columns(isoflop_grid(CHINCHILLA, 4))
    loss[10] *= 1.5
    robust, squares = fit_huber(n, d, loss).surface, fit_vpnls(n, d, loss).surface
    assert abs(robust.alpha - 0.34) < 0.01 < abs(squares.alpha - 0.34)


def test_a_minimum_at_a_bound_is_named():
    points = columns(isoflop_grid(Surface(0.0, 406.4, 410.7, 0.34, 0.28), 4, count=5))
    assert fit_vpnls(*points).bounds == ["E = 0"]
    assert fit_huber(*points).bounds == ["E = 0"]
    flat = columns(isoflop_grid(CHINCHILLA, 4))
    without = 3 + 400 * flat[1] ** -0.3
    assert "A = 0" in fit_vpnls(flat[0], flat[1], without).bounds


def test_an_exponent_within_a_hundredth_of_its_bound_is_named():
    at_bounds = Surface(1.0, 1.0, 1.0, 2.98, 0.0201)
    assert at_bounds.bounds([1.0], [1.0]) == ["alpha = 2.98", "beta = 0.0201"]
    assert Surface(1.0, 1.0, 1.0, 2.96, 0.0203).bounds([1.0], [1.0]) == []


def test_separate_minima_are_shown():
    rng = np.random.default_rng(8)
    n, d, _ = columns(isoflop_grid(CHINCHILLA, 2, count=4))
    found = fit_vpnls(n, d, 3 + 0.3 * rng.random(len(n)))
    assert found.runner_up is not None and found.runner_up > found.objective


def test_too_few_points_are_refused():
    n, d, loss = columns(isoflop_grid(CHINCHILLA, 4))
    with pytest.raises(ValueError, match="2 different values of params, but a surface needs at least 3"):
        fit_vpnls(np.where(n > 1e9, 1e9, 1e8), d, loss)
    with pytest.raises(ValueError, match="4 loss points for a surface of 5 parameters"):
        fit_huber(n[:4], d[:4], loss[:4])


# Numbers of SCALING.md, section 3, computed once from the closed forms: Approach 2 is known to have these biases.
@pytest.mark.parametrize(
    ("surface", "width", "exponent", "intercept", "true_intercept"),
    [
        (SYMMETRIC, 16, 0.5, -0.389076, -0.389076),
        (CHINCHILLA, 16, 0.548387, -0.578092, -0.555357),
        (CHINCHILLA, 2, 0.548387, -0.556779, -0.555357),
        (ASYMMETRIC, 16, 0.75, -1.459957, -1.345791),
        (ASYMMETRIC, 2, 0.75, -1.353126, -1.345791),
    ],
)
def test_approach_2_has_its_known_bias(surface, width, exponent, intercept, true_intercept):
    found = fit_budgets(isoflop_grid(surface, width))
    assert found.b == pytest.approx(exponent, abs=1e-6)
    assert found.d0 == pytest.approx(intercept, abs=1e-6)
    true = np.polyfit([17, 21], np.log10(best_tokens(surface, np.array([1e17, 1e21]))), 1)
    assert true[1] == pytest.approx(true_intercept, abs=1e-6)
    # With C = 6 N D both parabolas are one.
    assert found.a + found.b == pytest.approx(1) and found.n0 + found.d0 == pytest.approx(-math.log10(6))
    assert [("span" in each) for each in found.warnings] == ([True] * 5 if width > 2 else [])


def test_a_parabola_is_exact():
    x = np.geomspace(1e6, 1e8, 7)
    found = fit_parabola(x, 3 + 0.4 * (np.log10(x) - 7.2) ** 2)
    assert (math.log10(found.minimum), found.loss, found.curvature) == pytest.approx((7.2, 3, 0.4))


def test_minima_that_are_not_bracketed_or_centered_are_named():
    def warnings(low: float, high: float) -> list[str]:
        points = isoflop_grid(CHINCHILLA, 8, count=29)
        best = {each.flops: best_tokens(CHINCHILLA, each.flops) for each in points}
        return fit_budgets([each for each in points if low < each.tokens / best[each.flops] < high]).warnings

    assert len(warnings(0.25, 0.9)) == len(warnings(0.32, 1.2)) == 5
    assert all("is not bracketed by its sizes" in each and "add smaller" in each for each in warnings(0.25, 0.9))
    assert all("grid widths off the middle" in each for each in warnings(0.32, 1.2))
    assert warnings(0.6, 1.8) == []


@surfaces
@pytest.mark.parametrize("flops", [1e17, 1e22])
def test_the_frontier_is_that_of_the_closed_form(surface, flops):
    found = optimum(surface, lambda params: 6 * params, flops)
    assert found.tokens == pytest.approx(best_tokens(surface, flops), rel=1e-5)
    assert found.loss == pytest.approx(surface.loss(found.params, found.tokens))
    assert flops_to_reach(surface, lambda params: 6 * params, found.loss) == pytest.approx(flops, rel=1e-4)


def test_the_frontier_uses_the_architectures_own_flops():
    def own(params: float) -> float:
        return 6 * params + 3e4 * params**0.5

    found = optimum(CHINCHILLA, own, 1e18)
    assert found.tokens * own(found.params) == pytest.approx(1e18)
    for factor in (0.98, 1.02):
        params = found.params * factor
        assert CHINCHILLA.loss(params, 1e18 / own(params)) > found.loss
    assert found.loss > optimum(CHINCHILLA, lambda params: 6 * params, 1e18).loss


def test_flops_are_interpolated_between_models():
    def own(params: float) -> float:
        return 6 * params + 3e4 * params**0.5

    points = [
        dataclasses.replace(each, flops=own(each.params) * each.tokens) for each in isoflop_grid(CHINCHILLA, 4, count=5)
    ]
    found = flops_from_points(points)
    assert found(3.3e8) == pytest.approx(own(3.3e8), rel=1e-3)
    assert list(found(np.array([1e8, 1e9]))) == pytest.approx([own(1e8), own(1e9)], rel=1e-3)
    largest = max(each.params for each in points)
    assert found(100 * largest) == pytest.approx(100 * own(largest))


def test_flops_between_two_models_are_a_power_of_parameters():
    points = [LossPoint(params=n, tokens=1e6, flops=1e6 * c, loss=2.0) for n, c in ((1e5, 8e5), (4e5, 1.2e7))]
    found = flops_from_points(points)
    assert [found(n) for n in (1e5, 2e5, 4e5)] == pytest.approx([8e5, math.sqrt(8e5 * 1.2e7), 1.2e7])


def test_a_loss_below_the_irreducible_one_is_out_of_reach():
    assert flops_to_reach(CHINCHILLA, lambda params: 6 * params, 1.69) == math.inf


PUBLIC = os.environ.get("XLSTM_LM_CHINCHILLA_CSV")


@pytest.mark.skipif(not PUBLIC, reason="XLSTM_LM_CHINCHILLA_CSV names no file")
def test_the_public_points_of_chinchilla():
    """The file is svg_extracted_data.csv of epoch-research/analyzing-chinchilla; its last 5 rows are outliers."""
    with Path(PUBLIC).open() as file:
        rows = list(csv.DictReader(file))
    n = np.array([float(row["Model Size"]) for row in rows])
    d = np.array([float(row["Training Tokens"]) for row in rows])
    loss = np.array([float(row["loss"]) for row in rows])
    found = fit_huber(n[:240], d[:240], loss[:240])
    assert found.objective == pytest.approx(1.0182740e-3, rel=1e-5)
    expected = (1.81722, 477.83, 2143.4, 0.34731, 0.36717)
    assert [getattr(found.surface, name) for name in PARAMETERS] == pytest.approx(expected, rel=2e-3)
    assert fit_huber(n, d, loss).objective == pytest.approx(1.8260105e-3, rel=1e-5)


ISOFLOPS = os.environ.get("XLSTM_LM_ISOFLOPS_CSV")


@pytest.mark.skipif(not ISOFLOPS, reason="XLSTM_LM_ISOFLOPS_CSV names no file")
@pytest.mark.parametrize(
    ("experiment", "count", "expected", "squares", "exponent"),
    [
        ("epochai_chinchilla__massivetext__chinchilla", 85, (1.9001, 4.4406, 1.0672, 0.3752, 0.4310), 0.021666, 0.4586),
        ("llama_3__exp_loss", 115, (1.8611, 2.2155, 0.5023, 0.3618, 0.3731), 0.0044, 0.5047),
    ],
)
def test_the_public_isoflop_points(experiment, count, expected, squares, exponent):
    """The file is isoflops.csv of Open-Athena/scaling-law-analysis; A and B stand for N in millions, D in billions."""
    with Path(ISOFLOPS).open() as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == experiment and row["outlier"] == "False"]
    assert len(rows) == count
    n, d, c, loss = np.array([[float(row[name]) for name in ("params", "tokens", "budget", "loss")] for row in rows]).T
    found = fit_vpnls(n / 1e6, d / 1e9, loss)
    assert [getattr(found.surface, name) for name in PARAMETERS] == pytest.approx(expected, rel=2e-4)
    assert found.objective == pytest.approx(squares, rel=0.01)
    points = [
        LossPoint(run=str(number), params=row[0], tokens=row[1], flops=row[2], loss=row[3])
        for number, row in enumerate(zip(n, d, c, loss))
    ]
    assert fit_budgets(points).b == pytest.approx(exponent, abs=1e-4)
