"""Tables of loss points: other names of columns, assumptions that are named, and each mistake in a file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from eval.scaling_laws.__main__ import main
from eval.scaling_laws.fits import FitOptions, fit_table, read_fits, with_best_rates
from eval.scaling_laws.points import LossPoint, Table, holds_points, read_points, write_points
from eval.scaling_laws.summary import as_markdown
from eval.scaling_laws.surface import Surface
from tests.eval.invented_points import CHINCHILLA, isoflop_grid, ladder, point


def written(tmp_path, text: str):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_a_table_is_read_as_written(tmp_path):
    points = [
        LossPoint(
            run="a-d1", trunk="a", architecture="xlstm", params=1234567, params_non_embedding=None, tokens=1e6,
            flops=7.25e12, flops_per_token=7.25e6, context=256, batch_tokens=4096, learning_rate=3e-3, schedule="wsd",
            cooldown_fraction=0.2, cooldown_shape="1-sqrt", seed=0, loss=1.2345678901234, loss_std=0.001,
            bits_per_byte=1.7, val_tokens=32768, data="peps", git="abc", source="runs/a-d1",
        ),
        LossPoint(run="b", trunk="b", params=2e6, tokens=1e6, flops=12e12, loss=2.0),
    ]  # fmt: skip
    write_points(points, tmp_path / "runs.csv")
    assert read_points(tmp_path / "runs.csv") == Table(points)


def test_a_table_of_an_earlier_version_is_read_and_may_be_replaced(tmp_path):
    write_points([point(CHINCHILLA, 1e7, 1e9)], tmp_path / "runs.csv")
    header, row = (tmp_path / "runs.csv").read_text().splitlines()
    assert ",,," in row and ",cooldown_shape," in header
    earlier = f"{header.replace('cooldown_shape,', '')}\n{row.replace(',,,', ',,', 1)}\n"
    path = written(tmp_path, earlier)
    assert holds_points(path) and read_points(path).points == [point(CHINCHILLA, 1e7, 1e9)]
    assert not holds_points(written(tmp_path, "params,tokens,loss\n1,1,1\n"))
    assert holds_points(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("header", "row", "point", "note"),
    [
        ("N,D,L", "1e6,2e7,3", (1e6, 2e7, 1.2e14), "C = 6 N D is assumed"),
        ("params,budget,loss", "1e6,1.2e14,3", (1e6, 2e7, 1.2e14), "D = C / (6 N) is assumed"),
        ("N,D,C,L", "1e6,2e7,1e14,3", (1e6, 2e7, 1e14), ""),
        ("N,D,L,flops_per_token", "1e6,2e7,3,5e6", (1e6, 2e7, 1e14), ""),
    ],
)
def test_aliases_and_assumptions(tmp_path, header, row, point, note):
    table = read_points(written(tmp_path, f"{header}\n{row}\n"))
    (found,) = table.points
    assert (found.params, found.tokens, found.flops) == pytest.approx(point)
    assert note in " ".join(table.notes) and bool(table.notes) == bool(note)


def test_rows_that_diverged_are_left_out_with_a_note(tmp_path):
    table = read_points(written(tmp_path, "N,D,C,L,status\n1,1,6,3,finished\n1,2,12,nan,diverged\n"))
    assert len(table.points) == 1
    assert table.notes == ["Left out: 1 rows of status diverged (lines 3)."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parms,tokens,loss\n1,1,1\n", r"has no column params; it has parms, tokens, loss. Did you mean parms"),
        ("N,loss\n1,1\n", r"has no column tokens \(or flops\)"),
        ("N,params,D,L\n1,1,1,1\n", r"has the column params more than once \(N, params\)"),
        ("N,D,L\n1,1,nan\n", r"runs.csv, line 2: loss is nan, which is not finite"),
        ("N,D,L\n1,1,inf\n", r"line 2: loss is inf"),
        ("N,D,L\n1,1,x\n", r"line 2: loss is 'x', which is no number"),
        ("N,D,L\n1,1,\n", r"line 2: loss is empty"),
        ("N,D,L\n1,,1\n", r"line 2: tokens and flops are both empty"),
        ("N,D,L\n1,1,1\n-1,1,1\n", r"line 3: params is -1; it must be above 0"),
        ("N,D,L,loss_std\n1,1,1,-0.1\n", r"line 2: loss_std is -0.1; it must be 0 or above"),
        ("N,D,L,seed\n1,1,1,0.5\n", r"seed is 0.5; it must be a whole number"),
        ("N,D,L,status\n1,1,1,failed\n", r"has no finished row"),
        ("run,N,D,L\na,1,1,1\na,1,1,2\n", r"has the run a at 1 tokens more than once \(losses 1 and 2\)"),
        (
            "run,trunk,N,D,L,learning_rate\na,t,1,1,1,0.001\nb,t,1,2,2,0.002\n",
            r"the trunk t at two values of learning_rate, 0.001 \(a\) and 0.002 \(b\)",
        ),
        ("run,trunk,N,D,L\na,t,1,1,1\nb,t,2,2,2\n", r"the trunk t at two values of params"),
    ],
)
def test_each_mistake_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_points(written(tmp_path, text))


def test_flops_that_differ_from_the_configuration_are_named(tmp_path):
    path = written(tmp_path, "run,N,D,C,L\na,1,1,100,1\nb,1,2,100,1\n")
    assert len(read_points(path, lambda point: 100.9).points) == 2
    with pytest.raises(ValueError, match=r"over 1%:\n  b: 100 there, 98 by its configuration\nCollect"):
        read_points(path, lambda point: 98 if point.run == "b" else None)


def test_the_best_rate_of_a_size_is_used():
    points = ladder(CHINCHILLA, [1e7, 2e7], [10, 20])
    rated = [dataclasses.replace(point, learning_rate=1e-3) for point in points]
    worse = [
        dataclasses.replace(point, learning_rate=3e-3, loss=point.loss + 0.1, run=f"{point.run}-x", trunk="x")
        for point in rated[:2]
    ]
    table = with_best_rates(Table([*worse, *rated]))
    assert sorted(point.run for point in table.points) == sorted(point.run for point in rated)
    assert table.notes == ["model, 10,000,000 parameters: of rates 0.001, 0.003 0.001 is used."]
    apart = [dataclasses.replace(worse[0], tokens=7.0)]
    with pytest.raises(ValueError, match="no common number of tokens"):
        with_best_rates(Table([*apart, *rated]))


def test_a_table_is_fitted_architecture_by_architecture():
    points = isoflop_grid(CHINCHILLA, 2, count=7, architecture="one")
    fits = fit_table(Table(points), FitOptions(samples=0, hold_out=2))
    (one,) = fits.architectures
    assert set(one.fits) == {"vpnls", "huber"} and one.warnings == [] and one.isoflop is not None
    assert [held.flops for held in one.held_out] == pytest.approx([1e21, 1e21])
    assert [held.expected for held in one.held_out] == pytest.approx([held.measured for held in one.held_out])
    assert [each.flops for each in one.frontier[:: len(one.frontier) - 1]] == pytest.approx([1e17, 1e21])


def test_a_surface_without_a_best_size_is_a_warning():
    flat = Surface(1.69, 0.0, 410.7, 0.34, 0.28)
    points = [point(flat, n, d, architecture="flat") for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
    points += isoflop_grid(CHINCHILLA, 2, count=5, architecture="other")
    fits = fit_table(Table(points), FitOptions(samples=0))
    flat = fits.of("flat")
    assert flat.frontier == [] and len(fits.of("other").frontier) == 13
    assert any("A = 0, its bound" in text for text in flat.warnings)
    assert any("has no best size: it improves all the way to 1e+03 parameters" in text for text in flat.warnings)
    assert "no best size" in fits.notes[-1] and fits.comparisons == []
    assert "| flat | vpnls (used) | 1.69 | " in as_markdown(fits)


@pytest.mark.parametrize(("form", "methods"), [("gamma", {"huber"}), ("isoflop", set())])
def test_other_forms_are_fitted_and_printed(form, methods):
    fits = fit_table(Table(isoflop_grid(CHINCHILLA, 2, count=5)), FitOptions(form=form, samples=0))
    assert set(fits.architectures[0].fits) == methods
    assert ("## Surfaces" in as_markdown(fits)) == bool(methods)
    assert "C^0.4516, D* = " in as_markdown(fits)


def test_the_schedules_of_the_points_are_stated_and_a_mixture_is_noted():
    points = ladder(CHINCHILLA, [1e7, 2e7, 4e7], [10, 20, 40])
    linear = [
        dataclasses.replace(each, schedule="wsd", cooldown_fraction=0.2, cooldown_shape="linear") for each in points
    ]
    fits = fit_table(Table(linear), FitOptions(samples=0))
    assert fits.notes == []
    row = "| model | 9 | 3 | 1e+07 to 4e+07 | 1e+08 to 1.6e+09 | 6e+15 to 3.84e+17 |"
    assert f"{row} wsd with a linear cooldown over 20% of the steps |" in as_markdown(fits)
    other = [dataclasses.replace(each, cooldown_shape="1-sqrt", cooldown_fraction=0.1) for each in linear[:3]]
    fits = fit_table(Table(other + linear[3:]), FitOptions(samples=0))
    one, two = "wsd with a 1-sqrt cooldown", "wsd with a linear cooldown"
    assert f"change the loss by themselves: {one} (model); {two} (model)." in fits.notes[0]
    assert f"{row} {one} over 10% of the steps; {two} over 20% of the steps |" in as_markdown(fits)
    assert f"{row} unknown |" in as_markdown(fit_table(Table(points), FitOptions(samples=0)))


def test_an_architecture_that_cannot_be_fitted_is_named():
    with pytest.raises(ValueError, match="model: The points have 2 different values of params"):
        fit_table(Table(ladder(CHINCHILLA, [1e7, 2e7], [10, 20, 40])), FitOptions())
    with pytest.raises(ValueError, match="0 budgets of compute have 3 sizes"):
        fit_table(Table(ladder(CHINCHILLA, [1e7, 2e7], [10, 20, 40])), FitOptions(form="isoflop"))


def test_the_command_prints_and_writes_all_fits(tmp_path, capsys):
    points = [*ladder(CHINCHILLA, [1e7, 1e8, 1e9, 3e9], [10, 20, 40], architecture="one")]
    write_points(points, tmp_path / "runs.csv")
    table, out = str(tmp_path / "runs.csv"), str(tmp_path / "fit.json")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", table, "--samples", "3", "--hold-out", "largest:1", "--out", out])
    printed = capsys.readouterr().out
    assert "| one | vpnls (used) | 1.69 | 406.4 | 410.7 | 0.34 | 0.28 | 1 | 0.4516 |" in printed
    assert "* one: 4 sizes: intervals by trunk are too narrow below 5" in printed
    fits = read_fits(tmp_path / "fit.json")
    one = fits.of("one")
    assert one.fits["huber"].surface.alpha == pytest.approx(0.34, rel=1e-4) and one.points == points
    assert len(one.samples) == 3 and one.held_out[0].measured == points[-1].loss
    written_values = json.loads((tmp_path / "fit.json").read_text())
    assert "scipy" in written_values.pop("environment")
    assert json.loads(json.dumps(fits.as_json())) == written_values
    with pytest.raises(ValueError, match="The fit has no architecture two; it has one"):
        fits.of("two")
    (tmp_path / "fit.json").write_text('{"architectures": [1], "options": {}, "comparisons": [], "notes": []}')
    with pytest.raises(ValueError, match=r"fit.json is damaged: architectures.0: .* Write it with"):
        read_fits(tmp_path / "fit.json")


@pytest.mark.parametrize(("flag", "value"), [("--hold-out", "3"), ("--hold-out", "largest:0"), ("--form", "cubic")])
def test_a_wrong_flag_of_fit_is_refused(flag, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "runs.csv", flag, value])
    assert value.split(":")[-1] in capsys.readouterr().err
