"""Selections from the results of a comparison; the writers of the report use no other source.

Lower is better of every quantity. Only finished runs count, and only finite values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from eval.compare.results import ModelResult, Published, Results, Run
from eval.study.spread import Difference, Spread, difference, spread

Value = Callable[[Run], float | None]
Points = dict[int, float]


@dataclass(frozen=True)
class Quantity:
    """A number that ranks runs; lower is better."""

    name: str
    short: str
    """Name of the figure on a picture's axis."""
    decimals: int
    of: Value


def tested(field: str) -> Value:
    """A figure of the test documents, of a run that was tested."""
    return lambda run: run.tested and getattr(run.tested, field)


def validated(field: str) -> Value:
    """A figure of the last validation, of a run that was validated."""
    return lambda run: getattr(run.curve[-1], field) if run.curve else None


QUANTITIES = TEST_BITS, TEST_LOSS, VALIDATION_BITS, VALIDATION_LOSS = tuple(
    Quantity(f"{unit} on the {documents} documents", f"{unit}, {documents}", 4, figure_of(field))
    for documents, figure_of in (("test", tested), ("validation", validated))
    for unit, field in (("bits per byte", "bits_per_byte"), ("nats per token", "loss"))
)


# Models and runs


def sizes_of(results: Results) -> list[str]:
    """The sizes in the order of the configuration."""
    return list(dict.fromkeys(model.size for model in results.models))


def of_size(results: Results, size: str) -> list[ModelResult]:
    """The models of a size."""
    return [model for model in results.models if model.size == size]


def is_xlstm(model: ModelResult) -> bool:
    """Whether a model is of the family that the project is about."""
    recipe = yaml.safe_load(model.recipe) or {}
    return recipe.get("model", recipe).get("family", "xlstm") == "xlstm"


def finished(model: ModelResult) -> list[Run]:
    """The finished runs at the chosen learning rate."""
    return _finished(model.runs)


def _finished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.status == "finished"]


def all_runs(results: Results) -> list[tuple[ModelResult, Run]]:
    """Every run once: the first seed's is also one of those that tuned the learning rate."""
    by_name = {run.name: (model, run) for model in results.models for run in [*model.tried, *model.runs]}
    return [*by_name.values()]


def shown_runs(model: ModelResult) -> tuple[list[Run], bool]:
    """Finished runs and True or, while there are none, the best so far and False: unfinished runs, or the best of those
    that tune the learning rate."""
    unfinished = [run for run in model.runs if run.status == "unfinished"]
    tried = [run for run in _finished(model.tried) if tuning_value(run) is not None]
    return finished(model) or unfinished or sorted(tried, key=tuning_value)[:1], bool(finished(model))


# Values over seeds, and who is best


def deciding_quantity(results: Results) -> Quantity:
    """The first of `QUANTITIES` that a finished run has."""
    runs = [run for model in results.models for run in finished(model)]
    return next((each for each in QUANTITIES if any(each.of(run) is not None for run in runs)), QUANTITIES[0])


def values_by_seed(model: ModelResult, of: Value) -> dict[int, float]:
    """The value of each finished run that has a finite one."""
    found = {run.seed: of(run) for run in finished(model)}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def over_seeds(model: ModelResult, of: Value) -> Spread | None:
    """Mean and deviation of a value over the finished runs; None where none has it."""
    return spread([*values_by_seed(model, of).values()])


def ranked(models: list[ModelResult], quantity: Quantity) -> list[tuple[ModelResult, Spread]]:
    """The models with finished runs, the best mean first."""
    found = [(model, over_seeds(model, quantity.of)) for model in models]
    return sorted(((model, each) for model, each in found if each), key=lambda pair: pair[1].mean)


def sides(models: list[ModelResult], quantity: Quantity) -> tuple[ModelResult, ModelResult] | None:
    """The best xLSTM and the best other model; the best two, where there is no other or no xLSTM; None of fewer."""
    order = [model for model, _ in ranked(models, quantity)]
    own = next((model for model in order if is_xlstm(model)), None)
    other = next((model for model in order if not is_xlstm(model)), None)
    if own and other:
        return own, other
    return (order[0], order[1]) if len(order) > 1 else None


def pairs(results: Results) -> Iterator[tuple[str, tuple[ModelResult, ModelResult]]]:
    """Each size that has two sides, with them."""
    for size in sizes_of(results):
        if pair := sides(of_size(results, size), deciding_quantity(results)):
            yield size, pair


def gap(model: ModelResult, reference: ModelResult, quantity: Quantity) -> Difference | None:
    """The model minus the reference, seed by seed: above zero the model is worse; None where they share no seed."""
    return difference(values_by_seed(model, quantity.of), values_by_seed(reference, quantity.of))


def standing(found: Difference | None) -> str:
    """How a model with this gap stands to its reference."""
    if found is None:
        return "no seed in common"
    if found.half_width is None:
        return "one seed, not judged"
    if not found.is_beyond_spread:
        return "not told apart"
    return "worse" if found.mean > 0 else "better"


# Learning rates


