"""The answer of a comparison in words, made from its numbers alone; no model is favored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.compare.report import select
from eval.compare.report.parts import show_bytes, show_spread, signed
from eval.compare.report.select import Quantity
from eval.compare.results import ModelResult, Results

MATCHED = 0.01
"""Largest distance of a parameter count from the median of its size, as a share."""
STEADY = 0.2
"""Largest difference between the speeds of one model's runs, as a share."""


@dataclass(frozen=True)
class Verdict:
    """The best model at one size."""

    size: str
    outcome: str
    """The verdict in a few words."""
    sentence: str


def verdict(results: Results, size: str) -> Verdict:
    """The best model at a size, its lead, and whether that is beyond the spread over seeds."""
    quantity, models = select.deciding_quantity(results), select.of_size(results, size)
    order, pair = select.ranked(models, quantity), select.sides(models, quantity)
    if not order:
        return Verdict(size, "no result", "No run at a chosen learning rate has finished.")
    shown = {model.label: show_spread(found, quantity.decimals) for model, found in order}
    if pair is None:
        only = order[0][0].label
        return Verdict(size, "nothing to compare", f"Only {only} has a finished run: {shown[only]} {quantity.name}.")
    places = {model.label: place for place, (model, _) in enumerate(order, 1)}
    best, worse = sorted(pair, key=lambda model: places[model.label])
    two = f"{best.label} reaches {shown[best.label]} {quantity.name}, {worse.label} {shown[worse.label]}"
    rest = _standing(pair[0], [model for model, _ in order if model not in pair], quantity)
    if places[worse.label] > 2:
        rest = f" {worse.label} is number {places[worse.label]} of {len(order)}.{rest}"
    gap = select.gap(worse, best, quantity)
    if gap is None:
        sentence = f"{two}. They share no seed, so the difference is not judged.{rest}"
        return Verdict(size, f"no seed in common of {best.label} and {worse.label}", sentence)
    apart = f"{two}: {abs(gap.mean):.{quantity.decimals}f} apart ({abs(gap.mean) / order[0][1].mean:.1%})"
    if any(found.count > gap.count for model, found in order if model in pair):
        apart += " on the seeds that both have"
    if gap.half_width is None:
        sentence = f"{apart}. Only one seed is shared, so it is not known whether that is beyond the spread.{rest}"
        return Verdict(size, f"{best.label} ahead of {worse.label}, on one seed", sentence)
    interval = f"{signed(gap.low, quantity.decimals)} to {signed(gap.high, quantity.decimals)} over {gap.count} seeds"
    if gap.mean > 0 and gap.is_beyond_spread:
        sentence = f"{apart}, which is beyond the spread over seeds (95 % interval {interval}).{rest}"
        lost = select.is_xlstm(worse) and not select.is_xlstm(best)
        return Verdict(size, f"{'xLSTM loses: ' if lost else ''}{best.label} beats {worse.label}", sentence)
    sentence = f"{apart}, which is within the spread over seeds (95 % interval {interval}).{rest}"
    return Verdict(size, f"no winner between {best.label} and {worse.label}", sentence)


def _standing(reference: ModelResult, others: list[ModelResult], quantity: Quantity) -> str:
    """The standing of the reference against each of the others."""
    labels: dict[str, list[str]] = {}
    for model in others:
        labels.setdefault(select.standing(select.gap(reference, model, quantity)), []).append(model.label)
    known = {"better": "better than", "worse": "worse than", "not told apart": "not told apart from"}
    words = [f"{word} {', '.join(labels[standing])}" for standing, word in known.items() if standing in labels]
    return f" Of the rest, seed by seed, {reference.label} is {'; '.join(words)}." if words else ""


def further_findings(results: Results) -> list[tuple[str, list[str]]]:
    """The other main findings as (subject, a sentence for each size): contexts, speed, memory."""
    findings = {
        "At equal contexts": _equal_context_finding,
        "Beyond the training context": _extrapolation_finding,
        "Training speed": _training_finding,
        "Decoding speed": _decoding_finding,
        "Memory while writing": _state_finding,
    }
    pairs = list(select.pairs(results))
    found = [
        (title, [f"{size}: {words}." for size, pair in pairs if (words := describe(results, *pair))])
        for title, describe in findings.items()
    ]
    return [(title, sentences) for title, sentences in found if sentences]


def _equal_context_finding(results: Results, first: ModelResult, second: ModelResult) -> str:
    trained = results.context_length
    values = {model.label: select.mean_extrapolation(model).get(trained) for model in (first, second)}
    if None in values.values():
        return ""
    words = " and ".join(f"{label} reaches {value:.4f}" for label, value in values.items())
    return f"reading {trained:,} tokens from an empty state, {words} {select.unit_of_tests(results)}"


