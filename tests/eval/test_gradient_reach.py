"""Gradient reach: against torch.nn, the Jacobian of the cells' definitions, and finite differences."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from eval.bench.speed_models import Own
from eval.gradient_reach import __main__ as gradient_reach
from eval.gradient_reach.picture import draw_reach
from eval.gradient_reach.reach import input_gradients, make_bins, make_windows, summarize
from eval.gradient_reach.runs import load_study, train_runs
from eval.scoring.documents import Text
from xlstm_lm.data.tokenizer import ByteTokenizer
from xlstm_lm.models import LSTMConfig, MambaConfig, TransformerConfig, XLSTMConfig, build_model
from xlstm_lm.models.accounting import count_parameters

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "configs" / "compare" / "gradient-reach.yaml"
SIZES = {"vocab_size": 40, "embedding_dim": 32, "num_blocks": 2}
XLSTM = XLSTMConfig(**SIZES, num_heads=2, pattern=["mlstm", "slstm"])
CONFIGS = {
    "xlstm": XLSTM,
    "mlstm_paper": XLSTMConfig(**SIZES, num_heads=2, pattern="mlstm_paper"),
    "transformer": TransformerConfig(**SIZES, num_heads=2),
    "mamba1": MambaConfig(**SIZES, version=1, state_dim=8),
    "mamba2": MambaConfig(**SIZES, version=2, state_dim=8, head_dim=16),
    "gru": LSTMConfig(**SIZES, cell="gru"),
}


def lively(config, dtype=torch.float32):
    """A model with noise on its weights: fresh ones hardly look back. The same for every type."""
    torch.manual_seed(0)
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def random_windows(count=3, length=70):
    return torch.randint(SIZES["vocab_size"], (count, length + 1), generator=torch.Generator().manual_seed(2))


def measured(model, windows_BT):
    norms_BT, nats_B = input_gradients(Own(model), model.embedding, windows_BT)
    assert norms_BT.shape == (len(windows_BT), windows_BT.shape[1] - 1) and norms_BT.dtype == torch.float64
    return norms_BT, nats_B.double()


def losses_of(model, embedded_BTD, targets_BT):
    """Nats of every target given what the embedding is to give."""
    tokens_BT = torch.zeros(embedded_BTD.shape[:2], dtype=torch.int64)
    with model.embedding.register_forward_hook(lambda *_: embedded_BTD):
        logits_BTV = model.logits(model(tokens_BT))
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def test_the_fast_kernels_agree_with_the_jacobian_of_the_definition():
    """The whole Jacobian of one window in float64, every loss by every input; the last loss's row is wanted."""
    window_BT = random_windows(count=1, length=40)
    model = lively(replace(XLSTM, mlstm_backend="recurrence", slstm_backend="recurrence"), torch.float64)
    embedded_TD = model.embedding(window_BT[0, :-1]).detach()
    jacobian_TSD = torch.autograd.functional.jacobian(
        lambda embedded_TD: losses_of(model, embedded_TD[None], window_BT[:, 1:])[0], embedded_TD
    )
    assert not jacobian_TSD[torch.ones(40, 40, dtype=torch.bool).triu(1)].any()  # nothing looks ahead
    norms_BT, _ = measured(lively(XLSTM), window_BT)
    torch.testing.assert_close(norms_BT[0], jacobian_TSD[-1].norm(dim=-1).flip(0), rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_agrees_with_finite_differences(name):
    """Differences of the loss in float64, unit for unit: they know no autograd."""
    windows_BT, step, units = random_windows(count=2, length=33), 1e-5, SIZES["embedding_dim"]
    model = lively(CONFIGS[name], torch.float64)
    norms_BT, nats_B = measured(lively(CONFIGS[name]), windows_BT)
    for window_T, norms_T, nats in zip(windows_BT, norms_BT, nats_B, strict=True):
        targets_UT = window_T[1:].expand(units, -1)
        with torch.no_grad():
            embedded_UTD = model.embedding(window_T[:-1]).expand(units, -1, -1)
            right = losses_of(model, embedded_UTD[:1], targets_UT[:1])[0, -1]
            torch.testing.assert_close(nats, right, rtol=1e-4, atol=0)
            for distance in (0, 1, 2, 10, 32):
                change_UTD = torch.zeros_like(embedded_UTD)
                change_UTD[:, 32 - distance] = step * torch.eye(units)
                above, below = (losses_of(model, embedded_UTD + sign * change_UTD, targets_UT) for sign in (1, -1))
                slope_U = (above - below)[:, -1] / (2 * step)
                torch.testing.assert_close(norms_T[distance], slope_U.norm(), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_recurrent_classics_agree_with_torch(cell):
    model = lively(LSTMConfig(**SIZES, cell=cell, hidden_dim=24), torch.float64)
    reference = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell](32, 24, num_layers=2, batch_first=True).double()
    for index, layer in enumerate(model.blocks):
        values = {"weight_ih": layer.input_weight, "weight_hh": layer.recurrent_weight, "bias_ih": layer.bias}
        values["bias_hh"] = torch.zeros_like(layer.bias)
        for name, value in values.items():
            getattr(reference, f"{name}_l{index}").data.copy_(value)
    windows_BT = random_windows()
    embedded_BTD = model.embedding(windows_BT[:, :-1]).detach().requires_grad_()
    logits_BTV = reference(embedded_BTD)[0] @ model.head.weight.T
    nats_B = F.cross_entropy(logits_BTV[:, -1], windows_BT[:, -1], reduction="none")
    nats_B.sum().backward()
    norms_BT, found_B = measured(model, windows_BT)
    torch.testing.assert_close(norms_BT, embedded_BTD.grad.norm(dim=-1).flip(1))
    torch.testing.assert_close(found_B, nats_B.detach())


def test_a_window_does_not_depend_on_those_beside_it_and_the_weights_get_no_gradient():
    windows_BT = random_windows()
    model = lively(XLSTM)
    together, _ = measured(model, windows_BT)
    alone, _ = measured(model, windows_BT[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_blur_what_is_measured():
    config = LSTMConfig(**SIZES, dropout=0.5)
    first, second = (measured(lively(config), random_windows())[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_what_is_made_of_the_norms():
    decays = torch.tensor([0.5, 0.5, 0.5])
    norms_BT = torch.tensor([[3.0], [5.0], [9.0]]).double() * decays[:, None].double() ** torch.arange(12)
    summary = summarize(norms_BT)
    assert summary["norm_at_zero"] == 5
    assert summary["within"] == {"0.5": 0, "0.9": 3, "0.99": 6}  # 1 - 2^-(k + 1), over 1 - 2^-12
    by_first = {each.first: each for each in summary["bins"]}
    for distance in (1, 2, 5):
        assert by_first[distance].last == distance and by_first[distance].median == pytest.approx(0.5**distance)
    last = summary["bins"][-1]
    assert (last.first, last.last) == (11, 11)
    eight = by_first[8]
    assert eight.last == 9 and eight.median == pytest.approx((0.5**8 + 0.5**9) / 2)
    assert eight.low == pytest.approx(0.5**9) and eight.high == pytest.approx(0.5**8)
    assert [last + 1 for _, last in make_bins(300)[:-1]] == [first for first, _ in make_bins(300)[1:]]
    assert make_bins(300)[0] == (1, 1) and make_bins(300)[-1][1] == 299 and make_bins(2) == [(1, 1)]


def test_windows_lie_in_one_document_each_and_are_spread_over_all():
    texts = [Text("a", "a" * 23), Text("short", "b" * 9), Text("c", "c" * 45)]
    windows = make_windows(texts, ByteTokenizer(), 9, 3)
    assert windows.shape == (3, 10) and windows.dtype == torch.int64
    assert [bytes(window.tolist()).decode() for window in windows] == ["a" * 10, "c" * 10, "c" * 10]
    with pytest.raises(ValueError, match="6 windows of 10 tokens, but --windows is 7"):
        make_windows(texts, ByteTokenizer(), 9, 7)


def test_the_command_measures_before_and_after_training(tmp_path, own_folder, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is far back counts little, and what is near counts much.\n" * 60)
    out = tmp_path / "reach.json"
    fresh = ["small=xlstm:embedding_dim=32,num_blocks=1,num_heads=2,vocab_size=257", "rnn-cpu-0.7m"]
    sizes = ["--length", "64", "--windows", "4", "--batch-size", "3", "--device", "cpu", "--dtype", "float64"]
    gradient_reach.main(["--models", *fresh, "--runs", str(own_folder), "--data", str(text), *sizes, "--out", str(out)])
    written = json.loads(out.read_text())
    assert [(reach["name"], reach["stage"]) for reach in written["reaches"]] == [
        ("small", "at initialisation"),
        ("rnn-cpu-0.7m", "at initialisation"),
        ("export", "after training"),
    ]
    for reach in written["reaches"]:
        assert reach["windows"] == 4 and reach["length"] == 64 and 0 < reach["loss"] < 12
        assert all(0 <= each["low"] <= each["median"] <= each["high"] for each in reach["bins"])
        assert reach["bins"][0]["first"] == 1 and reach["bins"][-1]["last"] == 63
    assert "g(k) / g(0)" in written["definition"] and written["environment"]["torch"] == torch.__version__
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| model | parameters | loss, nats | k = 1 | k = 4 | k = 16 to 18 | k = 54 to 63 | 50% within |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "lstm:vocab_size=100,embedding_dim=8"], "vocab_size of 257 or more"),
        (["--models", "no-such-model"], "There is no model 'no-such-model'"),
        (["--runs", "no-such-run"], "no-such-run"),
        (["--models", "rnn-cpu-0.7m", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["--models", "rnn-cpu-0.7m", "--at-once", "2"], "--at-once is for training; give --config too"),
        (["--config", "no-such-study.yaml"], "no-such-study.yaml does not exist"),
        (["--config", "study.yaml", "--models", "rnn-cpu-0.7m"], "leave --models and --runs out"),
        (["--length", "1"], "at least 2"),
    ],
)
def test_mistakes_end_with_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gradient_reach.main([*arguments, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_the_committed_study_trains_models_of_one_size_with_one_recipe():
    config, runs = load_study(STUDY)
    assert list(config.models) == [run.model for run in runs] and len({run.folder for run in runs}) == len(runs)
    sizes = [count_parameters(run.config.model) for run in runs]
    assert max(sizes) / min(sizes) < 1.02
    assert {run.model: run.learning_rate for run in runs}["plain RNN"] == 5e-4
    same = [
        (each.data, each.schedule, each.training.steps, each.training.seed, replace(each.optimizer, learning_rate=1.0))
        for each in (run.config for run in runs)
    ]
    assert all(each == same[0] for each in same)


def write_study(folder: Path, **changes) -> Path:
    """A study of two small models on made-up text."""
    (folder / "text.txt").write_text("The gate opens, and the state forgets what came before it.\n" * 80)
    sizes = {"family": "lstm", "embedding_dim": 16, "num_blocks": 1, "vocab_size": 257}
    source = {"kind": "text", "paths": [str(folder / "text.txt")]}
    recipe = {
        "training": {"steps": 2, "validate_every": 0, "gate_statistics_every": 0},
        "schedule": {"warmup_steps": 1},
        "data": {"context_length": 32, "global_batch_size": 2, "sources": [source], "validation": [source]},
    }
    study = {"recipe": "recipe.yaml", "run_dir": str(folder / "runs"), "windows": 3}
    study["models"] = {"plain RNN": "rnn.yaml", "GRU": "gru.yaml"}
    files = {"recipe": recipe, "study": study | changes}
    files |= {cell: {"model": {**sizes, "cell": cell}} for cell in ("rnn", "gru")}
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, r"window = 3: there is no such field. Did you mean windows\?"),
        ({"models": {}}, "models is empty"),
        ({"models": ["rnn.yaml"]}, "models = .*must be a section"),
        ({"models": {"a b": "rnn.yaml", "A-B": "gru.yaml"}}, "share a folder"),
        ({"models": {"x": "none.yaml"}}, "none.yaml"),
        (
            {"models": {"x": "gru-cpu-2m"}},
            r"study.yaml: models: x = 'gru-cpu-2m' is no preset. Did you mean gru-cpu-1m\?",
        ),
        ({"windows": 0}, "windows = 0: must be a whole number from 1"),
        ({"learning_rates": {"LSTM": 1e-3}}, "learning_rates names LSTM; models has plain RNN, GRU"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_runs_that_are_not_trained_to_the_end_are_named(tmp_path, monkeypatch):
    study = write_study(tmp_path)
    runs = load_study(study)[1]
    monkeypatch.setattr("eval.study.engine.train", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"Not trained to the end: .*plain-rnn.*, .*gru"):
        train_runs(study, runs, at_once=1)
    monkeypatch.setattr("eval.gradient_reach.runs.examine", lambda run: SimpleNamespace(status="finished"))
    train_runs(study, runs, at_once=1)


@pytest.mark.slow  # two training processes
def test_a_study_trains_what_is_missing_and_takes_the_rest_again(tmp_path, capsys):
    study, out = write_study(tmp_path), tmp_path / "reach.json"
    arguments = ["--config", str(study), "--device", "cpu", "--out", str(out)]
    gradient_reach.main(arguments)
    first = json.loads(out.read_text())["reaches"]
    assert [(reach["name"], reach["stage"]) for reach in first] == [
        (name, stage)
        for stage in ("at initialisation", "after 128 tokens of training")
        for name in ("plain RNN", "GRU")
    ]
    assert {reach["length"] for reach in first} == {32} and {reach["windows"] for reach in first} == {3}
    shutil.rmtree(tmp_path / "runs" / "gru")
    capsys.readouterr()
    gradient_reach.main(arguments)
    printed = capsys.readouterr().out
    assert "gru begins" in printed and "plain-rnn begins" not in printed
    assert json.loads(out.read_text())["reaches"] == first  # training is deterministic on a CPU
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"context_length": 32', '"context_length": 16'))
    with pytest.raises(ValueError, match="another configuration"):
        train_runs(study, load_study(study)[1], at_once=1)


def test_curves_that_leave_the_panel_are_drawn_too(tmp_path, monkeypatch):
    def reach(name, base):
        bins = [{"first": k, "last": k, "low": base**k, "median": base**k, "high": base**k} for k in range(1, 40)]
        return {"name": name, "stage": "at initialisation", "bins": bins}

    curves = [reach(name, base) for name, base in (("a", 1.0), ("b", 0.99), ("c", 0.3), ("d", 0.2), ("e", 0.0))]
    figures, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_reach(curves, tmp_path / "reach.png")
    places = {text.get_text().strip(): text.xy for text in figures[0].axes[0].texts}
    for name, base in (("c", 0.3), ("d", 0.2)):  # named where they leave the panel
        k, value = places[name]
        assert 1e-10 < value < 1e-8 and math.log10(value) == pytest.approx(k * math.log10(base), abs=0.1)
    assert (tmp_path / "reach.png").read_bytes().startswith(b"\x89PNG")
