"""Tokenizers: text comes back as it was, ids agree with transformers, bytes are counted, characters never torn."""

from __future__ import annotations

import pickle
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.data import TokenizerConfig, build_tokenizer, load_tokenizer, train_bpe
from xlstm_lm.data.tokenizer import CONFIG_FILE

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> Path:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return train_bpe([str(stdlib / "a*.py")], vocab_size=600, out=tmp_path_factory.mktemp("bpe") / "bpe")


@pytest.fixture(scope="module")
def tokenizers(bpe_folder):
    return {"bytes": build_tokenizer(TokenizerConfig()), "bpe": load_tokenizer(bpe_folder)}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_round_trip_and_bytes(kind, text, tokenizers):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.end_of_document not in ids and all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_end_of_a_document_in_text_is_text(kind, tokenizers):
    for tokenizer in (tokenizers[kind], pickle.loads(pickle.dumps(tokenizers[kind]))):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_document not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_torn_characters_are_shown_as_such(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    decoder = tokenizer.decoder()
    assert [decoder.push(token) for token in "é".encode()] == ["", "é"]
    assert decoder.push(0xE6) == "" and decoder.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_tokenizers_load_here_and_in_transformers(kind, tokenizers, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert type(again) is type(tokenizer) and again.fingerprint() == tokenizer.fingerprint()
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "def f(x):\n    return 'héllo 日本' * 2\r\n"
    assert stock.encode(text, add_special_tokens=False) == tokenizer.encode(text) == again.encode(text)
    assert stock.decode(tokenizer.encode(text)) == text
    assert stock.eos_token_id == tokenizer.end_of_document and len(stock) == tokenizer.vocab_size


def test_trained_bpe(bpe_folder, tokenizers):
    tokenizer = tokenizers["bpe"]
    assert tokenizer.vocab_size == 600
    assert tokenizer.bytes_per_token[tokenizer.end_of_document] == 0
    assert tokenizer.bytes_per_token.dtype == torch.int64 and tokenizer.bytes_per_token.shape == (600,)
    assert len(tokenizer.encode("import argparse\n")) < 8
    named = build_tokenizer(TokenizerConfig(kind="huggingface", name=str(bpe_folder)))
    assert named.fingerprint() == tokenizer.fingerprint() != tokenizers["bytes"].fingerprint()


def test_a_tokenizer_that_is_not_byte_level(tmp_path):
    """Word pieces, as BERT has them: text is normalised, but ids, bytes and the end of a document work."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "hello": 3, "##ing": 4, "world": 5}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[SEP]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"no end-of-sequence token: set tokenizer.end_of_document .*'\[SEP\]'"):
        load_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match=r"end_of_document '\[END\]' is not a token of .*'\[PAD\]', '\[UNK\]', '\[SEP\]'"
    ):
        build_tokenizer(TokenizerConfig(kind="huggingface", name=str(tmp_path), end_of_document="[END]"))
    tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", name=str(tmp_path), end_of_document="[SEP]"))
    assert tokenizer.end_of_document == 2
    ids = tokenizer.encode("helloing world")
    assert ids == [3, 4, 5]
    assert tokenizer.bytes_per_token.tolist() == [5, 5, 0, 5, 3, 5]
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids) == "helloing world"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "words"}, "tokenizer kind 'words' is not known: bytes or huggingface"),
        ({"kind": "huggingface"}, "needs a name"),
        ({"kind": "bytes", "name": "gpt2"}, "set kind: huggingface"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)


def test_what_cannot_be_loaded_or_trained_is_said(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"data file .*none\.txt is missing"):
        train_bpe([str(tmp_path / "none.txt")], vocab_size=300, out=tmp_path / "out")
    with pytest.raises(ValueError, match="vocab_size 100 is too small"):
        train_bpe([], vocab_size=100, out=tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[1]", '{"kind": "bytes", "colour": "red"}'])
def test_a_damaged_description_is_named(content, tmp_path):
    build_tokenizer(TokenizerConfig()).save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        load_tokenizer(tmp_path)