def _extrapolation_finding(results: Results, first: ModelResult, second: ModelResult) -> str:
    words = []
    for model in (first, second):
        curve = select.mean_extrapolation(model)
        trained, longest = results.context_length, max(curve, default=0)
        if trained not in curve or longest <= trained:
            return ""
        change = signed(curve[longest] - curve[trained], 3)
        words.append(f"{model.label} changes by {change} to {curve[longest]:.3f}")
    return (
        f"from {trained:,} to {longest:,} tokens of context {words[0]} and {words[1]} {select.unit_of_tests(results)}"
    )


def _training_finding(results: Results, first: ModelResult, _: ModelResult) -> str:
    return _ratio(results, first, lambda model: select.fastest_training(results, model), "tokens of context")


def _decoding_finding(results: Results, first: ModelResult, _: ModelResult) -> str:
    batch = min(select.batch_sizes(results), default=1)
    return _ratio(results, first, lambda model: select.generation_rows(results, model, batch), "tokens of prompt")


def _ratio(results: Results, own: ModelResult, rows_of: Callable[[ModelResult], dict[int, Any]], unit: str) -> str:
    """Tokens/s over the fastest other's (no xLSTM, if it is one itself), at the shortest and the longest length."""
    speeds = {
        model.label: {length: row["tokens_per_second"] for length, row in rows_of(model).items()}
        for model in select.of_size(results, own.size)
        if model is own or not (select.is_xlstm(own) and select.is_xlstm(model))
    }
    lengths = speeds.pop(own.label)
    words = []
    for length in dict.fromkeys((min(lengths, default=0), max(lengths, default=0))):
        there = {label: found[length] for label, found in speeds.items() if length in found}
        if there:
            fastest = max(there, key=there.__getitem__)
            times = lengths[length] / there[fastest]
            words.append(f"{times:.2f} times the tokens/s of {fastest} at {length:,} {unit}")
    return f"{own.label} has {' and '.join(words)}, the fastest other there" if words else ""


def _state_finding(results: Results, first: ModelResult, second: ModelResult) -> str:
    shared = dict(first.state_bytes).keys() & dict(second.state_bytes).keys()
    if not shared:
        return ""
    length = max(shared)
    own, other = dict(first.state_bytes)[length], dict(second.state_bytes)[length]
    return (
        f"behind {length:,} tokens {first.label} keeps {show_bytes(own)} a sequence, {second.label} {show_bytes(other)}"
    )


def checks(results: Results) -> list[tuple[bool, str]]:
    """Whether the comparison is fair, point by point: (holds, sentence)."""
    runs = [run for model in results.models for run in select.finished(model)]
    found = []
    for size in select.sizes_of(results):
        models = select.of_size(results, size)
        off = select.parameters_apart(models)
        found.append((off <= MATCHED, f"Parameters at {size} lie within {off:.1%} of their median."))
        tokens = sorted({run.tokens for model in models for run in select.finished(model)})
        if tokens:
            same = f"All finished runs at {size} saw {tokens[0]:,} tokens."
            other = f"Finished runs at {size} saw between {tokens[0]:,} and {tokens[-1]:,} tokens."
            found.append((len(tokens) == 1, same if len(tokens) == 1 else other))
        short = [m.label for m in models if not m.runs or len(select.finished(m)) < len(m.runs)]
        lacking = f"Not every seed finished at {size}, which may flatter or harm {', '.join(short)}."
        found.append((not short, lacking if short else f"Every seed finished for all models at {size}."))
    named = [(f"{model.label} at {model.size}", model) for model in results.models]
    untuned = [name for name, model in named if len(model.tried) < 2]
    open_rates = [name for name, model in named if model.learning_rate is None]
    unsteady = [name for name, model in named if select.speeds_apart(model) > STEADY]
    if untuned:
        found.append((False, f"The learning rate was not tuned here for {', '.join(untuned)}."))
    if open_rates:
        found.append((False, f"The best learning rate is not known yet of {', '.join(open_rates)}."))
    if not untuned and not open_rates and not any(map(select.is_at_edge, results.models)):
        found.append((True, "The best learning rate of every model lies inside the grid that was tried."))
    if len({run.tested.how for run in runs if run.tested}) > 1:
        different = "The models read the test documents in different ways; at equal contexts they stand further down."
        found.append((False, different))
    if unsteady:
        sentence = (
            f"Runs of one model differ by more than {STEADY:.0%} in speed ({', '.join(unsteady)}): something else "
            "was running, so wall time and tokens/s of training say little. Speed is measured by itself below."
        )
        found.append((False, sentence))
    for key, what in (("git_commit", "commit of the source"), ("device", "hardware")):
        names = sorted({str(run.environment[key]) for run in runs if run.environment.get(key)})
        if names:
            same = f"One {what} for all finished runs: {names[0]}."
            found.append((len(names) == 1, same if len(names) == 1 else f"More than one {what}: {', '.join(names)}."))
    return found
