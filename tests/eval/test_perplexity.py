"""Perplexity: against one long forward pass, transformers' own loss, models worked out by hand, and windows by hand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from eval import perplexity
from eval.scoring.documents import DocumentsConfig, Text, open_documents
from eval.scoring.extrapolation import extrapolate
from eval.scoring.models import load_model, state_bytes
from eval.scoring.perplexity import PerplexityConfig, measure
from eval.scoring.sequences import score_sequences
from tests.eval.small_models import TEXT
from xlstm_lm import hub


def random_sequences(lengths, vocabulary=250) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length + 1) for length in lengths]


def long_forward(module, sequence) -> np.ndarray:
    """Nats of a sequence's targets by one pass over all of it."""
    tokens = torch.from_numpy(sequence)
    with torch.no_grad():
        output = module(tokens[None, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits[0], tokens[1:], reduction="none").numpy()


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 7), ("float64", 12)])
def test_a_carried_state_equals_one_long_forward(own_folder, dtype, digits):
    model = load_model(str(own_folder), dtype=dtype)
    [sequence] = random_sequences([333])
    [score] = score_sequences(model, [sequence], batch_size=1, piece_length=32)
    expected = long_forward(hub.load(own_folder).to(model.dtype), sequence)
    assert score.nats.sum(dtype=np.float64) == pytest.approx(expected.sum(dtype=np.float64), rel=10.0**-digits)
    np.testing.assert_allclose(score.nats, expected, atol=10.0 ** (1 - digits) * 5)


@pytest.mark.parametrize("kind", ["xlstm", "mamba2", "mamba", "llama"])
def test_stock_models_are_scored_as_transformers_scores_them(stock_folder, kind):
    """Carried in pieces where the model can, in one window where it cannot, batched and padded."""
    model = load_model(str(stock_folder(kind)))
    assert model.carries_state == (kind in ("xlstm", "mamba2"))  # transformers' Mamba-1 forgets its state in pieces
    stock = AutoModelForCausalLM.from_pretrained(stock_folder(kind))
    sequences = random_sequences([50, 7, 33, 1, 21])
    window = None if model.carries_state else 64
    scores = score_sequences(model, sequences, batch_size=3, window=window, piece_length=9)
    for sequence, score in zip(sequences, scores, strict=True):
        np.testing.assert_allclose(score.nats, long_forward(stock, sequence), atol=2e-5)
    tokens = torch.from_numpy(sequences[0])[None]
    loss = stock(input_ids=tokens, labels=tokens).loss.item()
    assert scores[0].nats.mean(dtype=np.float64) == pytest.approx(loss, rel=1e-6)


def test_an_export_computed_by_transformers_scores_as_computed_by_us(own_folder):
    ours, theirs = (load_model(str(own_folder), library=library) for library in ("auto", "transformers"))
    assert (theirs.carries_state, theirs.pads_left, theirs.begin) == (True, True, ours.begin)
    sequences = random_sequences([40, 7, 90])
    scores = [score_sequences(model, sequences, batch_size=2, piece_length=16) for model in (ours, theirs)]
    for first, second in zip(*scores, strict=True):
        np.testing.assert_allclose(first.nats, second.nats, atol=1e-5)


def test_the_state_of_a_recurrent_model_does_not_grow(own_folder, stock_folder):
    for folder, grows in ((own_folder, False), (stock_folder("mamba2"), False), (stock_folder("llama"), True)):
        model = load_model(str(folder))
        sizes = [
            state_bytes(model.score(*torch.zeros(2, 1, length, dtype=torch.long), None, True)[2]) for length in (4, 40)
        ]
        assert (sizes[1] > sizes[0]) == grows
        assert sizes[0] > 0
        assert model.carries_state != grows


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (2, 1), (64, 64)])
def test_windows_are_those_cut_by_hand(stock_folder, window, stride):
    model = load_model(str(stock_folder("llama")))
    stock = AutoModelForCausalLM.from_pretrained(stock_folder("llama"))
    [sequence] = random_sequences([50])
    [score] = score_sequences(model, [sequence], batch_size=4, window=window, stride=stride)
    expected, ends = [], [min(window, 50)]
    while ends[-1] < 50:
        ends.append(min(ends[-1] + (stride or window), 50))
    for end in ends:
        nats = long_forward(stock, sequence[max(0, end - window) : end + 1])
        expected.extend(nats[-(end - len(expected)) :])
    np.testing.assert_allclose(score.nats, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 12])
def test_the_batch_size_changes_no_score(own_folder, window):
    model = load_model(str(own_folder), dtype="float64")
    sequences = random_sequences([30, 3, 100, 1, 64, 12, 55, 8, 90])
    runs = [score_sequences(model, sequences, batch_size=size, window=window, piece_length=16) for size in (1, 4, 7)]
    for first, *others in zip(*runs, strict=True):
        for other in others:
            np.testing.assert_allclose(first.nats, other.nats, rtol=0, atol=1e-12)
            assert np.array_equal(first.greedy, other.greedy)