def tuning_quantity(results: Results) -> Quantity:
    """The quantity that learning rates are chosen by."""
    runs = [run for model in results.models for run in _finished(model.tried)]
    has_bits = any(VALIDATION_BITS.of(run) is not None for run in runs)
    return VALIDATION_BITS if has_bits or not runs else VALIDATION_LOSS


def tuning_value(run: Run) -> float | None:
    """Bits a byte on the validation documents, or nats a token where there are no bytes."""
    bits = VALIDATION_BITS.of(run)
    return VALIDATION_LOSS.of(run) if bits is None else bits


def tuning_points(model: ModelResult) -> dict[float, float]:
    """The finite end of each finished run of the grid, by its learning rate."""
    found = {run.learning_rate: tuning_value(run) for run in _finished(model.tried)}
    return {rate: value for rate, value in found.items() if value is not None and math.isfinite(value)}


def is_at_edge(model: ModelResult) -> bool:
    """Whether the best learning rate is the lowest or highest of those tried."""
    rates = [run.learning_rate for run in model.tried]
    return len(rates) > 1 and model.learning_rate in (min(rates), max(rates))


# Tests by position and by context


def _bits_or_nats(figures: Any) -> float:
    """Bits a byte, or nats a token where there are no bytes."""
    return figures.loss if figures.bits_per_byte is None else figures.bits_per_byte


def unit_of_tests(results: Results) -> str:
    """The unit of losses on test documents."""
    found = [run.tested for model in results.models for run in model.runs if run.tested]
    return "nats per token" if any(each.bits_per_byte is None for each in found) else "bits per byte"


def mean_extrapolation(model: ModelResult) -> Points:
    """The loss by context length, the mean over finished runs, at the lengths that all of them have."""
    curves = [
        {each.context_length: _bits_or_nats(each) for each in points}
        for run in finished(model)
        if run.tested and (points := run.tested.extrapolation)
    ]
    shared = set.intersection(*map(set, curves)) if curves else set()
    return {length: sum(curve[length] for curve in curves) / len(curves) for length in sorted(shared)}


def mean_by_position(model: ModelResult) -> Points:
    """The loss by the end of the bucket of positions, the mean over finished runs."""
    by_end: dict[int, list[float]] = {}
    for run in finished(model):
        for bucket in run.tested.by_position if run.tested else ():
            by_end.setdefault(bucket.last, []).append(_bits_or_nats(bucket))
    return {last: statistics.fmean(values) for last, values in by_end.items()}


# Speed and size


def fastest_training(results: Results, model: ModelResult) -> dict[int, dict[str, Any]]:
    """The row of the faster mode at each context length."""
    found: dict[int, dict[str, Any]] = {}
    for row in _speed_rows(results.training_speed, model):
        length, speed = row["length"], row.get("tokens_per_second")
        if speed and speed > found.get(length, {}).get("tokens_per_second", 0):
            found[length] = row
    return dict(sorted(found.items()))


def generation_rows(results: Results, model: ModelResult, batch_size: int) -> dict[int, dict[str, Any]]:
    """The row at each prompt length."""
    rows = [row for row in _speed_rows(results.generation_speed, model) if row["batch_size"] == batch_size]
    return dict(sorted((row["length"], row) for row in rows if row.get("tokens_per_second")))


def _speed_rows(rows: list[dict[str, Any]], model: ModelResult) -> list[dict[str, Any]]:
    return [row for row in rows if model.speed_name and row["name"] == model.speed_name]


def batch_sizes(results: Results) -> list[int]:
    """The batch sizes at which generation was measured, the smallest first."""
    return sorted({row["batch_size"] for row in results.generation_speed})


def median_speed(model: ModelResult) -> float | None:
    """Tokens a second in training, the median over finished runs."""
    known = [run.tokens_per_second for run in finished(model) if run.tokens_per_second is not None]
    return statistics.median(known) if known else None


# Fairness, and numbers from elsewhere


def parameters_apart(models: list[ModelResult]) -> float:
    """The largest distance of a parameter count from the median of these models, as a share of it."""
    counts = [model.parameters for model in models]
    return max(abs(count / statistics.median(counts) - 1) for count in counts)


def speeds_apart(model: ModelResult) -> float:
    """How much faster the fastest run was than the slowest, as a share."""
    speeds = [run.tokens_per_second for run in finished(model) if run.tokens_per_second]
    return max(speeds) / min(speeds) - 1 if speeds else 0.0


def beside_published(results: Results, entry: Published) -> tuple[Spread | None, int] | None:
    """Our value for a published number, and the tokens we trained on (0 where no run finished), of the same model at
    the same size; None where the comparison has no such model."""
    for model in of_size(results, entry.size):
        if entry.model.lower() in (model.label.lower(), model.architecture.lower()):
            found = over_seeds(model, _published_quantity(entry.quantity))
            return found, max((run.tokens for run in finished(model)), default=0)
    return None


def _published_quantity(name: str) -> Value:
    """Our figure for a published quantity, on validation or test documents as its name states."""
    figure_of = validated if "validation" in name else tested
    if "bits per byte" in name:
        return figure_of("bits_per_byte")
    if "word" not in name:
        return figure_of("perplexity")
    return tested("word_perplexity") if figure_of is tested else lambda run: None  # validation counts no words
