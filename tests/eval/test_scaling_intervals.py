"""Intervals of fits, predictions, and the comparison of architectures at equal loss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eval.scaling_laws.bootstrap import Samples, resample_seeds, resample_trunks, seed_deviation, t_factor
from eval.scaling_laws.compare import Side, compare, overlap
from eval.scaling_laws.fits import QUANTITIES, FitOptions, fit_table
from eval.scaling_laws.points import Table
from eval.scaling_laws.predict import predict
from eval.scaling_laws.surface import Surface
from eval.scaling_laws.vpnls import fit_vpnls
from tests.eval.invented_points import CHINCHILLA, columns, isoflop_grid, ladder, point

SIZES = np.geomspace(1e7, 1e9, 8)
RATIOS = np.array([5, 10, 20, 40, 80])


def side(points) -> Side:
    return Side(points[0].architecture, points, fit_vpnls(*columns(points)))


@pytest.mark.slow
def test_intervals_hold_the_true_value_as_often_as_they_say():
    """Over 200 data sets; the band holds a true rate of 90 % with probability 0.99."""
    hits = np.zeros(3)
    for number in range(200):
        points = ladder(CHINCHILLA, SIZES, RATIOS, noise=(0.003, 0.002), seed=number)
        fit = fit_vpnls(*columns(points))
        samples = resample_trunks(points, fit, 80, seed=number)
        rng = np.random.default_rng(1000 + number)
        measured = CHINCHILLA.loss(2e9, 4e10) * np.exp(0.003 * rng.normal() + 0.002 * rng.normal())
        for place, value in enumerate((QUANTITIES["alpha"], QUANTITIES["beta"])):
            low, high = samples.interval(value, value(fit.surface))
            hits[place] += low <= value(CHINCHILLA) <= high
        hits[2] += predict(fit, samples, points, 2e9, 4e10).holds(measured)
    assert (hits / 200 >= 0.82).all() and (hits / 200 <= 0.97).all(), hits / 200


def test_branches_of_a_trunk_are_drawn_together():
    points = ladder(CHINCHILLA, SIZES[::2], RATIOS, noise=(0.01, 0.0))
    together = resample_trunks(points, fit_vpnls(*columns(points)), 40)
    alone = [dataclasses.replace(each, trunk=each.run) for each in points]
    apart = resample_trunks(alone, fit_vpnls(*columns(points)), 40)
    spreads = [np.std([surface.E for surface in samples.surfaces]) for samples in (together, apart)]
    assert spreads[0] > 1.5 * spreads[1]
    assert together.widening == t_factor(4) > apart.widening


def test_intervals_end_at_the_values_that_a_surface_can_have():
    """Widening for few trunks would put the irreducible loss below zero."""
    points = ladder(CHINCHILLA, SIZES[:4], RATIOS, noise=(0.02, 0.01))
    (found,) = fit_table(Table(points), FitOptions(samples=40)).architectures
    drawn = Samples(found.samples, found.widening)
    raw = {name: drawn.interval(value, value(found.fit.surface)) for name, value in QUANTITIES.items()}
    assert raw["E"][0] < 0 == found.by_trunk["E"][0]
    assert found.by_trunk["beta"] == raw["beta"]


@pytest.mark.parametrize(("sizes", "tokens", "wanted"), [(SIZES[3:7], 1e7, "smaller"), (SIZES[:4], 1e11, "larger")])
def test_best_sizes_beyond_the_trained_ones_are_named(sizes, tokens, wanted):
    """Sizes that are all too large, or too small, for their compute, in a fit and in a comparison."""
    points = [
        point(CHINCHILLA, params, tokens * factor, architecture=name, trunk=f"{name}-{params:g}")
        for name in ("one", "other")
        for params in sizes
        for factor in (1, 2, 4, 8)
    ]
    fits = fit_table(Table(points), FitOptions(samples=0))
    (warning,) = (text for text in fits.of("one").warnings if text.startswith("Best sizes at"))
    assert f"outside the trained ones, {sizes[0]:.3g} to {sizes[-1]:.3g}" in warning
    assert f"Train {wanted} sizes" in warning
    assert sum("the FLOPs ratio extrapolates" in text for text in fits.notes) == 2


def test_too_few_trunks_are_refused():
    points = ladder(CHINCHILLA, SIZES[::3], RATIOS)
    with pytest.raises(ValueError, match=r"3 trunks are too few to draw from; intervals need at least 4"):
        resample_trunks(points, fit_vpnls(*columns(points)), 2)


def test_draws_that_determine_no_surface_are_drawn_again():
    full = ladder(CHINCHILLA, SIZES[:4], RATIOS[:1], noise=(0.003, 0.003))
    tokens = [1e8, 1e9, 1e10]
    points = [
        dataclasses.replace(each, tokens=count, run=f"{each.run}-{count}", loss=CHINCHILLA.loss(each.params, count))
        for number, each in enumerate(full)
        for count in (tokens if number == 3 else tokens[:2])
    ]
    # Only one trunk has the third number of tokens, and a third of the draws of 3 sizes leave it out.
    fit = fit_vpnls(*columns(points))
    assert len(resample_trunks(points, fit, 20).surfaces) == 20


def test_the_spread_of_seeds():
    points = ladder(CHINCHILLA, SIZES[:4], RATIOS)
    assert seed_deviation(points) is None
    again = [
        dataclasses.replace(points[0], seed=seed, loss=points[0].loss * np.exp(shift), run=f"r{seed}", trunk=f"r{seed}")
        for seed, shift in ((1, 0.01), (2, -0.01))
    ]
    deviation, freedom = seed_deviation(points + again)
    assert (deviation, freedom) == (pytest.approx(0.01), 2)
    other = [dataclasses.replace(each, cooldown_shape="1-sqrt") for each in again[1:]]
    assert seed_deviation(points + again[:1] + other)[1] == 1, "a run of another schedule is no repetition"
    given = [dataclasses.replace(each, loss_std=std * each.loss) for each, std in zip(points, (0.01, 0.02))]
    assert seed_deviation(given + points[2:]) == (pytest.approx((2.5e-4) ** 0.5), 2)
    fit = fit_vpnls(*columns(points))
    wide, narrow = (resample_seeds(points, fit, each, 30) for each in (0.01, 0.001))
    wide, narrow = (np.std([surface.beta for surface in each.surfaces]) for each in (wide, narrow))
    assert wide > 5 * narrow > 0 or wide > 0.0 == narrow


def test_a_prediction_has_the_spread_of_single_runs():
    points = ladder(CHINCHILLA, SIZES, RATIOS, noise=(0.0, 0.01))
    fit = fit_vpnls(*columns(points))
    found = predict(fit, resample_trunks(points, fit, 60), points, 1e8, 2e9)
    expected = CHINCHILLA.loss(1e8, 2e9)
    assert found.loss == pytest.approx(expected, rel=0.01)
    assert found.high - found.low > 2 * 1.2 * 0.01 * expected  # at least 1.2 deviations to each side
    assert found.holds(found.loss) and not found.holds(found.loss * 1.2)


def test_the_ratio_of_flops_at_equal_loss_is_found():
    one = side(isoflop_grid(CHINCHILLA, 4, count=5, architecture="one"))
    # The same surface for half the tokens: every loss costs twice the FLOPs.
    other_surface = Surface(1.69, 406.4, 410.7 * 2**0.28, 0.34, 0.28)
    other = side(isoflop_grid(other_surface, 4, count=5, architecture="other"))
    found = compare(other, one, loss=2.8)
    assert found.ratio == pytest.approx(2, rel=1e-4) and found.interval is None
    assert compare(one, other).ratio == pytest.approx(0.5, rel=1e-3)


def test_paired_noise_cancels_in_the_interval():
    def sides(seed: int) -> tuple[Side, Side]:
        noise = (0.01, 0.0)
        return (
            side(ladder(CHINCHILLA, SIZES, RATIOS, noise, seed=0, architecture="one")),
            side(ladder(CHINCHILLA, SIZES, RATIOS, noise, seed=seed, architecture="other")),
        )

    paired, unpaired = (compare(*sides(seed), samples=40).interval for seed in (0, 1))
    assert paired == pytest.approx((1, 1))
    assert unpaired[1] / unpaired[0] > 1.05


def test_a_loss_beyond_what_both_measured_is_refused():
    one = side(isoflop_grid(CHINCHILLA, 4, count=5, architecture="one"))
    low, high = overlap(one.points, one.points)
    for loss in (low - 0.01, high + 0.01):
        with pytest.raises(ValueError, match="beyond what both one and one have measured"):
            compare(one, one, loss=loss)
    far = side([dataclasses.replace(each, loss=each.loss + 9, architecture="far") for each in one.points])
    with pytest.raises(ValueError, match="measured losses of one and far do not overlap"):
        compare(one, far)


def test_unknown_flops_of_a_point_follow_from_tokens():
    found = point(CHINCHILLA, 1e7, 1e9)
    assert found.flops == 6e16 and found.group == found.run