def texts(*contents: str) -> list[Text]:
    return [Text(str(index), content) for index, content in enumerate(contents)]


@pytest.fixture
def uniform(own_folder):
    """The export with a head of zeros: every token has probability 1/257."""
    model = load_model(str(own_folder))
    torch.nn.init.zeros_(model.module.head.weight)
    return model


def test_a_uniform_model_has_the_figures_worked_out_by_hand(uniform):
    documents = texts("two words\nand three more\n", "é")
    found = measure(uniform, iter(documents), PerplexityConfig())
    assert (found["documents"], found["tokens"], found["bytes"], found["words"]) == (2, 27, 27, 6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-7)
    assert found["loss"] == pytest.approx(math.log(257), rel=1e-7)
    assert found["perplexity"] == pytest.approx(257, rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(257 ** (27 / 6), rel=1e-5)
    counted = measure(uniform, iter(documents), PerplexityConfig(count_end=True, count_line_ends=True))
    assert (counted["tokens"], counted["bytes"], counted["words"]) == (29, 27, 8)
    assert counted["bits_per_byte"] == pytest.approx(math.log2(257) * 29 / 27, rel=1e-7)
    assert counted["word_perplexity"] == pytest.approx(257 ** (29 / 8), rel=1e-5)


def test_buckets_hold_every_target_once(own_folder):
    model = load_model(str(own_folder))
    documents = texts("a", "bc", "x" * 40, TEXT[:300], TEXT[:77])
    found = measure(model, iter(documents), PerplexityConfig(batch_size=2))
    for key in ("by_position", "by_document_length"):
        assert sum(row["tokens"] for row in found[key]) == found["tokens"] == 420
        assert sum(row["loss"] * row["tokens"] for row in found[key]) == pytest.approx(found["nats"], rel=1e-9)
    assert [(row["from"], row["tokens"]) for row in found["by_position"]][:4] == [(0, 5), (1, 4), (2, 6), (4, 12)]
    assert [(row["from"], row["documents"]) for row in found["by_document_length"]] == [
        (1, 1),
        (2, 1),
        (32, 1),
        (64, 1),
        (256, 1),
    ]
    alone = measure(model, iter(documents[:1]), PerplexityConfig())
    first = hub.load(own_folder)(torch.tensor([[256]]))[0, 0].log_softmax(-1)[ord("a")]
    assert alone["nats"] == pytest.approx(-first.item(), rel=1e-6)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_in_tokens(stock_folder):
    """Bytes of the tokens are bytes of the text, for a BPE as well."""
    found = measure(load_model(str(stock_folder("mamba2"))), iter(texts(TEXT[:400], "é ü")), PerplexityConfig())
    assert found["bytes"] == 405 == sum(row["bytes"] for row in found["by_position"])
    assert found["tokens"] < 300


def test_bytes_that_a_tokenizer_leaves_out_are_not_counted(own_folder, monkeypatch):
    model = load_model(str(own_folder))
    monkeypatch.setattr(model.tokenizer, "missing_bytes", lambda text: text.count("z"))
    found = measure(model, iter(texts("abz", "zz" + TEXT[:20].replace("z", "s"))), PerplexityConfig())
    assert found["bytes"] == 22
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / 22)


