"""The sections of a comparison's report, in order; an empty one states that."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from eval.compare.report import pictures, select, tables
from eval.compare.report.drawing import Picture
from eval.compare.report.parts import Part, Section, Table
from eval.compare.report.scaling import scaling_section
from eval.compare.results import Results

TERMS = {
    "Bits per byte": (
        "The negative log-likelihood of a text in bits over its length in bytes; it does not depend on the tokenizer. "
        "Lower is better; so is every perplexity."
    ),
    "Perplexity a token, a word": "exp of the nats over the number of tokens, or of words with one end of line each.",
    "Mean ± spread": "Mean and sample standard deviation over the seeds that finished.",
    "Beyond the spread": (
        "Runs of one seed see the same tokens in the same order, so models are compared seed by seed: the 95 % "
        "interval of Student's t for the mean of these differences leaves out zero. Three seeds are few: the interval "
        "is then 4.3 standard errors to each side, assumes normally distributed differences, and is not widened for "
        "the number of models compared; one such interval in twenty is wrong by chance."
    ),
    "Learning rate": (
        "The best of a grid that is the same for all, by the validation documents, with the first seed. That seed is "
        "also one of those averaged, for every model alike."
    ),
    "Training FLOPs": (
        "Operations of forward and backward of all matrix products, convolutions and what mixes tokens, counted from "
        "the sizes (xlstm_lm.models.accounting); nothing recomputed is counted."
    ),
    "Wall time": (
        "Of training, over all sessions of a run, validation included; comparable only on one and the same hardware "
        "with nothing else running."
    ),
    "MFU": "Training FLOPs a second over those of a large matrix product of the same type, measured in the same run.",
    "Tokens/s ± spread": "The median of repeated measurements in turns, and the median absolute deviation.",
    "Time to the first token": "From the prompt handed over to the first new token; decoding speed counts those after.",
    "State": (
        "Bytes that one sequence leaves for its next token: recurrent states in float32, keys, values and what "
        "convolutions remember in bfloat16; in tables of measurements as measured, for all rows of the batch."
    ),
}
"""Meaning of the figures, by their names in the report."""


def sections(results: Results) -> list[Section]:
    """All sections of the report."""
    return [
        Section(
            title="Final result",
            lead=_tested_how(results),
            parts=[Part(pictures=_final_pictures(results)), *_by_size(results, tables.final_table)],
            absent="No run at a chosen learning rate has finished.",
        ),
        Section(
            title="Learning curves",
            lead="Loss on the validation documents while training, mean over seeds; the band is one standard deviation "
            "to each side. A dashed line is not final: runs that go on, or the best so far of those that tune the "
            "learning rate. The beginning is cut off.",
            parts=_by_size(results, pictures.curve_pictures),
            absent="No run has been validated.",
        ),
        Section(
            title="Learning rates",
            lead="The first seed at each rate of the grid. A best rate at the edge may not be the best there is.",
            parts=_by_size(results, pictures.tuning_pictures, tables.tuning_table),
            absent="No grid of learning rates was run.",
        ),
        Section(
            title="Loss by position",
            lead="How much a model gains from what it has read of a document so far.",
            parts=_by_size(results, pictures.position_pictures, tables.position_table),
            absent="The trained models were not tested by position.",
        ),
        Section(
            title="Length extrapolation",
            lead="The same test tokens, cut in windows of each length, every window from an empty state. "
            f"Trained on {results.context_length:,} tokens.",
            parts=_by_size(results, pictures.extrapolation_pictures, tables.extrapolation_table),
            absent="Contexts longer than that of training were not tested.",
        ),
        Section(
            title="Training speed",
            lead="Forward and backward, the same number of tokens in every batch, each model with its best kernel and "
            "the faster of the modes measured; rows are single documents." + _measured_on(results, "training"),
            parts=_by_size(results, pictures.training_speed_pictures, tables.training_speed_tables),
            absent="The speed of training against context length was not measured.",
        ),
        Section(
            title="Generation",
            lead="Reading a prompt and writing behind it, greedily." + _measured_on(results, "generation"),
            parts=_by_size(results, pictures.generation_pictures, tables.generation_table),
            absent="The speed of generation was not measured.",
        ),
        Section(
            title="Further measurements",
            parts=[Part(tables=found)] if (found := tables.other_speed_tables(results)) else [],
        ),
        Section(
            title="Parameters, operations and state",
            parts=_by_size(results, pictures.state_pictures, tables.size_table),
        ),
        scaling_section(results),
        Section(
            title="Published numbers",
            lead="From other code, other preparation of the data, often more of it: to stand beside, not to rank by.",
            parts=[Part(tables=tables.published_table(results))],
            absent="None were named.",
        ),
        Section(
            title="Runs that did not finish",
            parts=[Part(tables=tables.problem_table(results))],
            absent="All runs finished.",
        ),
        Section(
            title="Where the numbers come from",
            lead=f"{results.data} Made by: {results.command}",
            parts=[Part(tables=tables.run_table(results))],
            folds=_configurations(results),
        ),
        Section(title="What the figures mean", terms=list(TERMS.items())),
    ]


def _by_size(results: Results, *makers: Callable[[Results, str], list[Any]]) -> list[Part]:
    """A part for each size with any content."""
    parts = []
    for size in select.sizes_of(results):
        made = [each for maker in makers for each in maker(results, size)]
        part = Part(
            heading=size,
            pictures=[each for each in made if isinstance(each, Picture)],
            tables=[each for each in made if isinstance(each, Table)],
        )
        if made:
            parts.append(part)
    return parts


def _final_pictures(results: Results) -> list[Picture]:
    by_size = [picture for size in select.sizes_of(results) for picture in pictures.final_pictures(results, size)]
    return by_size + pictures.scale_pictures(results)


def _tested_how(results: Results) -> str:
    """The way in which the finished runs were tested."""
    tested = [run.tested for model in results.models for run in model.runs if run.tested]
    how = "; ".join(dict.fromkeys(each.how for each in tested))
    counts = "; ".join(dict.fromkeys(f"{each.tokens:,} tokens, {each.bytes:,} bytes" for each in tested))
    return f"Tested on {counts}: {how}." if tested else "No run has been tested; the validation documents stand in."


def _measured_on(results: Results, kind: str) -> str:
    environment = results.speed_environments.get(kind, {})
    device, threads = environment.get("device_name"), environment.get("threads")
    if not device:
        return ""
    return f" Measured on {device}" + (f", {threads} thread{'s' * (threads != 1)}." if threads else ".")


def _configurations(results: Results) -> list[tuple[str, str]]:
    """All configurations verbatim (comparison, shared, each model's), and each environment with its runs."""
    folds = [("Configuration of the comparison", results.config), ("Recipe that all runs share", results.recipe)]
    folds += [(f"Recipe of {model.label} at {model.size}", model.recipe) for model in results.models]
    folds.append(("Environment of the report", json.dumps(results.environment, indent=1)))
    for kind, environment in results.speed_environments.items():
        folds.append((f"Environment of the speed of {kind}", json.dumps(environment, indent=1)))
    runs = {run.name: run for model in results.models for run in [*model.tried, *model.runs]}
    folds += _environments("training", {name: run.environment for name, run in runs.items()})
    folds += _environments("testing", {name: run.tested.environment for name, run in runs.items() if run.tested})
    return [(title, text.strip()) for title, text in folds if text.strip()]


def _environments(what: str, environments: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Each environment with the runs that have it, times and commands aside."""
    by_environment: dict[str, list[str]] = {}
    for name, environment in environments.items():
        same = {key: value for key, value in environment.items() if key not in ("started", "date", "command")}
        if same:
            by_environment.setdefault(json.dumps(same, indent=1, default=str), []).append(name)
    return [
        (f"Environment {place} of {what}", f"{text}\n\nof the runs {', '.join(names)}")
        for place, (text, names) in enumerate(by_environment.items(), 1)
    ]
