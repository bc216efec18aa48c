"""The tables of a comparison, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from eval.compare.report import select
from eval.compare.report.drawing import large
from eval.compare.report.parts import (
    NOTHING,
    Cell,
    Table,
    cells,
    duration,
    name_cell,
    number,
    show_bytes,
    show_spread,
    signed,
)
from eval.compare.report.select import TEST_BITS, VALIDATION_BITS, Value, tested, validated
from eval.compare.results import ModelResult, Results


def final_table(results: Results, size: str) -> list[Table]:
    """All models at a size, the best first, with what separates them from the reference."""
    quantity, models = select.deciding_quantity(results), select.of_size(results, size)
    trained = results.context_length
    order = select.ranked(models, quantity)
    pair = select.sides(models, quantity)
    reference = pair[0] if pair else None
    against = f"minus {reference.label} [95 % interval]" if reference else "difference"
    rows = []
    for place, (model, found) in enumerate(order, 1):
        apart, judged = NOTHING, "(reference)" if reference else NOTHING
        if reference and model is not reference:
            apart, judged = _against(model, reference, results)
        finished = select.finished(model)
        cut = number(select.mean_extrapolation(model).get(trained), f".{quantity.decimals}f")
        rows.append(
            {
                "": Cell(str(place)),
                "model": name_cell(model),
                "seeds": Cell(f"{len(finished)} of {len(model.runs)}"),
                quantity.name: Cell(show_spread(found, quantity.decimals), strong=place == 1),
                f"the same, in windows of {trained:,} tokens": Cell(cut),
                "test perplexity a token": Cell(_over_seeds(model, tested("perplexity"), 2)),
                "test perplexity a word": Cell(_over_seeds(model, tested("word_perplexity"), 1)),
                "validation perplexity a token": Cell(_over_seeds(model, validated("perplexity"), 2)),
                against: Cell(apart),
                "so it is": Cell(judged),
                "training tokens/s": Cell(number(select.median_speed(model), ",.0f")),
                "wall time a run": Cell(duration(statistics.fmean(run.seconds for run in finished))),
            }
        )
    if not rows:
        return []
    ranked = [model for model, _ in order]
    for model in (model for model in models if model not in ranked):
        known = {"model": name_cell(model), "seeds": Cell(f"0 of {len(model.runs)}")}
        rows.append(dict.fromkeys(rows[0], Cell(NOTHING)) | known)
    return [Table(columns=[*rows[0]], rows=[[*row.values()] for row in rows], words=frozenset({1, 9}))]


def _against(model: ModelResult, reference: ModelResult, results: Results) -> tuple[str, str]:
    quantity = select.deciding_quantity(results)
    gap = select.gap(model, reference, quantity)
    shown = NOTHING if gap is None else signed(gap.mean, quantity.decimals)
    if gap and gap.half_width is not None:
        shown += f" [{signed(gap.low, quantity.decimals)}, {signed(gap.high, quantity.decimals)}]"
    return shown, select.standing(gap)


def _over_seeds(model: ModelResult, of: Value, decimals: int) -> str:
    found = select.over_seeds(model, of)
    return show_spread(found, decimals) if found else NOTHING


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def tuning_table(results: Results, size: str) -> list[Table]:
    """The end of each run of the grid; the best at its edge is marked."""
    models = [model for model in select.of_size(results, size) if model.tried]
    rates = sorted({run.learning_rate for model in models for run in model.tried})
    if not rates:
        return []
    rows = []
    for model in models:
        by_rate = {run.learning_rate: run for run in model.tried}
        row = [name_cell(model)]
        for rate in rates:
            run = by_rate.get(rate)
            value = select.tuning_value(run) if run and run.status == "finished" else None
            failed = run.status if run and run.status != "finished" else NOTHING
            row.append(Cell(failed if value is None else f"{value:.4f}", strong=rate == model.learning_rate))
        chosen = "not yet" if model.learning_rate is None else f"{model.learning_rate:g}"
        note = "at the edge of the grid" if select.is_at_edge(model) else ""
        rows.append([*row, Cell(chosen, strong=True), Cell(note, strong=True)])
    columns = ["model", *(f"lr {rate:g}" for rate in rates), "chosen", "remark"]
    title = _capitalized(select.tuning_quantity(results).name)
    return [Table(columns=columns, rows=rows, words=frozenset({0, len(columns) - 1}), title=title)]


def length_table(
    results: Results, size: str, points_of: Callable[[ModelResult], dict[int, float]], prefix: str, title: str
) -> list[Table]:
    """A column for each length, a row for each model that has any."""
    found = [(model, points) for model in select.of_size(results, size) if (points := points_of(model))]
    lengths = sorted({length for _, points in found for length in points})
    best = {length: min(points[length] for _, points in found if length in points) for length in lengths}
    rows = []
    for model, points in found:
        shown = (Cell(number(points.get(at), ".3f"), strong=points.get(at) == best[at]) for at in lengths)
        rows.append([name_cell(model), *shown])
    return [Table(columns=["model", *(f"{prefix}{at:,}" for at in lengths)], rows=rows, title=title)] if rows else []


def position_table(results: Results, size: str) -> list[Table]:
    """The loss by position."""
    unit = _capitalized(select.unit_of_tests(results))
    title = f"{unit} of the test targets up to a position (from the end of the column before)"
    return length_table(results, size, select.mean_by_position, "to ", title)


def extrapolation_table(results: Results, size: str) -> list[Table]:
    """The loss by the length of the context."""
    title = f"{_capitalized(select.unit_of_tests(results))} of the same test tokens, by the length of the context"
    return length_table(results, size, select.mean_extrapolation, "", title)


def training_speed_tables(results: Results, size: str) -> list[Table]:
    """The fastest of each model by length; then, folded, every row as measured."""
    models = select.of_size(results, size)
    found = [(model, rows) for model in models if (rows := select.fastest_training(results, model))]
    lengths = sorted({length for _, rows in found for length in rows})
    best = {at: max(rows[at]["tokens_per_second"] for _, rows in found if at in rows) for at in lengths}
    table = []
    for model, rows in found:
        line = [name_cell(model)]
        for at in lengths:
            speed, share = (rows.get(at, {}).get(key) for key in ("tokens_per_second", "flops_share"))
            text = number(speed, ",.0f") + (f" ({share:.0%})" if share is not None else "")
            line.append(Cell(text, strong=speed == best[at]))
        table.append(line)
    if not table:
        return []
    short = Table(columns=["model", *(f"T {at:,}" for at in lengths)], rows=table, title="Tokens/s (MFU)")
    return [short, _training_rows(results.training_speed, _names(results, size), "Every measurement")]


def _names(results: Results, size: str) -> dict[str, Cell]:
    """The models of a size by their names in the rows of speed."""
    return {model.speed_name: name_cell(model) for model in select.of_size(results, size) if model.speed_name}


def _training_rows(rows: list[dict[str, Any]], names: dict[str, Cell], title: str) -> Table:
    """Every row with a name in `names`, as measured."""

    def line(row: dict[str, Any]) -> list[Cell]:
        speed, off = row.get("tokens_per_second"), row.get("spread_milliseconds")
        shown = number(speed, ",.0f")
        if speed and off is not None and row.get("milliseconds"):
            shown += f" ± {speed * off / row['milliseconds']:,.0f}"
        values = [f"{row['length']:,}", str(row["batch_size"]), row["mode"], row["dtype"], shown]
        values += [number(row.get("flops_share"), ".1%"), _bytes(row), row.get("kernels", ""), row.get("problem", "")]
        return [names[row["name"]], *cells(values)]

    columns = ["model", "context", "rows", "mode", "type", "tokens/s", "MFU", "memory", "kernels", "problem"]
    shown = [line(row) for row in rows if row["name"] in names]
    return Table(columns=columns, rows=shown, words=frozenset({0, 3, 4, 8, 9}), title=title, folded=True)


def _bytes(row: dict[str, Any]) -> str:
    return show_bytes(row["peak_bytes"]) if row.get("peak_bytes") else NOTHING


def generation_table(results: Results, size: str) -> list[Table]:
    """Every row, as measured."""
    table = _generation_rows(results.generation_speed, _names(results, size), "Every measurement")
    return [table] if table.rows else []


def _generation_rows(rows: list[dict[str, Any]], names: dict[str, Cell], title: str) -> Table:
    """Every row with a name in `names`, as measured."""

    def line(row: dict[str, Any]) -> list[Cell]:
        first, speed = number(row.get("first_token_milliseconds"), ",.1f"), number(row.get("tokens_per_second"), ",.0f")
        if row.get("first_token_spread") is not None:
            first += f" ± {row['first_token_spread']:,.1f}"
        if row.get("tokens_per_second_spread") is not None:
            speed += f" ± {row['tokens_per_second_spread']:,.0f}"
        state = show_bytes(row["state_bytes"]) if row.get("state_bytes") is not None else NOTHING
        values = [f"{row['length']:,}", str(row["batch_size"]), first, speed, state, _bytes(row)]
        return [names[row["name"]], *cells([*values, row.get("kernels", ""), row.get("problem", "")])]

    columns = ["model", "prompt", "batch", "first token, ms", "then tokens/s", "state", "memory", "kernels", "problem"]
    shown = [line(row) for row in rows if row["name"] in names]
    return Table(columns=columns, rows=shown, words=frozenset({0, 7, 8}), title=title, folded=True)


def other_speed_tables(results: Results) -> list[Table]:
    """Rows of speed that belong to no model of the comparison."""
    known = {model.speed_name for model in results.models}
    rows = [*results.training_speed, *results.generation_speed]
    names = {row["name"]: Cell(row["name"]) for row in rows if row["name"] not in known}
    training = _training_rows(results.training_speed, names, "Training speed of further models")
    generation = _generation_rows(results.generation_speed, names, "Generation by further models")
    return [table for table in (training, generation) if table.rows]


def size_table(results: Results, size: str) -> list[Table]:
    """Parameters, operations and state."""
    models = select.of_size(results, size)
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
        ours, tokens = select.beside_published(results, entry) or (None, 0)
        values = [entry.size, entry.quantity, entry.tokens, f"{entry.value:g}"]
        values += [show_spread(ours, 2) if ours else NOTHING, large(tokens) if tokens else NOTHING, entry.source]
        rows.append(cells([entry.model, *values]))
    columns = ["model", "size", "quantity", "trained on", "published", "ours", "our tokens", "source"]
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 3, 7}))] if rows else []


def problem_table(results: Results) -> list[Table]:
    """The runs that did not finish, and why."""
    rows = [
        [name_cell(model), *cells([model.size, run.name, run.status, f"{run.steps:,}", run.problem])]
        for model, run in select.all_runs(results)
        if run.status != "finished"
    ]
    columns = ["model", "size", "run", "status", "steps", "why"]
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 3, 5}))] if rows else []


def run_table(results: Results) -> list[Table]:
    """Every run, with where it comes from."""
    rows = []
    for model, run in select.all_runs(results):
        versions = run.environment.get("versions") or {}
        values = [run.name, model.size, str(run.seed), f"{run.learning_rate:g}", run.status, f"{run.steps:,}"]
        values += [f"{run.tokens:,}", duration(run.seconds), number(run.tokens_per_second, ",.0f")]
        values += [number(VALIDATION_BITS.of(run), ".4f"), number(TEST_BITS.of(run), ".4f")]
        values += [str(run.environment.get("git_commit") or NOTHING)[:12]]
        values += [versions.get("torch") or NOTHING, str(run.environment.get("device") or NOTHING)]
        rows.append([name_cell(model), *cells(values)])
    columns = ["model", "run", "size", "seed", "learning rate", "status", "steps", "tokens", "wall time", "tokens/s"]
    columns += ["validation bits per byte", "test bits per byte", "commit", "torch", "hardware"]
    title = "Every run"
    return [Table(columns=columns, rows=rows, words=frozenset({0, 1, 2, 5, 12, 13, 14}), title=title, folded=True)]
