"""Long texts in pieces: the very ids of the whole, for every kind of tokenizer, in bounded memory."""

from __future__ import annotations

import json
import runpy
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.data.many_tokenizers import TOKENIZERS, save, texts
from xlstm_lm.data import (
    DataConfig,
    SourceConfig,
    TrainingStream,
    build_tokenizer,
    cuts,
    huggingface_tokenizer,
    match_boundaries,
    train_bpe,
    validation_batches,
)
from xlstm_lm.data.match_boundaries import Pattern, UnknownBoundariesError

NEVER_CUT = {"scripts", "fixed"}
ORDINARY = "The tokens don't end in 日本語, but on Monday (12:30) in 4567 of them; the end. " * 20


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Tokenizers by name, made when they are first wanted."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = build_tokenizer(save(TOKENIZERS[name](), tmp_path_factory.mktemp("tokenizer")))
        return made[name]

    return get


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(text=texts, size=st.integers(2, 30))
def test_pieces_give_the_ids_of_the_whole(name, text, size, built):
    tokenizer = built(name)
    whole = tokenizer._encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", size)
        assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_is_cut_unless_a_step_is_unknown(name, built, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", 20)
    pieces = list(built(name)._pieces(ORDINARY))
    if name in NEVER_CUT:
        assert len(pieces) == 1
    else:
        assert max(map(len, pieces)) < 150


@pytest.mark.parametrize(
    ("pattern", "position", "safe"),
    [
        (r"\p{L}+|\p{N}+", "a1", True),
        (r"\p{L}+|\p{N}+", "ab", False),
        (r"[a-z]+;|[a-z]", "ab", False),  # whether a match ends here depends on what comes much later
        (r"(?i:K)x|.", "Kx", False),  # the Kelvin sign
        (r"(?i:'s)|'|ſ", "'ſ", False),
        (r"a(?=b)|.", "ab", False),
        (r"a(?!\S)|[ab]| ", "a ", True),
        (r" $| |a", " a", False),
        (r"[^\s\p{L}]+|\s|\p{L}", "1,", False),
        (r"[^\s\p{L}]+|\s|\p{L}", "1a", True),
    ],
)
def test_patterns_know_what_they_may_join(pattern, position, safe):
    assert Pattern(pattern).may_join(*position) != safe


@pytest.mark.parametrize(
    "step",
    [
        *(pre_tokenizers.Digits(individual_digits=each) for each in (True, False)),
        *(pre_tokenizers.Punctuation(each) for each in ("isolated", "merged_with_previous", "merged_with_next")),
    ],
    ids=str,
)
def test_steps_that_look_at_single_characters_part_a_text_where_the_library_does(step):
    text = "ab12cd½e.fg"
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="?"))
    tokenizer.pre_tokenizer = step
    found = cuts.Cuts(json.loads(tokenizer.to_str()), str)
    begins = {begin for _, (begin, _) in step.pre_tokenize_str(text)} & set(range(2, len(text) - 1))
    assert {found.after(text, position) for position in range(2, len(text) - 1)} - {len(text)} == begins != set()


@pytest.mark.parametrize(
    "pattern", [r"\ba", r"^a", r"(?<=a)b", r"(a)\1", r"a*", r"[a-z&&[^b]]", r"[[:alpha:]]", r"\Xa", "("]
)
def test_patterns_that_look_back_or_are_not_understood_rule_cutting_out(pattern):
    with pytest.raises(UnknownBoundariesError):
        Pattern(pattern)


@pytest.mark.parametrize("change", ["no parser", "other constants", "other trees"])
def test_a_python_that_parses_patterns_differently_costs_the_cuts_only(change, tmp_path, monkeypatch, caplog):
    tokenizer = build_tokenizer(save(TOKENIZERS["gpt2"](), tmp_path / "tokenizer"))
    whole = tokenizer.encode(ORDINARY)
    with monkeypatch.context() as patch:  # nothing else may be imported meanwhile
        if change == "no parser":
            patch.setitem(sys.modules, "re._parser", None)
            patch.delattr("re._parser")
        elif change == "other constants":
            patch.delattr("re._constants.POSSESSIVE_REPEAT")
        changed = runpy.run_path(match_boundaries.__file__)
    if change == "other trees":
        monkeypatch.setattr(changed["Pattern"], "_parse", lambda self, source: ["tree"])
    changed["Pattern"].__init__.__globals__["UnknownBoundariesError"] = UnknownBoundariesError  # one class for both
    monkeypatch.setattr(cuts, "Pattern", changed["Pattern"])
    monkeypatch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", 20)
    assert list(tokenizer._pieces(ORDINARY)) == [ORDINARY] and tokenizer.encode(ORDINARY) == whole
    assert "as a whole: regular expressions of Python" in caplog.text
    (tmp_path / "a.txt").write_text(ORDINARY)
    train_bpe([str(tmp_path / "a.txt")], vocab_size=300, out=tmp_path / "out")


def streams(folder: Path, **changes):
    """A stream of two long documents, and the calls of the tokenizer by length."""
    for number, word in enumerate(("mice 12, ", "of men; ")):
        (folder / f"{number}.txt").write_text(word * 100)
    source = SourceConfig(kind="text", paths=[str(folder / "*.txt")])
    tokenizer = save(TOKENIZERS["gpt2"](), folder / "tokenizer")
    config = DataConfig(
        sources=[source],
        validation=[source],
        tokenizer=tokenizer,
        context_length=16,
        global_batch_size=1,
        num_workers=0,
        **changes,
    )
    return config, build_tokenizer(tokenizer)


def test_rows_and_states_do_not_depend_on_pieces(tmp_path, monkeypatch):
    config, tokenizer = streams(tmp_path)

    def batches(states, count):
        stream = TrainingStream(config, tokenizer, lanes=range(1), seed=0)
        stream.load_state_dict(states or stream.state_dict())
        return [(stream.next_batch().tokens_BT.tolist(), stream.state_dict()) for _ in range(count)]

    whole = batches(None, 250)  # both documents, and the first again
    assert whole[-1][1]["0"]["sources"][0]["epoch"] > 0
    monkeypatch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", 50)
    assert batches(None, 250) == whole
    for after in (0, 30, 120):
        assert batches(whole[after][1], 50) == whole[after + 1 : after + 51]


def test_no_more_of_a_document_is_encoded_than_rows_need(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", 50)
    config, tokenizer = streams(tmp_path, validation_tokens=64)
    encoded = []
    whole = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda piece: (encoded.append(piece), whole(piece))[1])
    TrainingStream(config, tokenizer, lanes=range(1), seed=0).next_batch()
    assert sum(map(len, encoded)) < 120
    encoded.clear()
    assert len(list(validation_batches(config, tokenizer, rows=1, rank=0, world_size=1))) == 4
    assert sum(map(len, encoded)) < 350


def test_what_is_encoded_at_once_is_announced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_tokenizer, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(huggingface_tokenizer, "LONG_PIECE", 1000)
    tokenizer = build_tokenizer(save(TOKENIZERS["fixed"](), tmp_path))
    list(islice(tokenizer.encode_pieces("abc " * 500), 1))
    assert "encodes a long document as a whole: its pre-tokenizer FixedLength is not understood" in caplog.text
    assert "gets 2,000 characters of one document at once" in caplog.text
