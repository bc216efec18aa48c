"""The tables of a comparison, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from eval.compare.report.answer import (
    fastest_training,
    is_at_edge,
    mean_extrapolation,
    of_size,
    ranked,
    show_bytes,
    show_spread,
    sides,
    signed,
    unit_of_tests,
)
from eval.compare.report.parts import NOTHING, Cell, Table, cells, duration, large, name_cell, number
from eval.compare.report.pictures import mean_by_position, tuning_quantity, tuning_value
from eval.compare.report.spread import deciding_quantity, difference, spread, values_by_seed
from eval.compare.results import ModelResult, Published, Results, Run


def final_table(results: Results, size: str) -> list[Table]:
    """All models at a size, the best first, with what separates them from the reference."""
    quantity, models = deciding_quantity(results), of_size(results, size)
    trained = results.context_length
    order = ranked(models, quantity)
    pair = sides(models, quantity)
    reference = pair[0] if pair else None
    rows = []
    for place, (model, found) in enumerate(order, 1):
        apart = judged = NOTHING
        if reference and model is not reference:
            apart, judged = _against(model, reference, results)
        elif reference:
            judged = "(reference)"
        finished = [run for run in model.runs if run.status == "finished"]
        rows.append(
            [
                Cell(str(place)),
                name_cell(model),
                Cell(f"{len(finished)} of {len(model.runs)}"),
                Cell(show_spread(found, quantity.decimals), strong=place == 1),
                Cell(number(mean_extrapolation(model).get(trained), f".{quantity.decimals}f")),
                Cell(_over_seeds(model, lambda run: run.tested and run.tested.perplexity, 2)),
                Cell(_over_seeds(model, lambda run: run.tested and run.tested.word_perplexity, 1)),
                Cell(_over_seeds(model, lambda run: run.curve[-1].perplexity if run.curve else None, 2)),
                Cell(apart),
                Cell(judged),
                Cell(number(_median(run.tokens_per_second for run in finished), ",.0f")),
                Cell(duration(statistics.fmean(run.seconds for run in finished))),
            ]
        )
    against = f"minus {reference.label} [95 % interval]" if reference else "difference"
    columns = [
        "",
        "model",
        "seeds",
        quantity.name,
        f"the same, in windows of {trained:,} tokens",
        "test perplexity a token",
        "test perplexity a word",
        "validation perplexity a token",
        against,
        "so it is",
        "training tokens/s",
        "wall time a run",
    ]
    unranked = [model for model in models if model not in [ranked_model for ranked_model, _ in order]]
    for model in unranked:
        rows.append([Cell(NOTHING), name_cell(model), Cell(f"0 of {len(model.runs)}"), *cells([NOTHING] * 9)])
    return [Table(columns=columns, rows=rows, words=frozenset({1, 9}))] if order else []


def _against(model: ModelResult, reference: ModelResult, results: Results) -> tuple[str, str]:
    quantity = deciding_quantity(results)
    gap = difference(values_by_seed(model, quantity.of), values_by_seed(reference, quantity.of))
    if gap is None:
        return NOTHING, "no seed in common"
    shown = signed(gap.mean, quantity.decimals)
    if gap.half_width is None:
        return shown, "one seed, not judged"
    shown += f" [{signed(gap.low, quantity.decimals)}, {signed(gap.high, quantity.decimals)}]"
    if not gap.is_beyond_spread:
        return shown, "not told apart"
    return shown, "worse" if gap.mean > 0 else "better"


def _over_seeds(model: ModelResult, of: Callable[[Run], float | None], decimals: int) -> str:
    found = spread([*values_by_seed(model, of).values()])
    return show_spread(found, decimals) if found else NOTHING


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def tuning_table(results: Results, size: str) -> list[Table]:
    """The end of each run of the grid; the best at its edge is marked."""
    models = [model for model in of_size(results, size) if model.tried]
    rates = sorted({run.learning_rate for model in models for run in model.tried})
    if not rates:
        return []
    rows = []
    for model in models:
        by_rate = {run.learning_rate: run for run in model.tried}
        row = [name_cell(model)]
        for rate in rates:
            run = by_rate.get(rate)
            value = tuning_value(run) if run and run.status == "finished" else None
            failed = run.status if run and run.status != "finished" else NOTHING
            row.append(Cell(failed if value is None else f"{value:.4f}", strong=rate == model.learning_rate))
        chosen = "not yet" if model.learning_rate is None else f"{model.learning_rate:g}"
        note = "at the edge of the grid" if is_at_edge(model) else ""
        rows.append([*row, Cell(chosen, strong=True), Cell(note, strong=True)])
    columns = ["model", *(f"lr {rate:g}" for rate in rates), "chosen", "remark"]
    title = f"{tuning_quantity(results).name[:1].upper()}{tuning_quantity(results).name[1:]}"
    return [Table(columns=columns, rows=rows, words=frozenset({0, len(columns) - 1}), title=title)]


def length_table(
    results: Results, size: str, points_of: Callable[[ModelResult], dict[int, float]], prefix: str, title: str
) -> list[Table]:
    """A column for each length, a row for each model that has any."""
    found = [(model, points_of(model)) for model in of_size(results, size)]
    found = [(model, points) for model, points in found if points]
    lengths = sorted({length for _, points in found for length in points})
    best = {length: min(points[length] for _, points in found if length in points) for length in lengths}
    rows = [
        [
            name_cell(model),
            *(Cell(number(points.get(at), ".3f"), strong=points.get(at) == best[at]) for at in lengths),
        ]
        for model, points in found
    ]
    return [Table(columns=["model", *(f"{prefix}{at:,}" for at in lengths)], rows=rows, title=title)] if rows else []


def position_table(results: Results, size: str) -> list[Table]:
    """The loss by position."""
    unit = unit_of_tests(results)
    title = f"{unit[:1].upper()}{unit[1:]} of the test targets up to a position (from the end of the column before)"
    return length_table(results, size, mean_by_position, "to ", title)


def extrapolation_table(results: Results, size: str) -> list[Table]:
    """The loss by the length of the context."""
    unit = unit_of_tests(results)
    title = f"{unit[:1].upper()}{unit[1:]} of the same test tokens, by the length of the context"
    return length_table(results, size, mean_extrapolation, "", title)


def training_speed_tables(results: Results, size: str) -> list[Table]:
    """The fastest of each model by length; then, folded, every row as measured."""
    found = [(model, fastest_training(results, model)) for model in of_size(results, size)]
    found = [(model, rows) for model, rows in found if rows]
    lengths = sorted({length for _, rows in found for length in rows})
    best = {at: max(rows[at]["tokens_per_second"] for _, rows in found if at in rows) for at in lengths}
    table = []
    for model, rows in found:
        line = [name_cell(model)]
        for at in lengths:
            row = rows.get(at)
            text = NOTHING
            if row:
                share = row.get("flops_share")
                text = f"{row['tokens_per_second']:,.0f}" + (f" ({share:.0%})" if share is not None else "")
            line.append(Cell(text, strong=bool(row) and row["tokens_per_second"] == best[at]))
        table.append(line)
    if not table:
        return []
    short = Table(columns=["model", *(f"T {at:,}" for at in lengths)], rows=table, title="Tokens/s (MFU)")
    names = {model.speed_name: model for model in of_size(results, size) if model.speed_name}
    rows = [row for row in results.training_speed if row["name"] in names]
    return [short, _training_rows(rows, lambda row: name_cell(names[row["name"]]), "Every measurement")]


def _training_rows(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], Cell], title: str) -> Table:
    def line(row: dict[str, Any]) -> list[Cell]:
        speed, off = row.get("tokens_per_second"), row.get("spread_milliseconds")
        shown = number(speed, ",.0f")
        if speed and off is not None and row.get("milliseconds"):
            shown += f" ± {speed * off / row['milliseconds']:,.0f}"
        values = [f"{row['length']:,}", str(row["batch_size"]), row["mode"], row["dtype"], shown]
        values += [number(row.get("flops_share"), ".1%"), _bytes(row), row.get("kernels", ""), row.get("problem", "")]
        return [name(row), *cells(values)]

    columns = ["model", "context", "rows", "mode", "type", "tokens/s", "MFU", "memory", "kernels", "problem"]
    return Table(columns=columns, rows=[*map(line, rows)], words=frozenset({0, 3, 4, 8, 9}), title=title, folded=True)


def _bytes(row: dict[str, Any]) -> str:
    return show_bytes(row["peak_bytes"]) if row.get("peak_bytes") else NOTHING


def generation_table(results: Results, size: str) -> list[Table]:
    """Every row, as measured."""
    names = {model.speed_name: model for model in of_size(results, size) if model.speed_name}
    rows = [row for row in results.generation_speed if row["name"] in names]
    title = "Every measurement"
    return [_generation_rows(rows, lambda row: name_cell(names[row["name"]]), title)] if rows else []


def _generation_rows(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], Cell], title: str) -> Table:
    def line(row: dict[str, Any]) -> list[Cell]:
        first, speed = number(row.get("first_token_milliseconds"), ",.1f"), number(row.get("tokens_per_second"), ",.0f")
        if row.get("first_token_spread") is not None:
            first += f" ± {row['first_token_spread']:,.1f}"
        if row.get("tokens_per_second_spread") is not None:
            speed += f" ± {row['tokens_per_second_spread']:,.0f}"
        state = show_bytes(row["state_bytes"]) if row.get("state_bytes") is not None else NOTHING
        values = [f"{row['length']:,}", str(row["batch_size"]), first, speed, state, _bytes(row)]
        return [name(row), *cells([*values, row.get("kernels", ""), row.get("problem", "")])]

    columns = ["model", "prompt", "batch", "first token, ms", "then tokens/s", "state", "memory", "kernels", "problem"]
    return Table(columns=columns, rows=[*map(line, rows)], words=frozenset({0, 7, 8}), title=title, folded=True)


def other_speed_tables(results: Results) -> list[Table]:
    """Rows of speed that belong to no model of the comparison."""
    known = {model.speed_name for model in results.models if model.speed_name}
    training = [row for row in results.training_speed if row["name"] not in known]
    generation = [row for row in results.generation_speed if row["name"] not in known]
    found = []
    if training:
        found.append(_training_rows(training, lambda row: Cell(row["name"]), "Training speed of further models"))
    if generation:
        found.append(_generation_rows(generation, lambda row: Cell(row["name"]), "Generation by further models"))
    return found


def size_table(results: Results, size: str) -> list[Table]:
    """Parameters, operations and state."""
    models = of_size(results, size)
    lengths = sorted({length for model in models for length, _ in model.state_bytes})
    smallest = min(model.parameters for model in models)
    rows = []
    for model in models:
        state = dict(model.state_bytes)
        sizes = [show_bytes(state[at]) if at in state else NOTHING for at in lengths]
        counts = [f"{model.parameters:,}", f"{model.parameters / smallest - 1:+.2%}", large(model.flops_per_token)]
        rows.append([name_cell(model), *cells([*counts, *sizes])])
    columns = ["model", "parameters", "over the smallest", "training FLOPs a token"]
    return [Table(columns=[*columns, *(f"state behind {at:,}" for at in lengths)], rows=rows)]


def published_table(results: Results) -> list[Table]:
    """Numbers from elsewhere, and ours where the model and the size are the same."""
    rows = []
    for entry in results.published:
        ours, tokens = _beside(results, entry)
        values = [entry.size, entry.quantity, entry.tokens, f"{entry.value:g}", ours, tokens, entry.source]
        rows.append(cells([entry.model, *values]))
    columns = ["model", "size", "quantity", "trained on", "published", "ours", "our tokens", "source"]
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 3, 7}))] if rows else []


def _beside(results: Results, entry: Published) -> tuple[str, str]:
    for model in of_size(results, entry.size):
        if entry.model.lower() not in (model.label.lower(), model.architecture.lower()):
            continue
        shown = _over_seeds(model, _published_quantity(entry.quantity), 2)
        tokens = {run.tokens for run in model.runs if run.status == "finished"}
        return shown, large(max(tokens)) if tokens else NOTHING
    return NOTHING, NOTHING


def _published_quantity(name: str) -> Callable[[Run], float | None]:
    """The number of ours that a published one of this name stands beside."""
    if "bits per byte" in name:
        return lambda run: run.tested and run.tested.bits_per_byte
    if "validation" in name and "word" not in name:
        return lambda run: run.curve[-1].perplexity if run.curve else None
    if "word" in name:
        return lambda run: run.tested and run.tested.word_perplexity
    return lambda run: run.tested and run.tested.perplexity


def _all_runs(results: Results) -> list[tuple[ModelResult, Run]]:
    """Each once: the first seed's is also one of those that tuned the learning rate."""
    by_name = {run.name: (model, run) for model in results.models for run in [*model.tried, *model.runs]}
    return [*by_name.values()]


