"""The scaling study in the report of a comparison: its files are checked first, and the page shows what they hold."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from eval.compare.__main__ import main
from eval.compare.config import load_comparison
from eval.compare.report.scaling import scaling_section
from eval.compare.results import Scaling, load_results, save_results
from eval.scaling_laws.fits import FitOptions, Fits, fit_table
from eval.scaling_laws.forecast import Forecast, write_forecasts
from eval.scaling_laws.points import Table
from eval.scaling_laws.surface import Surface
from eval.study.results_file import write_results
from tests.eval.invented_points import CHINCHILLA, isoflop_grid, ladder
from tests.eval.invented_results import sparse_results
from tests.eval.test_compare_report import Page

SMOKE = Path(__file__).parents[2] / "configs" / "compare" / "smoke.yaml"
FORECAST = Forecast(
    run="runs/large", architecture="xlstm", params=10**8, tokens=10**9, flops=1e18, times_largest=10.0, predicted=3.0,
    low=2.9, high=3.1, method="vpnls", fit="fit.json", fit_sha256="0", git="", registered="2026-11-29", measured=3.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def fits() -> Fits:
    """Fits of an architecture that the comparison has, and of one that needs 2 times its FLOPs and is on grids."""
    points = ladder(CHINCHILLA, [1e7, 3e7, 1e8, 3e8, 1e9], [10, 20, 40], noise=(0.001, 0.001), architecture="xlstm")
    worse = Surface(1.69, 406.4, 410.7 * 2**0.28, 0.34, 0.28)
    points += isoflop_grid(worse, 2, count=5, architecture="new <kind>")
    return fit_table(Table(points), FitOptions(samples=6, hold_out=1))


@pytest.fixture
def write(fits, tmp_path):
    """Writes the smallest comparison with a section `scaling`, and the files that it names."""
    write_results(tmp_path / "fit.json", fits.as_json())
    write_forecasts([FORECAST], tmp_path / "forecast.csv")

    def write_comparison(**scaling: str) -> Path:
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({"include": [str(SMOKE)], "compare": {"scaling": scaling}}))
        return path

    return write_comparison


def test_the_study_that_a_comparison_names_is_read(write, fits, tmp_path):
    path = write(fit=str(tmp_path / "fit.json"), forecasts=str(tmp_path / "forecast.csv"))
    found = load_comparison(path).scaling
    assert found.forecasts == [FORECAST] and found.fits.comparisons == fits.comparisons
    for there, fitted in zip(found.fits.architectures, fits.architectures, strict=True):
        assert there == dataclasses.replace(fitted, samples=[]) and fitted.samples
    assert load_comparison(SMOKE).scaling is None


def test_a_study_that_cannot_be_shown_is_named_before_any_run(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text(json.dumps({"architectures": [1], "options": {}}))
    (tmp_path / "damaged.csv").write_text("run,params\nx,many\n")
    for scaling, message in (
        ({"fit": "missing.json"}, "missing.json is missing. Write it with python -m eval.scaling_laws fit"),
        ({"fit": "damaged.json"}, "damaged.json is damaged: architectures.0"),
        ({"fit": "fit.json", "forecasts": "missing.csv"}, "missing.csv is missing. Write it with"),
        ({"fit": "fit.json", "forecasts": "damaged.csv"}, "damaged.csv is damaged"),
        ({"fit": ""}, "'' is no path"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--config", str(write(**scaling)), "--out", "out"])
        printed = capsys.readouterr().err
        assert f"comparison.yaml: compare.scaling: {message}" in printed, printed
        assert "To compare without a scaling study, remove compare.scaling." in printed
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"compare.scaling.fits = 'fit.json'.*Did you mean compare.scaling.fit\?"):
        load_comparison(write(fits="fit.json"))


def test_the_page_shows_the_study_and_stands_alone(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="3"):
        main(["--config", str(write(fit="fit.json", forecasts="forecast.csv")), "--out", "out", "--stage", "report"])
    text, markdown = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    page = Page(text)
    assert page.loaded == [] and page.open == [] and "scaling-laws" in page.names and "<script" not in text
    pictures = sorted(path.stem for path in (tmp_path / "out" / "pictures").glob("scaling-*.png"))
    names = ["isoflop", "loss", "optimum-1", "optimum-2", "predicted", "residuals-1", "residuals-2"]
    assert pictures == [f"scaling-{name}" for name in names]
    assert all(f"(pictures/{name}.png)" in markdown for name in pictures)
    labels = re.findall(r'<svg[^>]* aria-label="([^"]*)"', text)
    for title in ("Loss and frontier", "IsoFLOP parabolas, new &lt;kind&gt;", "Best size N*", "Predicted and measured"):
        assert sum(label.startswith(f"{title}: ") for label in labels) == 1, title
    words = " ".join("".join(page.words).split())
    assert "Loss floor and exponents, with intervals of 90%" in words and "0.4516" in words
    (ratio,) = load_results(tmp_path / "out" / "results.json").scaling.fits.comparisons
    assert ratio.ratio == pytest.approx(0.5, rel=0.1)
    ends = f"{ratio.interval[0]:.4g} to {ratio.interval[1]:.4g}"
    assert f"| xlstm | new &lt;kind> | {ratio.loss:.4f} | {ratio.ratio:.3g} | {ends} |" in markdown


def test_a_parabola_without_a_minimum_is_read_back(fits, tmp_path):
    results = sparse_results()
    found = fits.of("new <kind>")
    first, *others = found.isoflop.budgets
    flat = dataclasses.replace(first, over_params=dataclasses.replace(first.over_params, minimum=math.nan))
    isoflop = dataclasses.replace(found.isoflop, budgets=[flat, *others])
    changed = dataclasses.replace(found, isoflop=isoflop)
    results.scaling = Scaling(source="fit.json", fits=dataclasses.replace(fits, architectures=[changed]))
    save_results(results, tmp_path / "results.json")
    (there,) = load_results(tmp_path / "results.json").scaling.fits.architectures
    assert math.isnan(there.isoflop.budgets[0].over_params.minimum) and there.isoflop.budgets[1:] == others
    assert dataclasses.replace(there, isoflop=found.isoflop) == found


def test_an_architecture_has_the_comparisons_color(fits):
    results = sparse_results()
    assert not scaling_section(results).parts
    results.scaling = Scaling(source="fit.json", fits=fits)
    section = scaling_section(results)
    (loss, *_), tables = section.parts[0].pictures, section.parts[1].tables
    xlstm, other = (f"stroke: var(--model-{place})" for place in (0, 2))
    assert xlstm in loss.svg and other in loss.svg and f"stroke: var(--model-{1})" not in loss.svg, "1: the transformer"
    assert [row[0].architecture for row in tables[0].rows] == ["xlstm", ""]
    warned = dataclasses.replace(fits.of("xlstm"), warnings=["vpnls: E = 0, its bound."])
    results.scaling.fits = dataclasses.replace(fits, architectures=[warned], notes=["C = 6 N D is assumed."])
    remarks = "xlstm: vpnls: E = 0, its bound.\nC = 6 N D is assumed."
    assert scaling_section(results).folds == [("Warnings and notes of the fits", remarks)]
