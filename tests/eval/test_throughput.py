"""The speed studies of whole models run, name what they measured, and generate what the model would."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from eval import throughput
from eval.bench.generation_speed import measure_generation, run_stock, write
from eval.bench.measure import Ceilings
from eval.bench.speed_models import describe_kernels, parse_model
from xlstm_lm.models import XLSTMConfig, build_model
from xlstm_lm.models.accounting import count_parameters, training_flops_per_token
from xlstm_lm.ops.operation import recorded_choices

# transformers' xLSTM takes widths of queries and values that are multiples of 64, and whole chunks in training.
SIZES = "embedding_dim=128,num_blocks=2,num_heads=2,vocab_size=96"
XLSTM, LLAMA = f"xlstm:{SIZES}", f"transformer:{SIZES}"
MAMBA = "mamba:embedding_dim=64,num_blocks=2,head_dim=16,state_dim=16,vocab_size=96"
LSTM = "lstm:embedding_dim=64,vocab_size=96"
FAST = ["--rounds", "3", "--seconds", "1", "--device", "cpu"]


def test_training_speed_of_every_family_and_its_stock_twin(tmp_path, capsys):
    models = [XLSTM, LLAMA, MAMBA, LSTM, f"transformers:{XLSTM}", f"transformers:{LLAMA}", f"transformers:{MAMBA}"]
    out = tmp_path / "speed.json"
    sizes = ["--lengths", "64", "128", "--tokens", "128", "--activation-checkpointing"]
    throughput.main(["--models", *models, *sizes, *FAST, "--out", str(out)])
    written = json.loads(out.read_text())
    rows = written["rows"]
    assert [(row["name"], row["length"], row["batch_size"]) for row in rows] == [
        (name, length, 128 // length) for length in (64, 128) for name in models
    ]
    assert not [row["problem"] for row in rows if row["problem"]]
    kernels = {row["name"]: row["kernels"] for row in rows}
    assert kernels[XLSTM] == "mlstm compiled" and kernels[LSTM] == "torch.lstm"
    assert kernels[LLAMA] == "attention sdpa" and kernels[MAMBA] == "convolution compiled, mlstm compiled, ssd mlstm"
    assert kernels[f"transformers:{XLSTM}"] == "transformers"
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(128 / row["milliseconds"] * 1e3)
        peak = written["ceilings"]["operations_per_second"]
        operations = training_flops_per_token(parse_model(row["name"]).config, row["length"])
        assert row["flops_share"] == pytest.approx(operations * row["tokens_per_second"] / peak)
    assert written["models"][XLSTM]["embedding_dim"] == 128 and written["environment"]["threads"] == 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| eager | mlstm compiled |" in capsys.readouterr().out


def test_twins_have_the_same_parameters_and_the_same_loss_function():
    sizes = "embedding_dim=64,num_blocks=2,vocab_size=96"
    mamba1 = f"mamba:version=1,{sizes},step_rank=7,state_dim=5,expand=3,conv_width=3"
    for text in (XLSTM, LLAMA, f"transformer:{sizes},num_heads=4,num_key_value_heads=2", MAMBA, mamba1):
        stock = parse_model(f"transformers:{text}").build("cpu", torch.float32)
        own = count_parameters(parse_model(text).config)
        assert sum(parameter.numel() for parameter in stock.parameters()) == own, text
        tokens_BT = torch.randint(0, 96, (2, 64))
        hidden_BTD = stock.hidden(tokens_BT)
        logits_BTV = stock.model(tokens_BT, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())
        torch.testing.assert_close(stock.loss(hidden_BTD, tokens_BT), expected)


def test_speed_of_generation(tmp_path, capsys):
    models = [XLSTM, LLAMA, f"transformers:{XLSTM}", f"transformers:{LLAMA}"]
    out = tmp_path / "generation.json"
    arguments = ["--generate", "--models", *models, "--lengths", "16", "40", "--batch-sizes", "1", "2"]
    throughput.main([*arguments, "--new-tokens", "3", *FAST, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 16 and not [row["problem"] for row in rows if row["problem"]]
    for row in rows:
        assert row["first_token_milliseconds"] > 0 and row["tokens_per_second"] > 0
    state = {(row["name"], row["length"], row["batch_size"]): row["state_bytes"] for row in rows}
    assert state[XLSTM, 16, 1] == state[XLSTM, 40, 1] == state[XLSTM, 40, 2] / 2
    assert state[LLAMA, 40, 1] > 2 * state[LLAMA, 16, 1]
    assert {row["kernels"] for row in rows if row["name"] == XLSTM} == {"mlstm compiled and step"}
    assert "| first token, ms" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_timed_is_the_greedy_continuation():
    torch.manual_seed(0)
    model = build_model(XLSTMConfig(vocab_size=50, embedding_dim=32, num_blocks=2)).eval()
    prompts_BT = torch.randint(0, 50, (2, 9))
    *_, state = write(model, prompts_BT, 5)
    tokens_BT = prompts_BT
    with torch.inference_mode():
        for _ in range(6):
            tokens_BT = torch.cat((tokens_BT, model.logits(model(tokens_BT)[:, -1:]).argmax(-1)), dim=1)
        _, expected = model(tokens_BT[:, :-1], return_state=True)
    for part, other in zip(state[-1], expected[-1], strict=True):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-5)


def test_transformers_are_timed_over_all_their_tokens():
    stock = parse_model(f"transformers:{LLAMA}").build("cpu", torch.float32, generating=True).eval()
    counts = []
    generate = stock.model.generate

    def counting(*arguments, **options):
        out = generate(*arguments, **options)
        counts.append(out.shape[1])
        return out

    stock.model.generate = counting
    first, after = run_stock(stock.model, torch.randint(0, 96, (2, 8)), 4, "cpu")
    assert counts == [9, 13] and first > 0 and after > 0


def test_a_compiled_model_is_measured_beside_the_eager_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # without a C++ compiler
    out = tmp_path / "speed.json"
    sizes = "transformer:embedding_dim=16,num_blocks=1,num_heads=2,vocab_size=32"
    arguments = ["--models", sizes, "--modes", "eager", "compiled", "--lengths", "32", "--tokens", "32"]
    throughput.main([*arguments, *FAST, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["eager", "compiled"] and not any(row["problem"] for row in rows)


def test_a_model_that_fails_keeps_its_row_and_the_others_are_measured():
    options = throughput._parse(["--models", f"transformers:{LSTM}", XLSTM, "--lengths", "32", "--tokens", "32", *FAST])
    models = [parse_model(text) for text in options.models]
    rows = throughput.measure_length(models, 32, options, throughput.Journal(), Ceilings(1e10, 1e10))
    generating = measure_generation(models, 8, 1, options, throughput.Journal())
    for failed, measured in (rows, generating):
        assert "fails: ValueError: transformers has no model like this lstm" in failed.problem
        assert measured.problem == "" and measured.tokens_per_second > 0
    assert rows[0].problem in throughput.as_markdown(rows)


def test_models_are_named_by_preset_recipe_or_family(tmp_path):
    assert parse_model("xlstm-400m").config.embedding_dim == 1024
    renamed = parse_model("ours=transformers:xlstm:embedding_dim=64,num_heads=2")
    assert (renamed.name, renamed.config.embedding_dim, renamed.is_stock) == ("ours", 64, True)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: {family: lstm, embedding_dim: 32, vocab_size: 10}\n")
    assert parse_model(str(recipe)).config.embedding_dim == 32
    config = parse_model("xlstm:pattern=slstm,embedding_dim=32,num_heads=2,logit_soft_cap=None").config
    assert config.block_kinds()[0] == "slstm" and config.logit_soft_cap is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xlstm-4000m", r"no model 'xlstm-4000m': give a preset \(.*xlstm-400m"),
        ("xlstm:width=3", "a field is unknown; xlstm has .*embedding_dim"),
        ("xlstm:num_heads", "'num_heads' in 'num_heads' is no field=value"),
        ("xlstm:num_heads=5", "num_heads 5 does not divide"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse_model(text)
    with pytest.raises(SystemExit) as ended:
        throughput.main(["--models", text, *FAST])
    assert ended.value.code == 2 and "eval.throughput: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "64", "--tokens", "32"], "--lengths 64 is longer than a batch of --tokens 32"),
        (["--models", "xlstm-cpu-1m", "xlstm-cpu-1m"], "two models are called xlstm-cpu-1m; tell them apart"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.main([*FAST, *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_kernels_that_run_are_recorded():
    model = parse_model("xlstm:pattern=['mlstm','slstm'],num_blocks=2,embedding_dim=32,num_heads=2,vocab_size=32")
    module = model.build("cpu", torch.float32)
    with recorded_choices() as taken:
        module.hidden(torch.zeros(1, 8, dtype=torch.long))
    assert taken == {"mlstm": ["compiled"], "slstm": ["compiled"], "convolution": ["compiled"]}
    assert describe_kernels(model, taken) == "convolution compiled, mlstm compiled, slstm compiled"