def test_extrapolation_scores_the_same_targets_at_every_length(own_folder):
    model = load_model(str(own_folder), trained_context=8)
    documents = texts(TEXT[:70], "too short", TEXT[100:150])
    curve = extrapolate(model, documents, [8, 16, 32], batch_size=1)
    module = hub.load(own_folder)
    for point, length in zip(curve, (8, 16, 32), strict=True):
        assert (point["context_length"], point["times_trained"], point["tokens"]) == (length, length / 8, 96)
        total = second_half = 0.0
        for text, kept in ((documents[0].text, 64), (documents[2].text, 32)):
            sequence = np.array([256, *text.encode()], dtype=np.int64)
            for first in range(0, kept, length):
                nats = long_forward(module, sequence[first : first + length + 1])
                total += nats.sum(dtype=np.float64)
                second_half += nats[length // 2 :].sum(dtype=np.float64)
        assert point["loss"] == pytest.approx(total / 96, rel=1e-6)
        assert point["second_half"]["loss"] == pytest.approx(second_half / 48, rel=1e-6)
    limited = extrapolate(model, documents, [8, 32], batch_size=1, max_tokens=40)
    assert [point["tokens"] for point in limited] == [32, 32]


def test_documents_of_files_lines_marks_and_recipes(tmp_path):
    (tmp_path / "a.txt").write_text("PEP: 1\none\nPEP: 2\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    (tmp_path / "r.yaml").write_text(
        f"data:\n  sources: [{{paths: [x]}}]\n  validation: [{{kind: jsonl, paths: [{tmp_path}/b.jsonl]}}]\n"
    )

    def read(*data, **options):
        return [
            text.text
            for text in open_documents(DocumentsConfig(data=[str(tmp_path / each) for each in data], **options))
        ]

    assert read("*.txt", "b.jsonl") == ["PEP: 1\none\nPEP: 2\ntwo\n", "three", "four"]
    assert read("a.txt", split_at="^PEP: ") == ["PEP: 1\none\n", "PEP: 2\ntwo\n"]
    assert read("r.yaml") == ["three", "four"]
    assert read("a.txt", "b.jsonl", max_documents=2) == ["PEP: 1\none\nPEP: 2\ntwo\n", "three"]


def test_the_command_prints_tables_and_writes_json_and_picture(own_folder, stock_folder, tmp_path, capsys):
    data, out = tmp_path / "text.txt", tmp_path / "new" / "result.json"
    data.write_text(TEXT[:600])
    common = ["--data", str(data), "--trained-context", "16", "--out", str(out)]
    perplexity.main(["--model", str(own_folder), str(stock_folder("llama")), *common])
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    ours, llama = written["models"]
    assert ours["how"] == "state carried through each document"
    assert llama["how"] == "windows of 16 tokens, stride 8"
    assert "1 documents, 600 tokens, 600 bytes" in printed
    assert f"{ours['bits_per_byte']:.4f} bits per byte" in printed
    assert written["definitions"]["word_perplexity"].startswith("exp(nats / words)")
    assert not out.with_suffix(".png").exists()
    perplexity.main(["--model", str(own_folder), str(stock_folder("mamba2")), *common, "--extrapolate", "4"])
    lengths = [point["context_length"] for point in json.loads(out.read_text())["models"][1]["extrapolation"]]
    assert lengths == [16, 32, 64]
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.txt"], "data file nowhere.txt is missing"),
        (["--data", "{empty}"], "is empty"),
        (["--data", "{blank}"], "has no token to predict"),
        (["--data", "{text}", "--context-length", "1"], "context length of 1 predicts nothing"),
        (["--data", "{text}", "--stride", "4"], "stride 4 is the step of windows"),
        (["--data", "{text}", "--context-length", "8", "--stride", "9"], "stride 9 must be from 1 to"),
        (["--data", "{text}", "--extrapolate", "3"], "--extrapolate 3 is no power of two"),
        (["--data", "{text}", "--extrapolate", "4"], "give --trained-context"),
        (["--data", "{text}", "--context-lengths", "4096"], "No document has 4096 tokens"),
        (["--data", "{text}", "--context-lengths", "3", "4"], "Context length 3 does not divide the longest, 4"),
        (["--data", "{text}", "--split-at", "("], "is no regular expression"),
        (["--data", "{text}", "--max-tokens", "4"], "--max-tokens limits"),
        (["--data", "{text}", "--out", "{folder}"], "is a folder; name a file"),
        (["--data", "{recipe}"], "names neither data.validation nor data.sources"),
        (["--data", "{text}", "--model", "{gpt2}", "--context-length", "65"], "has learned 64 positions"),
        (["--data", "{text}", "--model", "{bare}"], "holds a model but no tokenizer"),
        (["--data", "{text}", "--model", "{misfit}"], "but its model knows 280"),
        (["--data", "{text}", "--model", "{nothing}"], "holds no model"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(
    flags, message, own_folder, stock_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {name: tmp_path / name for name in ("empty", "text", "bare", "nothing")}
    places |= {
        "blank": tmp_path / "blank.jsonl",
        "recipe": tmp_path / "recipe.yaml",
        "folder": tmp_path,
        "gpt2": stock_folder("gpt2"),
        "misfit": stock_folder("misfit"),
    }
    places["empty"].touch()
    places["blank"].write_text('{"text": ""}\n')
    places["text"].write_text(TEXT[:200])
    places["recipe"].write_text("model: {}\n")
    places["nothing"].mkdir()
    shutil.copytree(stock_folder("llama"), places["bare"], ignore=shutil.ignore_patterns("*tokenizer*"))
    arguments = ["--model", str(own_folder), *(flag.format(**places) for flag in flags)]
    with pytest.raises(SystemExit) as stopped:
        perplexity.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_model_that_is_not_finite_ends_with_one_message(own_folder, tmp_path, capsys):
    folder = shutil.copytree(own_folder, tmp_path / "broken")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.final_norm.weight"][:] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(SystemExit) as ended:
        perplexity.main(["--model", str(folder), "--data", str(tmp_path / "text.txt")])
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # the stages come before
    assert line.startswith(f"eval.perplexity: The logits of {folder} are not finite: its weights are not finite")


def test_losses_that_are_not_finite_are_refused(own_folder):
    model = load_model(str(own_folder))
    with torch.no_grad():
        next(model.module.parameters())[:] = torch.nan  # where it is only the text that overflows
    with pytest.raises(ValueError, match="The losses of .* are not finite"):
        score_sequences(model, random_sequences([9]), batch_size=1)
