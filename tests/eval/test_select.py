"""The questions that a report asks of a comparison's results, against values worked out by hand."""

from __future__ import annotations

import pytest

from eval.compare.report import select
from eval.compare.report.answer import verdict
from tests.eval.invented_results import full_results, make_model, make_results


def model_with(bits: list[float], **more):
    return make_model("xlstm", "xLSTM", "xlstm", "1m", bits, **more)


def test_a_rank_from_other_seeds_is_no_win_on_shared_ones():
    """The fourth seed puts xLSTM first by the mean, but on the three shared seeds it is worse by 0.1."""
    models = [
        model_with([1.50, 1.51, 1.521, 1.0]),
        make_model("transformer", "Transformer", "transformer", "1m", [1.40, 1.411, 1.42]),
    ]
    assert [model.label for model, _ in select.ranked(models, select.TEST_BITS)] == ["xLSTM", "Transformer"]
    assert verdict(make_results(models), "1m").outcome.startswith("no winner")


def test_a_verdict_names_a_loss_of_xlstm_alone_and_shared_seeds_where_some_are_not():
    others = [
        make_model("mamba2", "Mamba-2", "mamba", "1m", [1.40, 1.411, 1.42]),
        make_model("transformer", "Transformer", "transformer", "1m", [1.50, 1.51, 1.521]),
    ]
    found = verdict(make_results(others), "1m")
    assert found.outcome == "Mamba-2 beats Transformer" and "seeds that both have" not in found.sentence
    two_of_ours = [model_with([1.40, 1.411, 1.42]), make_model("mlstm", "mLSTM", "xlstm", "1m", [1.50, 1.51, 1.521])]
    assert verdict(make_results(two_of_ours), "1m").outcome == "xLSTM beats mLSTM"


def test_parameters_are_compared_with_their_median():
    models = [model_with([1.5], parameters=count) for count in (100, 100, 130)]
    assert select.parameters_apart(models) == pytest.approx(0.3)


def test_speed_of_training_is_a_median_and_its_range_a_share():
    model = model_with([1.5, 1.5, 1.5, 1.5])
    for run, speed in zip(model.runs, (100.0, 110.0, 190.0, 5000.0), strict=True):
        run.tokens_per_second = speed
    model.runs[3].status = "failed"
    assert select.median_speed(model) == 110.0
    assert select.speeds_apart(model) == pytest.approx(0.9)
    model.runs = []
    assert select.median_speed(model) is None and select.speeds_apart(model) == 0.0


def test_curves_are_means_over_finished_runs_where_all_have_a_point():
    model = model_with([1.5, 1.7, 9.0])
    model.runs[2].status = "failed"
    curve = select.mean_extrapolation(model)
    assert curve[256] == pytest.approx(1.6 + 0.03) and list(curve) == [128, 256, 512, 1024, 2048, 4096]
    del model.runs[1].tested.extrapolation[-1]
    assert list(select.mean_extrapolation(model)) == [128, 256, 512, 1024, 2048]
    assert select.mean_by_position(model)[16] == pytest.approx(1.6 + 1.2 - 0.02)


def test_losses_without_bytes_are_nats():
    model = model_with([1.5, 1.7])
    for run in model.runs:
        for each in [run.tested, *run.tested.extrapolation, *run.tested.by_position]:
            each.bits_per_byte = None
    nats = [run.tested.extrapolation[1].loss for run in model.runs]
    assert select.mean_extrapolation(model)[256] == pytest.approx(sum(nats) / 2)
    assert select.unit_of_tests(make_results([model])) == "nats per token"
    assert select.deciding_quantity(make_results([model])) is select.TEST_LOSS


def test_the_deciding_quantity_is_the_best_that_a_finished_run_has():
    model = model_with([1.5], tested=False)
    assert select.deciding_quantity(make_results([model])) is select.VALIDATION_BITS
    for point in model.runs[0].curve:
        point.bits_per_byte = None
    assert select.deciding_quantity(make_results([model])) is select.VALIDATION_LOSS


def test_shown_runs_are_finished_then_unfinished_then_the_best_tried():
    model = model_with([1.5, 1.6])
    assert select.shown_runs(model) == (model.runs, True)
    model.runs[1].status = "unfinished"
    assert select.shown_runs(model) == (model.runs[:1], True)
    model.runs[0].status = "failed"
    assert select.shown_runs(model) == (model.runs[1:], False)
    model.runs = []
    assert select.shown_runs(model) == ([model.tried[1]], False)


def test_both_ends_of_a_grid_are_edges():
    model = model_with([1.5])
    edges = []
    for rate in (1e-3, 3e-3, 1e-2):
        model.learning_rate = rate
        edges.append(select.is_at_edge(model))
    assert edges == [True, False, True]
    model.tried = model.tried[2:]
    assert not select.is_at_edge(model)


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("validation perplexity", lambda run: run.curve[-1].perplexity),
        ("word perplexity, test", lambda run: run.tested.word_perplexity),
        ("test perplexity", lambda run: run.tested.perplexity),
        ("bits per byte, validation", lambda run: run.curve[-1].bits_per_byte),
        ("bits per byte, test", lambda run: run.tested.bits_per_byte),
        ("word perplexity, validation", None),
    ],
)
def test_a_published_number_stands_beside_the_same_quantity(quantity, value):
    results = full_results()
    [model] = [each for each in results.models if each.label == "LSTM" and each.size == "8m"]
    model.runs[0].tokens = 99_000_000
    entry = results.published[0]
    entry.model, entry.size, entry.quantity = "lstm", "8m", quantity
    found, tokens = select.beside_published(results, entry)
    if value is None:
        assert found is None
    else:
        assert found.count == 2 and found.mean == pytest.approx(sum(map(value, model.runs[:2])) / 2)
    assert tokens == 99_000_000
    entry.size = "1b"
    assert select.beside_published(results, entry) is None
