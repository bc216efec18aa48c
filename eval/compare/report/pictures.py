"""The pictures of a comparison, made from its results."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from eval.compare.report import select
from eval.compare.report.drawing import COLOURS, Frame, Line, Picture, draw_dots, draw_lines
from eval.compare.report.select import VALIDATION_BITS, VALIDATION_LOSS, Points
from eval.compare.results import CurvePoint, ModelResult, Results, Run
from eval.study.spread import spread


def colours_of(results: Results) -> dict[str, int]:
    """The place of each architecture's colour, the same in every picture and table.

    Raises:
        ValueError: there are more architectures than colours.
    """
    architectures = dict.fromkeys(model.architecture for model in results.models)
    if len(architectures) > len(COLOURS):
        raise ValueError(
            f"{len(architectures)} architectures in one comparison cannot be told apart in its pictures; at most "
            f"{len(COLOURS)} can: make two comparisons of them."
        )
    return {architecture: place for place, architecture in enumerate(architectures)}


def line_pictures(
    results: Results, size: str, name: str, points_of: Callable[[ModelResult], Points], frame: Frame
) -> list[Picture]:
    """One panel with a line for each model of a size that has points; no panel without any. Adds the size to titles."""
    found = [(model, sorted(points_of(model).items())) for model in select.of_size(results, size)]
    lines = [Line(model.architecture, model.label, points) for model, points in found if points]
    frame = dataclasses.replace(frame, title=f"{frame.title}, {size}")
    return [draw_lines(f"{size}-{name}", frame, lines, colours_of(results))] if lines else []


def final_pictures(results: Results, size: str) -> list[Picture]:
    """Every finished run as a dot."""
    quantity = select.deciding_quantity(results)
    rows = [
        (model.architecture, model.label, [*select.values_by_seed(model, quantity.of).values()])
        for model, _ in select.ranked(select.of_size(results, size), quantity)
    ]
    title = f"Final result, {size}, each mark a seed"
    return [draw_dots(f"{size}-final", title, quantity.short, rows, colours_of(results))] if rows else []


def scale_pictures(results: Results) -> list[Picture]:
    """The deciding number over parameters, where there are several sizes."""
    quantity = select.deciding_quantity(results)
    lines: dict[str, Line] = {}
    for model in results.models:
        for _, found in select.ranked([model], quantity):
            line = lines.setdefault(model.architecture, Line(model.architecture, model.label, []))
            line.points.append((model.parameters / 1e6, found.mean))
            line.band.append(found.band)
    if all(len(line.points) < 2 for line in lines.values()):
        return []
    for line in lines.values():
        line.points, line.band = map(list, zip(*sorted(zip(line.points, line.band))))
    ticks = [(select.of_size(results, size)[0].parameters / 1e6, size) for size in select.sizes_of(results)]
    frame = Frame(
        title="Final result against size", x_label="parameters", y_label=quantity.short, log_x=True, ticks=ticks
    )
    return [draw_lines("scale", frame, [*lines.values()], colours_of(results))]


def curve_pictures(results: Results, size: str) -> list[Picture]:
    """Validation against tokens, operations and wall time: the mean over seeds and a band of a standard deviation."""
    models = select.of_size(results, size)
    shown = {model.architecture: select.shown_runs(model) for model in models}
    points = [point for runs, _ in shown.values() for run in runs for point in run.curve]
    if not points:
        return []
    has_bits = all(point.bits_per_byte is not None for point in points)
    quantity = VALIDATION_BITS if has_bits else VALIDATION_LOSS
    nats = {point.loss / point.bits_per_byte if has_bits else 1.0 for point in points}
    per_unit = statistics.fmean(nats)
    second = None
    if max(nats) - min(nats) < 1e-3 * per_unit:  # one tokenizer, so perplexity is a function of bits per byte
        second = (lambda y: np.exp(np.clip(y * per_unit, -50, 50)), lambda p: np.log(np.maximum(p, 1e-9)) / per_unit)
    y_of = (lambda point: point.bits_per_byte) if has_bits else (lambda point: point.loss)
    found = []
    for name, axis, x_of in (
        ("tokens", "training tokens", lambda point: point.tokens),
        ("flops", "training FLOPs", lambda point: point.flops),
        ("time", "wall time", lambda point: point.seconds),
    ):
        divisor, unit = _unit(name, max(x_of(point) for point in points))
        lines = [_mean_line(model, *shown[model.architecture], x_of, y_of, divisor) for model in models]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        frame = Frame(
            title=f"Validation against {axis}, {size}",
            x_label=f"{axis} ({unit})",
            y_label=quantity.short,
            y_limits=_after_the_start(lines),
            second_label="perplexity a token" if second else "",
            second=second,
        )
        found.append(draw_lines(f"{size}-{name}", frame, lines, colours_of(results)))
    return found


def _mean_line(
    model: ModelResult,
    runs: list[Run],
    is_final: bool,
    x_of: Callable[[CurvePoint], float],
    y_of: Callable[[CurvePoint], float],
    divisor: float,
) -> Line:
    """The mean over runs at the steps that all of them have."""
    by_step = [{point.step: point for point in run.curve if math.isfinite(point.loss)} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    line = Line(model.architecture, model.label, [], dashed=not is_final)
    for step in steps:
        at = [points[step] for points in by_step]
        found = spread([*map(y_of, at)])
        line.points.append((statistics.fmean(map(x_of, at)) / divisor, found.mean))
        line.band.append(found.band)
    return line


def _after_the_start(lines: list[Line]) -> tuple[float, float]:
    """From the lowest value to where the lines are after a seventh of the way, which leaves room for the end."""
    low = min(low for line in lines for low, _ in line.band)
    early = statistics.median(line.points[len(line.points) // 7][1] for line in lines)
    return low, max(early, *(line.points[-1][1] for line in lines))


def _unit(name: str, largest: float) -> tuple[float, str]:
    if name == "time":
        units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        return next((each for each in units if largest >= 3 * each[0]), units[-1])
    if name == "tokens":
        units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
        return next((each for each in units if largest >= each[0]), (1.0, "tokens"))
    exponent = int(math.log10(largest)) if largest > 0 else 0
    return 10.0**exponent, "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def tuning_pictures(results: Results, size: str) -> list[Picture]:
    """The end of each run of the grid over its learning rate."""

    def points(model: ModelResult) -> Points:
        found = select.tuning_points(model)
        return found if len(found) > 1 else {}

    y_label = select.tuning_quantity(results).short
    frame = Frame(title="Learning rates", x_label="learning rate", y_label=y_label, log_x=True)
    return line_pictures(results, size, "learning-rates", points, frame)


def _loss_frame(results: Results, title: str, x_label: str) -> Frame:
    mark = (results.context_length, "training context")
    y_label = f"{select.unit_of_tests(results)}, test"
    return Frame(title=title, x_label=x_label, y_label=y_label, lengths=True, mark=mark)


def position_pictures(results: Results, size: str) -> list[Picture]:
    """The loss over the position in the document."""
    frame = _loss_frame(results, "Loss by position", "position in the document, up to")
    return line_pictures(results, size, "position", select.mean_by_position, frame)


def extrapolation_pictures(results: Results, size: str) -> list[Picture]:
    """The loss on the same tokens over the length of the context."""
    frame = _loss_frame(results, "Beyond the training context", "context length")
    return line_pictures(results, size, "extrapolation", select.mean_extrapolation, frame)


def _column(rows: dict[int, dict[str, Any]], key: str, scale: float = 1.0) -> Points:
    return {length: row[key] * scale for length, row in rows.items() if row.get(key)}


def training_speed_pictures(results: Results, size: str) -> list[Picture]:
    """Tokens a second and share of the peak over the context length, the faster mode of each model."""
    found: list[Picture] = []
    for name, title, y_label, key, scale in (
        ("speed", "Training speed", "tokens/s", "tokens_per_second", 1.0),
        ("mfu", "Share of the peak (MFU)", "MFU, %", "flops_share", 100.0),
    ):
        frame = Frame(title=title, x_label="context length", y_label=y_label, lengths=True, log_y=name == "speed")

        def points(model: ModelResult, key: str = key, scale: float = scale) -> Points:
            return _column(select.fastest_training(results, model), key, scale)

        found += line_pictures(results, size, name, points, frame)
    return found


def generation_pictures(results: Results, size: str) -> list[Picture]:
    """First token, tokens/s after it and memory over the prompt length, for the smallest and the largest batch."""
    found: list[Picture] = []
    sizes = select.batch_sizes(results)
    memory = "peak_bytes" if any(row.get("peak_bytes") for row in results.generation_speed) else "state_bytes"
    for batch in dict.fromkeys(sizes[:1] + sizes[-1:]):
        for name, title, y_label, key, scale in (
            ("first-token", "Time to the first token", "ms", "first_token_milliseconds", 1.0),
            ("decoding", "Decoding speed", "tokens/s, whole batch", "tokens_per_second", 1.0),
            ("memory", "Memory" if memory == "peak_bytes" else "State and cache", "MiB", memory, 2.0**-20),
        ):
            title = f"{title}, batch {batch}"
            frame = Frame(title=title, x_label="prompt length", y_label=y_label, lengths=True, log_y=True)

            def points(model: ModelResult, batch: int = batch, key: str = key, scale: float = scale) -> Points:
                return _column(select.generation_rows(results, model, batch), key, scale)

            found += line_pictures(results, size, f"{name}-batch{batch}", points, frame)
    return found


def state_pictures(results: Results, size: str) -> list[Picture]:
    """The state or cache of a sequence over its length."""
    title = "State or cache of a sequence"
    frame = Frame(title=title, x_label="tokens behind", y_label="KiB", lengths=True, log_y=True)

    def points(model: ModelResult) -> Points:
        return {length: count / 1024 for length, count in model.state_bytes if count}

    return line_pictures(results, size, "state", points, frame)
