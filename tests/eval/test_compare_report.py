"""The report of a comparison: it says what the numbers say, lists what is missing, and stands alone."""

from __future__ import annotations

import html.parser
import math
import re
from pathlib import Path

import numpy as np
import pytest

from eval.compare.config import load_comparison
from eval.compare.report import pictures, select
from eval.compare.report.answer import checks, further_findings, verdict
from eval.compare.report.drawing import Frame, Line, draw_lines
from eval.compare.report.parts import show_spread
from eval.compare.report.pictures import scale_pictures
from eval.compare.report.select import deciding_quantity, sides, values_by_seed
from eval.compare.report.tables import final_table
from eval.compare.report.write import write_report
from eval.compare.results import Published, Results, load_results, save_results
from eval.study.picture import spread_out
from eval.study.spread import T_975, difference, spread
from tests.eval.invented_results import full_results, make_model, make_results, make_run, sparse_results


class Page(html.parser.HTMLParser):
    """A page: the things that it loads, whether its elements close, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: list[str] = []
        self.names: set[str] = set()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key in ("src", "srcset", "data", "href", "xlink:href", "action"):
                (self.anchors if value.startswith("#") else self.loaded).append(value)
            if key == "id":
                self.names.add(value)
        if tag not in ("meta", "link", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def pair(own: list[float], other: list[float], **more: object) -> Results:
    """xLSTM and a transformer whose seeds end at these bits a byte."""
    models = [
        make_model("xlstm", "xLSTM[1:1]", "xlstm", "1m", own),
        make_model("transformer", "Transformer", "transformer", "1m", other),
    ]
    return make_results(models, **more)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """The folder of the report with everything."""
    folder = tmp_path_factory.mktemp("full")
    write_report(full_results(), folder)
    return folder


def test_interval_is_that_of_students_t():
    stats = pytest.importorskip("scipy.stats", reason="scipy, the oracle of the table, is not installed")
    assert pytest.approx([stats.t.ppf(0.975, n) for n in range(1, 11)], abs=6e-4) == list(T_975)
    first, second = {0: 1.50, 1: 1.61, 2: 1.55, 7: 9.0}, {2: 1.52, 1: 1.57, 0: 1.49}
    found = difference(first, second)
    values = [first[seed] - second[seed] for seed in (0, 1, 2)]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.low, found.high, found.count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), 3)


def test_statistics_of_one_and_of_no_value():
    assert spread([]) is None
    assert spread([2.0]).deviation is None
    assert difference({0: 1.0}, {1: 1.0}) is None
    alone = difference({0: 1.0, 1: 3.0}, {0: 1.5})
    assert alone.mean == -0.5 and alone.half_width is None and not alone.is_beyond_spread


def test_spread_is_shown_in_digits_that_mean_something():
    assert show_spread(spread([2.0, 2.5, 3.0]), 4) == "2.5000 ± 0.5000"
    assert show_spread(spread([1934580.1, 1935580.1, 1936580.1]), 1) == "1,935,580 ± 1,000"
    assert show_spread(spread([2627.74]), 1) == "2,628"


def test_pairing_tells_apart_what_the_spread_over_seeds_hides():
    own, other = [1.50, 1.60, 1.70], [1.511, 1.609, 1.711]
    assert verdict(pair(own, other), "1m").outcome == "xLSTM[1:1] beats Transformer"
    shuffled = [1.609, 1.711, 1.511]
    assert verdict(pair(own, shuffled), "1m").outcome == "no winner between xLSTM[1:1] and Transformer"


@pytest.mark.parametrize("behind", ["Transformer", "xLSTM[1:1]"])
def test_difference_below_its_whole_interval_is_no_result(behind):
    """Seeds that differ by mean - 0.01, mean and mean + 0.01 have an interval of 0.0248 to each side."""
    for mean, is_judged in ((0.024, False), (0.026, True)):
        ahead_of = ([1.50, 1.70, 1.60], [1.49 + mean, 1.70 + mean, 1.61 + mean])
        results = pair(*(ahead_of if behind == "Transformer" else ahead_of[::-1]))
        found, [table] = verdict(results, "1m"), final_table(results, "1m")
        assert (" beats " in found.outcome, found.outcome.startswith("no winner")) == (is_judged, not is_judged)
        assert found.outcome.endswith(behind) or not is_judged
        [(apart, judged)] = [(row[8].text, row[9].text) for row in table.rows if row[1].text == "Transformer"]
        against_reference = mean if behind == "Transformer" else -mean
        assert apart.startswith(f"{against_reference:+.4f}".replace("-", "−"))
        word = "worse" if behind == "Transformer" else "better"
        assert judged == (word if is_judged else "not told apart")


def test_seeds_are_compared_with_their_own():
    results = pair([1.5, 1.6, 9.9], [1.52, 1.621, 1.7])
    results.models[0].runs[2].status = "failed"
    found = select.gap(results.models[1], results.models[0], deciding_quantity(results))
    assert found.count == 2 and found.mean == pytest.approx(0.0205)
    assert select.over_seeds(results.models[0], deciding_quantity(results).of).count == 2


def test_verdict_when_xlstm_wins():
    found = verdict(pair([1.50, 1.51, 1.52], [1.60, 1.612, 1.621]), "1m")
    assert found.outcome == "xLSTM[1:1] beats Transformer"
    assert "1.5100 ± 0.0100" in found.sentence and "0.1010 apart (6.7%)" in found.sentence
    assert "beyond the spread over seeds" in found.sentence


def test_verdict_when_xlstm_loses():
    results = pair([1.60, 1.612, 1.621], [1.50, 1.51, 1.52])
    found = verdict(results, "1m")
    assert found.outcome == "xLSTM loses: Transformer beats xLSTM[1:1]"
    assert "beyond the spread over seeds" in found.sentence


def test_verdict_when_nobody_wins():
    for own, other in (([1.50, 1.53, 1.49], [1.52, 1.50, 1.51]), ([1.52, 1.50, 1.51], [1.50, 1.53, 1.49])):
        found = verdict(pair(own, other), "1m")
        assert found.outcome.startswith("no winner between") and "within the spread" in found.sentence
    same = verdict(pair([1.5, 1.6, 1.7], [1.5, 1.6, 1.7]), "1m")
    assert same.outcome.startswith("no winner between")


def test_verdict_with_too_few_runs():
    one = verdict(pair([1.5], [1.6]), "1m")
    assert one.outcome == "xLSTM[1:1] ahead of Transformer, on one seed" and "not known" in one.sentence
    lacking = pair([1.5, 1.5], [1.6, 1.6])
    for run in lacking.models[1].runs:
        run.status = "diverged"
    assert verdict(lacking, "1m").outcome == "nothing to compare"
    for run in lacking.models[0].runs:
        run.status = "unfinished"
    assert verdict(lacking, "1m").outcome == "no result"
    apart = pair([1.5, 1.5], [1.6, 1.6])
    apart.models[0].runs[0].status = apart.models[1].runs[1].status = "failed"
    assert verdict(apart, "1m").outcome == "no seed in common of xLSTM[1:1] and Transformer"
    uneven = pair([1.50, 1.51, 1.7], [1.6, 1.62, 1.61])
    uneven.models[0].runs[2].status = "failed"
    assert "0.1050 apart (7.0%) on the seeds that both have" in verdict(uneven, "1m").sentence


def test_verdict_names_the_place_and_how_the_rest_stands():
    models = [
        make_model("xlstm", "xLSTM[1:1]", "xlstm", "1m", [1.70, 1.71, 1.72]),
        make_model("mamba2", "Mamba-2", "mamba", "1m", [1.50, 1.511, 1.522]),
        make_model("transformer", "Transformer", "transformer", "1m", [1.60, 1.611, 1.62]),
        make_model("lstm", "LSTM", "lstm", "1m", [1.90, 1.91, 1.921]),
    ]
    found = verdict(make_results(models), "1m")
    assert found.outcome == "xLSTM loses: Mamba-2 beats xLSTM[1:1]"
    assert "xLSTM[1:1] is number 3 of 4" in found.sentence
    assert "xLSTM[1:1] is better than LSTM; worse than Transformer" in found.sentence


def test_best_xlstm_stands_against_the_best_other():
    models = full_results().models
    quantity = deciding_quantity(make_results(models))
    own, other = sides([model for model in models if model.size == "1m"], quantity)
    assert (own.label, other.label) == ("xLSTM[1:1]", "Gated DeltaNet")
    without = [model for model in models if model.size == "1m" and not model.label.startswith("xLSTM")]
    assert {model.label for model in sides(without, quantity)} == {"Gated DeltaNet", "Mamba-2"}


def test_a_run_that_diverged_or_is_not_a_number_does_not_count():
    model = make_model("xlstm", "xLSTM", "xlstm", "1m", [1.5, 1.6, 1.7])
    model.runs[1].status = "diverged"
    model.runs[2].tested.bits_per_byte = float("nan")
    assert values_by_seed(model, deciding_quantity(make_results([model])).of) == {0: 1.5}


def test_findings_follow_the_measurements():
    results = full_results()
    training = dict(further_findings(results))["Training speed"][0]
    assert training.startswith("1m: xLSTM[1:1] has 1.24 times the tokens/s of Mamba at 256 tokens of context")
    for row in results.training_speed:
        if row["name"] == "xlstm-1m":
            row["tokens_per_second"] /= 10
    training = dict(further_findings(results))["Training speed"][0]
    assert "0.12 times the tokens/s of Mamba" in training
    assert dict(further_findings(sparse_results())).keys() == {"Memory while writing"}


def test_checks_see_what_is_unfair():
    fair = pair([1.5, 1.51], [1.6, 1.61])
    assert all(holds for holds, _ in checks(fair))
    unfair = pair([1.5, 1.51], [1.6, 1.61])
    unfair.models[0].parameters = 1_030_000
    unfair.models[0].runs[0].tokens += 1
    unfair.models[0].runs[0].environment["git_commit"] = "another"
    unfair.models[1].learning_rate = unfair.models[1].tried[-1].learning_rate
    unfair.models[1].runs[1].status = "failed"
    unfair.models[0].runs[0].tested.how = "with a state carried"
    unfair.models[0].runs[0].tokens_per_second *= 1.3
    said = " ".join(sentence for holds, sentence in checks(unfair) if not holds)
    for expected in (
        "within 1.5% of their median",
        "between 8,192,000 and 8,192,001",
        "Not every seed finished",
        "read the test documents in different ways",
        "differ by more than 20% in speed (xLSTM[1:1] at 1m)",
        "another",
    ):
        assert expected in said
    assert not any("inside the grid" in sentence for _, sentence in checks(unfair))  # it is marked in the table
    unfair.models[0].tried = []
    unfair.models[0].learning_rate, unfair.models[1].runs = None, []
    said = " ".join(sentence for _, sentence in checks(unfair))
    for expected in ("not tuned here for xLSTM[1:1] at 1m", "not known yet of xLSTM[1:1] at 1m", "harm Transformer"):
        assert expected in said


def test_files_and_round_trip(full):
    pictures = sorted(path.name for path in (full / "pictures").iterdir())
    for name in (
        "1m-final",
        "8m-tokens",
        "1m-flops",
        "1m-time",
        "8m-learning-rates",
        "1m-position",
        "1m-extrapolation",
    ):
        assert f"{name}.png" in pictures
    for name in ("1m-speed", "1m-mfu", "8m-first-token-batch1", "8m-decoding-batch8", "1m-memory-batch1", "1m-state"):
        assert f"{name}.png" in pictures
    assert all((full / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert load_results(full / "results.json") == full_results()


def test_sizes_without_results_give_no_picture_over_size():
    results = full_results()
    assert scale_pictures(results)
    for model in results.models:
        if model.size == "8m":
            model.runs = []
    assert scale_pictures(results) == []


@pytest.mark.parametrize(
    ("name", "largest", "unit"),
    [
        ("time", 3 * 86400, "days"),
        ("time", 3 * 86400 - 1, "hours"),
        ("time", 3 * 3600 - 1, "minutes"),
        ("time", 179, "seconds"),
        ("time", 1, "seconds"),
    ],
)
def test_an_axis_of_time_has_three_of_its_unit(name, largest, unit):
    assert pictures._unit(name, largest)[1] == unit


def test_speeds_are_drawn_as_tokens_and_percent(monkeypatch):
    monkeypatch.setattr(pictures, "line_pictures", lambda results, size, name, points, frame: [points])
    results = full_results()
    for model in results.models:
        tokens, percent = (points(model) for points in pictures.training_speed_pictures(results, model.size))
        rows = select.fastest_training(results, model)
        assert tokens == {length: row["tokens_per_second"] for length, row in rows.items()}
        assert percent == {length: 100 * row["flops_share"] for length, row in rows.items() if row.get("flops_share")}
    assert any(points(model) for model in results.models for points in pictures.training_speed_pictures(results, "8m"))


def test_a_loss_that_is_not_finite_is_read_back(tmp_path):
    results = sparse_results()
    results.models[0].runs = [make_run("broken", 0, 2.0)]
    results.models[0].runs[0].tested.loss = math.inf
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results


def test_page_stands_alone_and_closes_its_elements(full):
    text = (full / "report.html").read_text()
    page = Page(text)
    assert page.loaded == [] and page.open == []
    assert {name.removeprefix("#") for name in page.anchors} <= page.names
    assert "<script" not in text and "@import" not in text and "http" not in re.sub(r">[^<]*<", "", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert text.count("<svg") == len(list((full / "pictures").iterdir()))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_and_markdown_say_what_there_is(full):
    page, markdown = "".join(Page((full / "report.html").read_text()).words), (full / "report.md").read_text()
    for text in (page, markdown):
        for label in ("xLSTM[1:1]", "Gated DeltaNet", "Plain RNN"):
            assert label in text
        for expected in (
            "Which architecture of one million parameters",
            "no winner between xLSTM[1:1] and Gated DeltaNet",
            "Plain RNN at 8m: left out by the configuration.",
            "The loss was not a number from step 900 on.",
            "at the edge of the grid",
            "Merity et al., arXiv 1708.02182, table 2",
            "one seed, not judged",
            "cb8a9dc0a0c7",
            "Three seeds are few",
            "embedding_dim: 128",
            "the data fingerprints of all runs are equal",
        ):
            assert expected in text, expected


def test_tables_of_markdown_are_well_formed(full):
    lines = (full / "report.md").read_text().splitlines()
    tables = 0
    for index, line in enumerate(lines):
        if re.fullmatch(r"\|( -{3}:? \|)+", line):
            width, tables = line.count("|"), tables + 1
            assert lines[index - 2] == "" and len(re.findall(r"(?<!\\)\|", lines[index - 1])) == width
            while lines[index + 1].startswith("|"):
                index += 1
                assert len(re.findall(r"(?<!\\)\|", lines[index])) == width
    assert tables > 15
    for path in re.findall(r"\]\((.*?)\)", "\n".join(line for line in lines if line.startswith("!"))):
        assert (full / path).is_file()


def test_absent_measurements_are_said(tmp_path):
    written = write_report(sparse_results(), tmp_path)
    assert all(path.is_file() for path in written)
    page = "".join(Page((tmp_path / "report.html").read_text()).words)
    for expected in (
        "No grid of learning rates was run.",
        "Contexts longer than that of training were not tested.",
        "The speed of training against context length was not measured.",
        "The speed of generation was not measured.",
        "Speeds: not measured, for no machine was free.",
        "No run has been tested; the validation documents stand in.",
    ):
        assert expected in page, expected


def test_nothing_finished_and_odd_names_make_a_report_all_the_same(tmp_path):
    model = make_model("xlstm", "<b>a|b</b> & c", "xlstm", "1m", [1.5])
    model.runs = [
        make_run("x-seed0", 0, 1.5, status="missing", problem="<script>alert(1)</script> | not started"),
        make_run("x-seed1", 1, 1.5, status="unfinished", problem="stopped"),
    ]
    model.tried, model.learning_rate = [], None
    write_report(make_results([model], title='A "title" <i>', missing=["<all> of it"]), tmp_path)
    text, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert Page(text).open == []
    for raw in ("<script>", "<b>a", "<i>", "<all>"):
        assert raw not in text and raw not in markdown
    assert "No run at a chosen learning rate has finished." in text
    assert "a\\|b" in markdown


def test_runs_of_the_grid_stand_in_for_final_ones(tmp_path):
    results = pair([1.5], [1.6])
    for model in results.models:
        model.runs, model.learning_rate = [], None
    results.missing = [f"thing {number}" for number in range(30)]
    write_report(results, tmp_path)
    page = "".join(Page((tmp_path / "report.html").read_text()).words)
    assert (tmp_path / "pictures" / "1m-tokens.png").is_file() and "not yet" in page
    assert "No run at a chosen learning rate has finished." in page and "and 20 more" in page and "thing 29" in page


def test_published_number_stands_beside_ours_of_the_same_model_and_size(tmp_path):
    published = [
        Published(model=model, size=size, tokens="15B", quantity="validation perplexity", value=13.43, source="a paper")
        for model, size in (("xLSTM[1:1]", "1m"), ("Transformer", "1b"))
    ]
    results = pair([1.5, 1.52], [1.6, 1.63], published=published)
    write_report(results, tmp_path)
    ours = [run.curve[-1].perplexity for run in results.models[0].runs]
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.endswith("| a paper |")]
    assert f"| 13.43 | {np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f} | 8.19M |" in rows[0]
    assert "| 13.43 | – | – |" in rows[1]


@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_labels_keep_their_distance_and_order(count):
    generator = np.random.default_rng(count)
    for _ in range(20):
        wanted = np.sort(generator.uniform(0, 1, count) ** 3)
        placed = np.array(spread_out(list(wanted), 0.05))
        gap = min(0.05, 1 / count)
        assert (np.diff(placed) >= gap - 1e-9).all()
        assert placed[0] >= gap / 2 - 1e-9 and placed[-1] <= 1 - gap / 2 + 1e-9
    free = [0.1, 0.3, 0.5]
    assert spread_out(free, 0.05) == pytest.approx(free)


def test_an_architecture_has_one_color_that_the_page_can_change():
    lines = [Line("b", "B", [(1.0, 2.0), (2.0, 1.0)])]
    picture = draw_lines("one", Frame(title="T", x_label="x", y_label="y"), lines, {"a": 0, "b": 3})
    assert "var(--model-3)" in picture.svg and "var(--model-0)" not in picture.svg and "#b8579a" not in picture.svg


@pytest.mark.parametrize(
    ("name", "runs", "tokens", "rates"),
    [
        ("paper-15b-350m", 4, 15e9, {"xlstm71-350m": 1e-3, "mamba-350m": 1.5e-3}),
        ("paper-ladder", 16, 300e9, {"llama-125m": 3e-3, "xlstm10-1.3b": 5e-4}),
    ],
)
def test_cluster_comparisons_are_those_of_the_paper(name, runs, tokens, rates):
    comparison = load_comparison(Path(__file__).parents[2] / "configs" / "compare" / f"{name}.yaml")
    assert len(comparison.models) == runs
    assert all(len(model.learning_rates) == 1 for model in comparison.models)
    found = {model.name: model.learning_rates[0] for model in comparison.models}
    assert rates.items() <= found.items()
    run = comparison.run_config(comparison.models[0], 1e-3, 0, Path("run"))
    seen = run.training.steps * run.data.global_batch_size * run.data.context_length
    assert tokens <= seen < 1.0001 * tokens
    known = {(label, model.size) for model in comparison.models for label in (model.label, model.architecture)}
    published = {(entry.model, entry.size) for entry in comparison.config.published}
    assert published - known == ({("RWKV-4", "350m")} if runs == 4 else set())
