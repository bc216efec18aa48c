"""Forecasts of losses, registered in a file before their runs exist, with what was measured afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.scaling_laws.fits import read_fits
from eval.scaling_laws.planned import planned_point
from eval.scaling_laws.points import LossPoint, ends_in_words
from eval.scaling_laws.predict import predict
from eval.scaling_laws.records import as_csv, read_csv
from eval.study.engine import PlannedRun, examine
from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.durations import utc_now
from xlstm_lm.base.machine import environment
from xlstm_lm.base.paths import user_path
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.run_config import load_run_config


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A row of forecast.csv."""

    run: str
    """Folder of the run, as its recipe gives it: from the folder in which the commands are given, unless absolute."""
    architecture: str
    params: int
    tokens: int
    flops: float
    """FLOPs of the run's training."""
    times_largest: float
    """These FLOPs over the largest that the fit used."""
    predicted: float
    """Expected held-out loss in nats a token."""
    low: float
    """Lower end of its interval."""
    high: float
    method: str
    """vpnls or huber."""
    fit: str
    """Path of fit.json."""
    fit_sha256: str
    """Digest of that file."""
    git: str
    """Commit of the code."""
    registered: str
    """UTC time at which the forecast was written."""
    measured: float | None = None
    """Held-out loss of the finished run; None before."""
    completed: str = ""
    """UTC time at which the measured loss was entered; empty before."""

    @property
    def holds(self) -> bool | None:
        """Whether the measured loss is in the interval; None before."""
        return None if self.measured is None else self.low <= self.measured <= self.high


CHOICES = {
    "schedule_in_words": "the schedule",
    "context": "the number of tokens a row",
    "batch_tokens": "the number of tokens a step",
    "data": "the training data",
}
"""Fields of a point whose values a forecast run should share with the fitted ones, and their names."""
SHARE_TOLERANCE = 0.01
"""Difference of cooldowns, as shares of the steps, that whole steps may cause."""
COLUMNS = tuple(each.name for each in dataclasses.fields(Forecast))


def read_forecasts(path: Path) -> list[Forecast]:
    """Read the forecasts in a file; none where it is missing.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        return read_csv(Forecast, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Restore it from a copy: its forecasts cannot be repeated."
        ) from None


def write_forecasts(forecasts: list[Forecast], path: Path) -> None:
    """Write forecasts as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, as_csv(Forecast, forecasts).encode())


def register(fit_path: Path, recipe: Path, architecture: str | None, out: Path) -> tuple[Forecast, list[str]]:
    """Predict the loss of a run and append it to a file, before the run exists.

    Returns the forecast, and a note for each choice of the run's recipe that no run of the fit shares.

    Args:
        fit_path: fit.json.
        recipe: of the run.
        architecture: of the run, as the fit calls it; None where the fit has one alone.
        out: forecast.csv.

    Raises:
        ValueError: the run's folder exists, the run is in the file already, or the fit cannot predict.
    """
    config = load_run_config([recipe])
    folder, forecasts = config.training.folder, read_forecasts(out)
    if folder.exists():
        raise ValueError(
            f"{folder} exists: a forecast is registered before its run begins. Forecast a run that has not begun, or "
            "choose another training.run_dir."
        )
    if any(Path(each.run).absolute() == folder for each in forecasts):
        raise ValueError(f"{out} has a forecast of {folder} already; a second one would say less. Choose another run.")
    fits = read_fits(fit_path)
    names = [each.architecture for each in fits.architectures]
    if architecture is None and len(names) > 1:
        raise ValueError(f"{fit_path} has several architectures ({', '.join(names)}): name one with --architecture.")
    found = fits.of(architecture or names[0])
    if not found.samples:
        raise ValueError(f"{fit_path} has no samples, thus no interval: fit again without --samples 0.")
    planned = planned_point(config)
    params, tokens = int(planned.params), int(planned.tokens)
    prediction = predict(found.fit, found.drawn, found.points, params, tokens)
    forecast = Forecast(
        run=str(user_path(config.training.run_dir)),
        architecture=found.architecture,
        params=params,
        tokens=tokens,
        flops=planned.flops,
        times_largest=planned.flops / max(point.flops for point in found.points),
        predicted=prediction.loss,
        low=prediction.low,
        high=prediction.high,
        method=found.chosen,
        fit=str(fit_path),
        fit_sha256=hashlib.sha256(fit_path.read_bytes()).hexdigest(),
        git=environment(torch.device("cpu"))["git_commit"] or "",
        registered=utc_now(),
    )
    write_forecasts([*forecasts, forecast], out)
    return forecast, [f"{folder}: {text}" for text in _differences(planned, found.points)]


def _differences(planned: LossPoint, points: Sequence[LossPoint]) -> list[str]:
    """A note for each choice of a planned run that changes the loss by itself and that no point shares."""
    notes = []
    for name, words in CHOICES.items():
        own, known = getattr(planned, name), dict.fromkeys(value for point in points if (value := getattr(point, name)))
        if known and own not in known:
            notes.append((words, own, ", ".join(map(str, known))))
    shares = [point.cooldown_fraction for point in points if point.cooldown_fraction]
    own = planned.cooldown_fraction
    if own and shares and not min(shares) - SHARE_TOLERANCE <= own <= max(shares) + SHARE_TOLERANCE:
        notes.append(("the cooldown's share of the steps", f"{own:.0%}", ends_in_words(shares, ".0%")))
    return [
        f"{words} is {own}, that of the fitted runs {known}; the forecast does not account for the difference."
        for words, own, known in notes
    ]


def complete(path: Path) -> list[Forecast]:
    """Enter the losses of runs that are finished into a file of forecasts, and return all of it."""
    forecasts = [_completed(each) for each in read_forecasts(path)]
    if forecasts != read_forecasts(path):
        write_forecasts(forecasts, path)
    return forecasts


def _completed(forecast: Forecast) -> Forecast:
    config = RunFolder(forecast.run).config_path
    if forecast.measured is not None or not config.is_file():
        return forecast
    run = load_run_config([config])
    if count_parameters(run.model) != forecast.params or PlannedRun("", run).tokens != forecast.tokens:
        raise ValueError(
            f"{forecast.run} is another run than was forecast: {count_parameters(run.model):,} parameters and "
            f"{PlannedRun('', run).tokens:,} tokens in place of {forecast.params:,} and {forecast.tokens:,}."
        )
    state = examine(PlannedRun("", run))
    if state.status != "finished":
        return forecast
    return dataclasses.replace(forecast, measured=state.last_validation["loss"], completed=utc_now())
