"""All fits of a table of loss points, architecture by architecture, and the file fit.json that holds them."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from eval.scaling_laws.bootstrap import (
    FEW_SIZES,
    LEVEL,
    Samples,
    arrays,
    resample_seeds,
    resample_trunks,
    seed_deviation,
)
from eval.scaling_laws.compare import FlopsRatio, Side, compare, extrapolated
from eval.scaling_laws.frontier import NoBestSizeError, Optimum, flops_from_points, optimum
from eval.scaling_laws.huber import fit_huber
from eval.scaling_laws.isoflop import Approach2, fit_budgets, group_by_budget
from eval.scaling_laws.points import LossPoint, Table, ends_in_words
from eval.scaling_laws.predict import Prediction, predict
from eval.scaling_laws.surface import Fit, Surface
from eval.scaling_laws.vpnls import fit_vpnls
from xlstm_lm.base.read_files import read_json

QUANTITIES = {
    "E": lambda surface: surface.E,
    "alpha": lambda surface: surface.alpha,
    "beta": lambda surface: surface.beta,
    "a": lambda surface: surface.exponent_of_params,
}
"""Values of a surface that get an interval; a is the exponent of N* in C."""
LARGEST = {"a": 1.0}
"""Largest possible value of a quantity; none is below 0."""
FAR_APART = 0.1
"""Relative difference of the exponents of both fits from which on the report warns."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Choices of a fit."""

    form: Literal["chinchilla", "gamma", "isoflop"] = "chinchilla"
    """Surface with gamma 1 or any, or parabolas alone."""
    objective: Literal["vpnls", "huber"] = "vpnls"
    """Fit that the frontier, forecasts and comparisons use."""
    samples: int = 200
    """Samples for intervals; 0 for none."""
    hold_out: int = 0
    """Points of the largest compute of each architecture that are predicted from the others."""
    seed: int = 0
    """Seed of all draws."""


@dataclass(frozen=True)
class HeldOut:
    """A measured loss and its prediction from smaller runs."""

    run: str
    params: float
    tokens: float
    flops: float
    measured: float
    predicted: Prediction | None
    """None without samples."""
    expected: float
    """Predicted loss."""