def problem_table(results: Results) -> list[Table]:
    """The runs that did not finish, and why."""
    rows = [
        [name_cell(model), *cells([model.size, run.name, run.status, f"{run.steps:,}", run.problem])]
        for model, run in _all_runs(results)
        if run.status != "finished"
    ]
    columns = ["model", "size", "run", "status", "steps", "why"]
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 3, 5}))] if rows else []


def run_table(results: Results) -> list[Table]:
    """Every run, with where it comes from."""
    rows = []
    for model, run in _all_runs(results):
        versions = run.environment.get("versions") or {}
        values = [run.name, model.size, str(run.seed), f"{run.learning_rate:g}", run.status, f"{run.steps:,}"]
        values += [f"{run.tokens:,}", duration(run.seconds), number(run.tokens_per_second, ",.0f")]
        values += [number(run.curve[-1].bits_per_byte if run.curve else None, ".4f")]
        values += [number(run.tested and run.tested.bits_per_byte, ".4f")]
        values += [str(run.environment.get("git_commit") or NOTHING)[:12]]
        values += [versions.get("torch") or NOTHING, str(run.environment.get("device") or NOTHING)]
        rows.append([name_cell(model), *cells(values)])
    columns = ["model", "run", "size", "seed", "learning rate", "status", "steps", "tokens", "wall time", "tokens/s"]
    columns += ["validation bits per byte", "test bits per byte", "commit", "torch", "hardware"]
    title = "Every run"
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 5, 12, 13, 14}), title=title, folded=True)]
