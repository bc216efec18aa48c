"""The comparison's panels show every value at its place, and every name beside its line."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from eval.compare.report import drawing
from eval.compare.report.drawing import Frame, Line, draw_dots, draw_lines, large, length_label

COLORS = {"a": 0, "b": 1}


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """`draw_lines` and `draw_dots` return the figure, before it becomes a file, with its text for screen readers."""
    monkeypatch.setattr(drawing, "_finish", lambda name, figure, title, alt: (figure, alt))


def lines_figure(points: list[list[tuple[float, float]]], **frame) -> Figure:
    lines = [Line(name, f"Line {name}", each) for name, each in zip(COLORS, points)]
    return draw_lines("one", Frame(title="T", x_label="x", y_label="y", **frame), lines, COLORS)[0]


@pytest.mark.parametrize(
    ("length", "label"), [(256, "256"), (1000, "1,000"), (1023, "1,023"), (1024, "1k"), (1536, "1,536"), (4096, "4k")]
)
def test_lengths_are_in_units_of_1024_tokens(length, label):
    assert length_label(length) == label


@pytest.mark.parametrize(
    ("count", "label"),
    [(999, "999"), (1e3, "1k"), (1500, "1.5k"), (1e6, "1M"), (1.25e9, "1.25B"), (1e12, "1T"), (15e12, "15T"), (0, "0")],
)
def test_counts_have_the_largest_unit_that_they_reach(count, label):
    assert large(count) == label


@pytest.mark.parametrize(
    "frame", [{}, {"lengths": True}, {"log_x": True, "log_y": True}, {"log_y": True}, {"y_limits": (0.0, 9.0)}]
)
@pytest.mark.parametrize(
    "points",
    [
        [[(256, 4.0), (512, 3.0), (1024, 2.5)], [(256, 5.0), (512, 4.9), (1024, 4.8)]],
        [[(512, 3.0)], [(512, 3.0)]],
    ],
)
def test_every_point_is_inside_its_axes_left_of_the_names(points, frame):
    axes = lines_figure(points, **frame).axes[0]
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    names = {text.get_text(): text.get_position() for text in axes.texts}
    assert sorted(names) == ["Line a", "Line b"]
    shares = [to_share(point) for each in points for point in each]
    assert all(0 < x < min(left for left, _ in names.values()) and 0 < y < 1 for x, y in shares)
    heights = sorted(y for _, y in names.values())
    assert heights[1] - heights[0] > 0.05, "names do not overlap"
    assert {drawing.COLORS[place][0] for place in COLORS.values()} <= {line.get_color() for line in axes.lines}


def test_a_length_has_a_tick_and_a_label():
    axes = lines_figure([[(256, 4.0), (1024, 2.5)], [(256, 5.0), (2048, 2.0)]], lengths=True).axes[0]
    assert list(axes.get_xticks()) == [256, 1024, 2048]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1k", "2k"]
    assert axes.xaxis.get_transform().base == 2 and 200 < axes.get_xlim()[0] < 256


def test_one_length_has_an_axis_of_a_factor_of_four():
    low, high = lines_figure([[(512, 3.0)]], lengths=True).axes[0].get_xlim()
    assert low < 256 and high > 1024


def test_of_many_lengths_at_most_eight_have_ticks():
    lengths = [2**power for power in range(9)]
    ticks = lines_figure([[(length, 1.0) for length in lengths]], lengths=True).axes[0].get_xticks()
    assert list(ticks) == lengths[::2]
    ticks = lines_figure([[(length, 1.0) for length in lengths[:8]]], lengths=True).axes[0].get_xticks()
    assert list(ticks) == lengths[:8]


def test_a_linear_axis_has_ticks_from_zero_to_the_last_point():
    ticks = lines_figure([[(100, 4.0), (1000, 2.5)]]).axes[0].get_xticks()
    assert ticks[0] == 0 and ticks[-1] == 1000 and len(ticks) >= 4


def test_a_logarithmic_axis_of_close_values_has_room_for_ticks():
    axes = lines_figure([[(1, 100.0), (2, 110.0)]], log_y=True).axes[0]
    low, high = axes.get_ylim()
    assert high / low > 4 and low < 100 and high > 110
    assert [tick for tick in axes.yaxis.get_major_locator()() if low < tick < high] == [50, 100, 200]
    assert axes.yaxis.get_major_formatter()(2000, 0) == "2k"


def test_a_band_a_mark_and_a_second_axis_are_drawn():
    line = Line("a", "A", [(1.0, 2.0), (2.0, 1.0)], band=[(1.5, 2.5), (0.5, 1.5)], dashed=True)
    frame = Frame(
        title="T",
        x_label="x",
        y_label="y",
        mark=(1.5, "here"),
        second=(lambda y: 2 * y, lambda y: y / 2),
        second_label="twice",
    )
    figure, alt = draw_lines("one", frame, [line], COLORS)
    axes = figure.axes[0]
    (band,) = axes.collections
    assert {tuple(vertex) for vertex in band.get_paths()[0].vertices} >= {
        (1.0, 1.5),
        (1.0, 2.5),
        (2.0, 0.5),
        (2.0, 1.5),
    }
    assert [text.get_text() for text in axes.texts] == ["here", "A"]
    assert [list(each.get_xdata()) for each in axes.lines[:2]] == [[1.5, 1.5], [1.0, 2.0]]
    assert axes.lines[1].get_linestyle() == "--"
    assert axes.child_axes[0].get_ylabel() == "twice" and alt == "T: y over x for A"
    plain = lines_figure([[(1.0, 2.0), (2.0, 1.0)]]).axes[0]
    assert plain.lines[0].get_linestyle() == "-" and not plain.child_axes and not plain.spines["right"].get_visible()


@pytest.mark.parametrize("count", range(1, 20))
def test_markers_are_few_and_one_is_at_the_end(count):
    axes = lines_figure([[(x, 1.0) for x in range(1, count + 1)]]).axes[0]
    marked = list(range(count))[axes.lines[0].get_markevery()]
    assert marked[-1] == count - 1 and 1 <= len(marked) <= 6
    assert count > 6 or len(marked) == count


def test_dots_show_each_value_and_the_mean():
    rows = [("a", "first", [1.0, 2.0, 6.0]), ("b", "second", [4.0])]
    figure, alt = draw_dots("dots", "T", "loss", rows, COLORS)
    axes = figure.axes[0]
    means, dots = axes.lines[::2], axes.lines[1::2]
    assert [list(dot.get_xdata()) for dot in dots] == [[1.0, 2.0, 6.0], [4.0]]
    assert [set(dot.get_ydata()) for dot in dots] == [{0}, {1}]
    assert [list(mean.get_xdata()) for mean in means] == [[3.0, 3.0], [4.0, 4.0]]
    assert all(low < place < high for place, (low, high) in enumerate(mean.get_ydata() for mean in means))
    assert [text.get_text() for text in axes.texts] == ["3.000", "4.000"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    bottom, top = axes.get_ylim()
    assert bottom > 1 and top < 0, "the first row is on top"
    left, right = axes.get_xlim()
    assert left < 1 and right > 6
    assert alt == "T: loss: first 3.000, second 4.000"


def test_a_mean_far_beyond_the_others_gets_an_arrow_instead_of_the_axis():
    rows = [("a", f"row {place}", [1.0 + place / 10]) for place in range(4)]
    figure, _ = draw_dots("dots", "T", "loss", [*rows, ("b", "lost", [9.0])], COLORS)
    axes = figure.axes[0]
    assert 1.3 < axes.get_xlim()[1] < 2
    assert [text.xy for text in axes.texts if text.arrow_patch is not None] == [(1, 4)]
    figure, _ = draw_dots("dots", "T", "loss", [*rows[:2], ("b", "lost", [9.0])], COLORS)
    axes = figure.axes[0]
    assert axes.get_xlim()[1] > 9 and all(text.arrow_patch is None for text in axes.texts), "three rows are all shown"


def test_rows_of_one_value_have_an_axis():
    left, right = draw_dots("dots", "T", "loss", [("a", "only", [2.0])], COLORS)[0].axes[0].get_xlim()
    assert left < 2 < right
    left, right = draw_dots("dots", "T", "loss", [("a", "only", [0.0])], COLORS)[0].axes[0].get_xlim()
    assert left < 0 < right