@dataclass(kw_only=True)
class ArchitectureFit:
    """The fits of one architecture."""

    architecture: str
    points: list[LossPoint]
    trunks: int
    fits: dict[str, Fit] = field(default_factory=dict)
    """By method; empty for isoflop alone."""
    chosen: str = ""
    """Method of the fit that is used."""
    samples: list[Surface] = field(default_factory=list)
    """Surfaces of trunks drawn again."""
    widening: float = 1.0
    """Factor of `Samples`."""
    by_trunk: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals by drawing trunks."""
    by_seed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals from the spread of seeds alone; empty where no run was repeated with another seed."""
    frontier: list[Optimum] = field(default_factory=list)
    """Best sizes at budgets over the measured range."""
    isoflop: Approach2 | None = None
    """Parabolas; None where the points are no grids."""
    held_out: list[HeldOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def fit(self) -> Fit:
        """The chosen fit."""
        return self.fits[self.chosen]

    @property
    def drawn(self) -> Samples:
        """The samples of the chosen fit."""
        return Samples(self.samples, self.widening)


@dataclass(frozen=True)
class Fits:
    """All fits of a table."""

    options: FitOptions
    architectures: list[ArchitectureFit]
    comparisons: list[FlopsRatio]
    notes: list[str]
    """Notes of the table, and comparisons that were refused."""

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for fit.json."""
        return dataclasses.asdict(self)

    def of(self, architecture: str) -> ArchitectureFit:
        """The fits of an architecture.

        Raises:
            ValueError: there are none.
        """
        found = {each.architecture: each for each in self.architectures}
        if architecture not in found:
            raise ValueError(f"The fit has no architecture {architecture}; it has {', '.join(found)}.")
        return found[architecture]


def fit_table(table: Table, options: FitOptions) -> Fits:
    """Fit every architecture of a table, and compare each pair.

    Raises:
        ValueError: the points of an architecture cannot be fitted; names it.
    """
    table = with_best_rates(table)
    found = []
    for architecture in table.architectures:
        try:
            found.append(_fit_architecture(architecture, table.of(architecture), options))
        except ValueError as error:
            raise ValueError(f"{architecture}: {error}") from None
    notes = [*table.notes, *_check_notes(table), *_schedule_notes(table)]
    comparisons = []
    if options.form != "isoflop":
        sides = [Side(each.architecture, each.points, each.fit) for each in found]
        for one, other in combinations(sides, 2):
            try:
                comparisons.append(compare(one, other, None, options.samples, options.seed))
                notes += extrapolated((one, other), comparisons[-1].loss)
            except ValueError as error:
                notes.append(str(error))
    return Fits(options, found, comparisons, notes)


def with_best_rates(table: Table) -> Table:
    """Keep, of each size trained at several learning rates, the points of the best rate.

    The best rate has the lowest loss at the largest number of tokens that was reached at several rates.
    """
    groups: dict[tuple[str, float], list[LossPoint]] = defaultdict(list)
    for point in table.points:
        groups[point.architecture, point.params].append(point)
    kept, notes = [], list(table.notes)
    for (architecture, params), points in groups.items():
        rates = {point.learning_rate for point in points}
        if len(rates) > 1:
            shared = [
                tokens
                for tokens in {point.tokens for point in points}
                if len({point.learning_rate for point in points if point.tokens == tokens}) > 1
            ]
            if not shared:
                raise ValueError(
                    f"{architecture} with {params:,.0f} parameters has learning rates {', '.join(map(str, rates))} at "
                    "no common number of tokens, thus the best is not known: remove the rows of all but one."
                )
            at_end = [point for point in points if point.tokens == max(shared)]
            best = min(at_end, key=lambda point: point.loss).learning_rate
            notes.append(f"{architecture}, {params:,.0f} parameters: of rates {_listed(rates)} {best:g} is used.")
            points = [point for point in points if point.learning_rate == best]
        kept += points
    return Table(kept, notes, table.checks)


def _check_notes(table: Table) -> list[str]:
    """The difference of each straight run to the branch that it repeats."""
    notes = []
    for check in table.checks:
        same = [
            point
            for point in table.of(check.architecture)
            if (point.params, point.tokens, point.seed) == (check.params, check.tokens, check.seed)
        ]
        notes += [
            f"{check.run}, straight through: loss {check.loss:.4f}, {check.loss - point.loss:+.4f} to its branch."
            for point in same
        ]
    return notes


def _schedule_notes(table: Table) -> list[str]:
    """A note that the losses come from several schedules, if they do."""
    architectures: dict[str, dict[str, None]] = defaultdict(dict)
    for point in table.points:
        if point.schedule:
            architectures[point.schedule_in_words][point.architecture] = None
    if len(architectures) < 2:
        return []
    listed = "; ".join(f"{schedule} ({', '.join(names)})" for schedule, names in architectures.items())
    return [f"The points have several schedules, which change the loss by themselves: {listed}."]


def _listed(rates: set) -> str:
    return ", ".join(f"{rate:g}" if rate is not None else "unknown" for rate in sorted(rates, key=lambda x: x or 0))


def _fit_architecture(name: str, points: list[LossPoint], options: FitOptions) -> ArchitectureFit:
    found = ArchitectureFit(architecture=name, points=points, trunks=len({point.group for point in points}))
    grids = [group for group in group_by_budget(points) if len({each.params for each in group}) >= 3]
    if options.form == "isoflop" or len(grids) >= 2:
        try:
            found.isoflop = fit_budgets(points)
            found.warnings += found.isoflop.warnings
        except ValueError:
            if options.form == "isoflop":
                raise
    if options.form == "isoflop":
        return found
    _fit_surfaces(found, options)
    flops = [point.flops for point in points]
    steps = 13
    budgets = [min(flops) * (max(flops) / min(flops)) ** (step / (steps - 1)) for step in range(steps)]
    flops_per_token = flops_from_points(points)
    try:
        found.frontier = [optimum(found.fit.surface, flops_per_token, each) for each in budgets]
    except NoBestSizeError as error:
        found.warnings.append(str(error))
    found.warnings += _untrained_sizes(found)
    if options.hold_out:
        found.held_out = _hold_out(points, options)
    return found


def _untrained_sizes(found: ArchitectureFit) -> list[str]:
    """A warning that best sizes of the frontier are smaller or larger than all trained ones, if some are."""
    sizes = [point.params for point in found.points]
    smallest, largest = min(sizes), max(sizes)
    warnings = []
    for outside, remedy in (
        ([each for each in found.frontier if each.params < smallest], "smaller sizes, or with more tokens"),
        ([each for each in found.frontier if each.params > largest], "larger sizes, or with fewer tokens"),
    ):
        if outside:
            flops, best = (ends_in_words(getattr(each, name) for each in outside) for name in ("flops", "params"))
            warnings.append(
                f"Best sizes at {flops} FLOPs, {best} parameters, are outside the trained ones, "
                f"{ends_in_words(sizes)}: the frontier extrapolates there. Train {remedy}."
            )
    return warnings


def _fit_surfaces(found: ArchitectureFit, options: FitOptions) -> None:
    """Fit by all methods, with intervals and warnings."""
    n, d, loss = arrays(found.points)
    if options.form == "gamma":
        found.fits = {"huber": fit_huber(n, d, loss, free_gamma=True)}
        found.chosen = "huber"
    else:
        found.fits = {"vpnls": fit_vpnls(n, d, loss), "huber": fit_huber(n, d, loss)}
        found.chosen = options.objective
    for method, fit in found.fits.items():
        found.warnings += [
            f"{method}: {bound}, its bound: the points do not determine this parameter." for bound in fit.bounds
        ]
    if len(found.fits) == 2:
        one, other = (fit.surface.exponent_of_params for fit in found.fits.values())
        if abs(one / other - 1) > FAR_APART:
            found.warnings.append(
                f"The two fits give N* the exponents {one:.3f} and {other:.3f}: outliers or too little data."
            )
    if options.samples:
        _add_intervals(found, options)


def _add_intervals(found: ArchitectureFit, options: FitOptions) -> None:
    drawn = resample_trunks(found.points, found.fit, options.samples, options.seed)
    found.samples, found.widening = drawn.surfaces, drawn.widening
    found.by_trunk = _intervals(drawn, found.fit)
    sizes = len({point.params for point in found.points})
    if sizes < FEW_SIZES:
        found.warnings.append(
            f"{sizes} sizes: intervals by trunk are too narrow below {FEW_SIZES}; with 4 about 80 % of those of "
            f"{LEVEL:.0%} hold the true value."
        )
    if deviation := seed_deviation(found.points):
        by_seed = resample_seeds(found.points, found.fit, deviation[0], options.samples, options.seed)
        found.by_seed = _intervals(by_seed, found.fit)


def _intervals(samples: Samples, fit: Fit) -> dict[str, tuple[float, float]]:
    """Intervals of the quantities, cut off at the values that a surface can have, which widening may pass."""
    found = {name: samples.interval(value, value(fit.surface)) for name, value in QUANTITIES.items()}
    return {name: (_cut(low, name), _cut(high, name)) for name, (low, high) in found.items()}


def _cut(value: float, name: str) -> float:
    """The nearest possible value of a quantity; NaN stays."""
    return value if math.isnan(value) else min(max(value, 0.0), LARGEST.get(name, math.inf))


def _hold_out(points: Sequence[LossPoint], options: FitOptions) -> list[HeldOut]:
    """Predict the points of the largest compute from the others."""
    ordered = sorted(points, key=lambda point: point.flops)
    rest, held = ordered[: -options.hold_out], ordered[-options.hold_out :]
    n, d, loss = arrays(rest)
    if options.form == "gamma" or options.objective == "huber":
        fit = fit_huber(n, d, loss, free_gamma=options.form == "gamma")
    else:
        fit = fit_vpnls(n, d, loss)
    samples = resample_trunks(rest, fit, options.samples, options.seed) if options.samples else None
    found = []
    for point in held:
        predicted = predict(fit, samples, rest, point.params, point.tokens) if samples else None
        expected = float(fit.surface.loss(point.params, point.tokens))
        found.append(HeldOut(point.run, point.params, point.tokens, point.flops, point.loss, predicted, expected))
    return found


def read_fits(path: Path) -> Fits:
    """Read fit.json.

    Raises:
        ValueError: the file is missing or damaged.
    """
    remedy = "Write it with python -m eval.scaling_laws fit ... --out FILE."
    values = read_json(path, {"architectures": list, "options": dict}, remedy)
    try:
        return TypeAdapter(Fits).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}. {remedy}") from None
