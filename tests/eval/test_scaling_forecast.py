"""Forecasts before their runs, and the report with its pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from eval.scaling_laws.__main__ import main
from eval.scaling_laws.fits import FitOptions, Fits, fit_table, read_fits
from eval.scaling_laws.forecast import complete, read_forecasts, register, write_forecasts
from eval.scaling_laws.planned import planned_point
from eval.scaling_laws.points import Table
from eval.scaling_laws.report import write_report
from eval.study.results_file import write_results
from tests.eval.invented_points import CHINCHILLA, isoflop_grid, ladder
from tests.eval.small_ladder import write_recipe
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.run_config import as_recipe, load_run_config


@pytest.fixture(scope="module")
def fits() -> Fits:
    """Fits of a small ladder and of grids."""
    points = ladder(CHINCHILLA, [1e4, 1e5, 1e6, 1e7, 3e7], [10, 20, 40], noise=(0.002, 0.002), architecture="lstm")
    points += isoflop_grid(CHINCHILLA, 2, count=5, architecture="other")
    return fit_table(Table(points), FitOptions(samples=8, hold_out=1))


@pytest.fixture
def fit_path(fits, tmp_path) -> Path:
    """The file of the fits."""
    write_results(tmp_path / "fit.json", fits.as_json())
    return tmp_path / "fit.json"


def run_recipe(folder: Path, **training) -> Path:
    """A recipe of a run of 200 steps."""
    values = json.loads(write_recipe(folder).read_text())
    values["model"] = {"family": "lstm", "vocab_size": 257, "embedding_dim": 16, "num_blocks": 1}
    values["training"] |= {"run_dir": str(folder / "large"), "steps": 200} | training
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_forecast_is_registered_before_its_run(fits, fit_path, tmp_path):
    recipe, out = run_recipe(tmp_path), tmp_path / "forecast.csv"
    forecast, notes = register(fit_path, recipe, "lstm", out)
    assert notes == []  # the invented points do not tell how they were trained
    assert read_forecasts(out) == [forecast] and forecast.measured is None and forecast.holds is None
    config = load_run_config([recipe])
    assert (forecast.tokens, forecast.run) == (12800, str(tmp_path / "large"))
    assert forecast.flops == training_flops_per_token(config.model, 16) * 12800
    surface = fits.of("lstm").fit.surface
    assert forecast.low < forecast.predicted == surface.loss(forecast.params, 12800) < forecast.high
    with pytest.raises(ValueError, match="has a forecast of .*large already"):
        register(fit_path, recipe, "lstm", out)
    with pytest.raises(ValueError, match=r"several architectures \(lstm, other\): name one with --architecture"):
        register(fit_path, run_recipe(tmp_path, run_dir=str(tmp_path / "b")), None, out)


def test_choices_that_no_fitted_run_shares_are_named(fits, tmp_path):
    """The forecast is of the fit's recipe; the run's differs in its cooldown, its rows and its data."""
    how = {"schedule": "wsd", "cooldown_shape": "linear", "context": 16, "batch_tokens": 64, "data": "other"}
    points = [dataclasses.replace(each, **how, cooldown_fraction=0.2) for each in fits.of("lstm").points]
    fitted = dataclasses.replace(
        fits, architectures=[dataclasses.replace(fits.of("lstm"), points=points), fits.of("other")]
    )
    write_results(tmp_path / "fit.json", fitted.as_json())
    recipe = run_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["schedule"] = {"kind": "wsd", "cooldown": 0.5, "cooldown_shape": "1-sqrt"}
    values["data"] |= {"context_length": 32, "global_batch_size": 2}
    recipe.write_text(yaml.safe_dump(values))
    _, notes = register(tmp_path / "fit.json", recipe, "lstm", tmp_path / "forecast.csv")
    folder = tmp_path / "large"
    assert [text.partition(";")[0] for text in notes] == [
        f"{folder}: the schedule is wsd with a 1-sqrt cooldown, that of the fitted runs wsd with a linear cooldown",
        f"{folder}: the number of tokens a row is 32, that of the fitted runs 16",
        f"{folder}: the training data is text.txt, that of the fitted runs other",
        f"{folder}: the cooldown's share of the steps is 50%, that of the fitted runs 20%",
    ]


def test_a_pattern_of_training_data_is_named_with_its_folders(tmp_path):
    """Two folders of token ids are different data, although both patterns end in *.bin."""
    config = load_run_config([run_recipe(tmp_path)])
    paths = ["runs/data/packages/sources-0/*.bin", "text/one.txt"]
    source = dataclasses.replace(config.data.sources[0], paths=paths)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[source]))
    assert planned_point(config).data == "packages/sources-0/*.bin,one.txt"


def test_a_run_that_exists_cannot_be_forecast(fit_path, tmp_path):
    (tmp_path / "large").mkdir()
    with pytest.raises(ValueError, match="large exists: a forecast is registered before its run begins"):
        register(fit_path, run_recipe(tmp_path), "lstm", tmp_path / "forecast.csv")
    assert not (tmp_path / "forecast.csv").exists()


def test_a_fit_without_samples_cannot_forecast(fits, tmp_path):
    bare = dataclasses.replace(fits.of("lstm"), samples=[])
    write_results(tmp_path / "fit.json", dataclasses.replace(fits, architectures=[bare]).as_json())
    with pytest.raises(ValueError, match="has no samples, thus no interval"):
        register(tmp_path / "fit.json", run_recipe(tmp_path), None, tmp_path / "forecast.csv")


def finish(folder: Path, recipe: Path, loss: float, step: int = 200) -> None:
    """Write the folder of a run of a recipe as if it had been trained."""
    folder.mkdir()
    RunFolder(folder).write_config(as_recipe(load_run_config([recipe])))
    record = {"split": "validation", "step": step, "tokens": 64 * step, "loss": loss, "bits_per_byte": None}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "checkpoints" / f"step_{step:08}").mkdir(parents=True)


def test_the_measured_loss_is_entered_when_the_run_is_finished(fit_path, tmp_path):
    recipe, out = run_recipe(tmp_path), tmp_path / "forecast.csv"
    forecast, _ = register(fit_path, recipe, "lstm", out)
    assert complete(out) == [forecast]
    finish(tmp_path / "large", recipe, forecast.high + 1)
    (done,) = complete(out)
    assert done.measured == forecast.high + 1 and done.holds is False and done.completed >= done.registered
    assert dataclasses.replace(done, measured=None, completed="") == forecast
    before = out.read_bytes()
    assert complete(out) == [done] and out.read_bytes() == before


def test_a_forecast_goes_with_the_project_to_another_folder(fit_path, tmp_path, monkeypatch):
    """A relative run_dir stays relative, as in a clone of a repository that holds the forecast."""
    clones = [tmp_path / "mine", tmp_path / "theirs"]
    for clone in clones:
        clone.mkdir()
    monkeypatch.chdir(clones[0])
    recipe, out = run_recipe(tmp_path, run_dir="runs/large"), tmp_path / "forecast.csv"
    assert register(fit_path, recipe, "lstm", out)[0].run == "runs/large"
    with pytest.raises(ValueError, match="has a forecast of .*mine/runs/large already"):
        register(fit_path, run_recipe(tmp_path, run_dir=str(clones[0] / "runs/large")), "lstm", out)
    monkeypatch.chdir(clones[1])
    Path("runs").mkdir()
    finish(Path("runs/large"), recipe, 3.0)
    assert complete(out)[0].measured == 3.0


def test_another_run_in_the_forecasts_folder_is_refused(fit_path, tmp_path):
    out = tmp_path / "forecast.csv"
    register(fit_path, run_recipe(tmp_path), "lstm", out)
    finish(tmp_path / "large", run_recipe(tmp_path, steps=100), 3.0, step=100)
    with pytest.raises(ValueError, match=r"is another run than was forecast: .* 6,400 tokens in place of"):
        complete(out)


def test_a_damaged_file_of_forecasts_is_named(tmp_path):
    write_forecasts([], tmp_path / "forecast.csv")
    assert read_forecasts(tmp_path / "forecast.csv") == []
    (tmp_path / "forecast.csv").write_text("run,params\nx,many\n")
    with pytest.raises(ValueError, match="forecast.csv is damaged: .* Restore it from a copy"):
        read_forecasts(tmp_path / "forecast.csv")


def test_the_commands_forecast_and_report_with_every_picture(fit_path, tmp_path, capsys):
    out, report = tmp_path / "forecast.csv", tmp_path / "report"
    recipe = run_recipe(tmp_path)
    flags = ["forecast", str(fit_path), "--run", str(recipe), "--out", str(out)]
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    with pytest.raises(SystemExit, match="0"):
        main([*flags, "--architecture", "lstm"])
    assert "times the largest fitted FLOPs. Written to" in capsys.readouterr().out
    (forecast,) = read_forecasts(out)
    assert write_report(read_fits(fit_path), [forecast], tmp_path / "before")
    assert "| not yet | not yet |" in (tmp_path / "before" / "report.md").read_text()
    finish(tmp_path / "large", recipe, forecast.predicted)
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(fit_path), "--forecasts", str(out), "--out", str(report)])
    names = ["loss", "isoflop", "optimum", "residuals", "predicted"]
    assert sorted(path.name for path in report.glob("*.png")) == sorted(f"{name}.png" for name in names)
    assert all((report / f"{name}.svg").read_text().startswith("<?xml") for name in names)
    page = (report / "report.md").read_text()
    assert all(f"({name}.png)" in page and f"({name}.svg)" in page for name in names)
    assert f"| large | {forecast.registered} | {forecast.times_largest:.3g} | {forecast.predicted:.4f} |" in page
    assert f"| {forecast.predicted:.4f} | yes |" in page and "## Held out" in page
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(fit_path), "--forecasts", str(out), "--out", str(report)])
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
