"""Tokenizers: text comes back as it was, ids agree with transformers, bytes are counted, characters never torn."""

from __future__ import annotations

import itertools
import json
import pickle
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.data.many_tokenizers import TOKENIZERS, byte_level, save
from xlstm_lm.data import (
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingStream,
    build_tokenizer,
    load_tokenizer,
    train_bpe,
    validation_batches,
)
from xlstm_lm.data.tokenizer_files import CONFIG_FILE

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
    assert tokenizer.bytes_per_token.tolist() == [5, 0, 0, 5, 3, 5]
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids) == "helloing world"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "words"}, "kind is 'words'; it must be one of bytes, huggingface"),
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
    for name in ("tokenizer.json", "tokenizer_config.json", "xlstm_lm_tokenizer.json"):
        folder = tmp_path / name
        build_tokenizer(TokenizerConfig()).save(folder)
        (folder / name).write_text((folder / name).read_text()[:-20])
        with pytest.raises(ValueError, match="damaged"):
            if name == "xlstm_lm_tokenizer.json":
                load_tokenizer(folder)
            build_tokenizer(TokenizerConfig(kind="huggingface", name=str(folder)))
    for part, other in (("BPE", "BPE2"), ("ByteLevel", "WordLevel2")):
        config = save(byte_level(), tmp_path / part)
        written = (tmp_path / part / "tokenizer.json").read_text()
        (tmp_path / part / "tokenizer.json").write_text(written.replace(f'"type": "{part}"', f'"type": "{other}"'))
        with pytest.raises(ValueError, match="a newer version of the tokenizers library than .* pip install -U"):
            build_tokenizer(config)


def test_a_text_that_cannot_be_encoded_is_named(tmp_path):
    words = Tokenizer(models.WordLevel({"<|e|>": 0, "hello": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = save(words, tmp_path / "words")
    (tmp_path / "data.txt").write_text("hello there")
    source = SourceConfig(kind="text", paths=[str(tmp_path / "data.txt")])
    settings = {"context_length": 8, "global_batch_size": 1, "num_workers": 0, "tokenizer": config}
    stream = TrainingStream(DataConfig(sources=[source], **settings), build_tokenizer(config), lanes=range(1), seed=0)
    with pytest.raises(ValueError, match=r"data\.txt: tokenizer .* cannot encode a text .*unknown token.* skip"):
        stream.next_batch()


def test_a_text_that_cannot_be_encoded_is_skipped_where_asked(tmp_path, caplog):
    words = Tokenizer(models.WordLevel({"<|e|>": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = build_tokenizer(config := save(words, tmp_path / "words"))
    (tmp_path / "data.txt").write_text("a b\na c\nb\n\nd\na\n")
    source = SourceConfig(kind="text_lines", paths=[str(tmp_path / "data.txt")], on_bad_document="skip")
    settings = {"context_length": 4, "num_workers": 0, "tokenizer": config, "shuffle": False}
    data = DataConfig(sources=[source], validation=[source], global_batch_size=1, **settings)
    stream = TrainingStream(data, tokenizer, lanes=range(1), seed=0)
    assert stream.next_batch().tokens_BT.tolist() == [[0, 1, 2, 0]]
    states = stream.state_dict()
    second = stream.next_batch()
    assert second.tokens_BT.tolist() == [[2, 0, 1, 0]]
    stream.next_batch()  # begins with the second epoch
    assert stream.skipped_documents == 2
    assert caplog.text.count("are skipped; the first: document") == 1 and "data.txt:2: tokenizer" in caplog.text
    again = TrainingStream(data, tokenizer, lanes=range(1), seed=0)
    again.load_state_dict(states)
    assert again.next_batch().tokens_BT.tolist() == second.tokens_BT.tolist()
    (held_out,) = validation_batches(data, tokenizer, rows=2, rank=0, world_size=1)
    assert held_out.tokens_BT.tolist() == [[0, 1, 2, 0], [2, 0, 1, 0]]
    (tmp_path / "data.txt").write_text("c\nd\n")
    with pytest.raises(ValueError, match=r"no document for lane 0.*2 bad ones skipped"):
        TrainingStream(data, tokenizer, lanes=range(1), seed=0).next_batch()


def words_with_end() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<|e|>": 1, "</doc>": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def merged_end() -> Tokenizer:
    """A BPE whose merges write the end of a document, as where text with it was trained on."""
    parts = ["</", "</d", "</do", "</doc", "</doc>"]
    merges = [("<", "/"), *((left, right[-1]) for left, right in itertools.pairwise(parts))]
    words = ["<|e|>", "</doc>!", *"</doc>!ab ", *parts]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [*merges, ("</doc>", "!")]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


END_TOKENS = {
    "plain": {},
    "special": {"special": True},
    "normalized": {"normalized": True},
    "single word": {"single_word": True},
    "stripped": {"lstrip": True, "rstrip": True},
}


@pytest.mark.parametrize("added", [None, *END_TOKENS])
@pytest.mark.parametrize("kind", ["gpt2", "lowercase", "words", "merged", "t5"])
def test_no_text_holds_the_end_of_a_document(kind, added, tmp_path):
    if added is None and kind in ("gpt2", "lowercase"):
        pytest.skip("not a token")
    backend = {"words": words_with_end, "merged": merged_end}.get(kind) or TOKENIZERS[kind]
    backend = backend()
    end = "<|e|>" if kind == "t5" else "</doc>"
    if added:
        add = backend.add_special_tokens if added == "special" else backend.add_tokens
        add([AddedToken(end, **END_TOKENS[added])])
    ids = backend.token_to_id(end)
    save(backend, tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", name=str(tmp_path), end_of_document=end))
    assert tokenizer.end_of_document == ids
    plain = tokenizer.encode("a b")
    for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        for text in (end, f"a{end}b", f"a {end} b", f"{end}!", end.upper(), f"{end}{end}", f" {end}\n"):
            assert ids not in each.encode(text), text
        assert each.encode("a b") == plain
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.end_of_document == ids and again.fingerprint() == tokenizer.fingerprint()
    assert ids not in again.encode(f"a {end} b") and again.encode("a b") == plain


def test_an_unknown_token_cannot_end_documents(tmp_path):
    config = save(words_with_end(), tmp_path, eos_token="[UNK]")
    with pytest.raises(ValueError, match=r"'\[UNK\]' of tokenizer .* is its unknown token as well"):
        build_tokenizer(config)
    parts = json.loads(byte_level().to_str())
    parts["model"]["unk_token"] = "<|e|>"  # never used where every byte has a token
    assert build_tokenizer(save(Tokenizer.from_str(json.dumps(parts)), tmp_path)).encode("é")


def test_settings_outlive_saving(tmp_path):
    from transformers import AutoTokenizer

    from xlstm_lm.hub.tokenizer_files import save_tokenizer_files

    backend = byte_level(added=["<tool>"])
    backend.add_special_tokens(["<s>", "<pad>", "<unk>", "<user>", "<image>"])
    own = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": ["<user>"]}
    templates = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tools", "template": "é"}]
    for number, template in enumerate([templates, templates[0]["template"], None]):
        settings = {**own, "model_max_length": 512, "image_token": "<image>"}
        settings |= {"chat_template": template} if template else {}
        folder = tmp_path / str(number)
        config = save(backend, folder, **settings)
        if number == 1:  # as newer versions of transformers write it
            (folder / "chat_template.jinja").write_text("{{ bos_token }}")
        before = AutoTokenizer.from_pretrained(folder)
        build_tokenizer(config).save(folder / "saved")
        load_tokenizer(folder / "saved").save(folder / "again")
        save_tokenizer_files(load_tokenizer(folder / "again"), folder / "exported")
        for name in ("again", "exported"):
            kept = AutoTokenizer.from_pretrained(folder / name)
            assert kept.chat_template == before.chat_template
            assert kept.special_tokens_map == before.special_tokens_map
            assert set(kept.all_special_tokens) == set(before.all_special_tokens)
            assert kept.model_max_length == 512 and len(kept) == len(before)
            assert kept.padding_side == ("left" if name == "exported" else before.padding_side)


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_characters_left_out_are_announced_and_not_counted(kind, tmp_path, caplog):
    words = ["<|e|>", "a", "b", "Ġ", "Ã"]  # a byte of é
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    tokenizer = build_tokenizer(save(backend, tmp_path))
    assert tokenizer.encode("a b") and tokenizer.missing_bytes("a b") == 0 and not caplog.records
    assert tokenizer.missing_bytes("aé b日") == (4 if kind == "bytes" else 5)
    tokenizer.encode("aé b日")
    tokenizer.encode("日")
    assert [record.message.count("neither a token nor an unknown token") for record in caplog.records] == [1]


@pytest.mark.parametrize("name", ["words", "bert", "t5", "unknown bytes", "llama2", "gpt2"])
def test_an_unknown_token_stands_for_no_bytes(name, tmp_path):
    if name == "unknown bytes":
        words = {"<|e|>": 0, "[UNK]": 1, "a": 2, "Ġ": 3}
        backend = Tokenizer(models.BPE(words, [], unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = TOKENIZERS[name]()
    tokenizer = build_tokenizer(save(backend, tmp_path))
    text = "a é a"
    counted = int(tokenizer.bytes_per_token[tokenizer.encode(text)].sum())
    if name in ("llama2", "gpt2"):  # every character has a token or bytes
        assert tokenizer.missing_bytes(text) == 0 and counted >= len(text.encode())
    else:
        unknown = {"[UNK]", "<unk>"} & {tokenizer._backend.id_to_token(token) for token in tokenizer.encode(text)}
        assert unknown and tokenizer.missing_bytes(text) == 2
        assert counted == {"t5": 5, "unknown bytes": 4}.get(name, 2)
    assert tokenizer.missing_bytes("a a") == 0


def test_a_vocabulary_that_is_not_reached_is_announced(tmp_path, caplog):
    (tmp_path / "text.txt").write_text("abab")
    train_bpe([str(tmp_path / "text.txt")], vocab_size=400, out=tmp_path / "out")
    assert "the tokenizer has 259 ids instead of 400" in caplog.text


def test_training_in_pieces_changes_no_merge(tmp_path, monkeypatch):
    from xlstm_lm.data import bpe

    (tmp_path / "text.txt").write_text("the tokens don't end 12 34\n\n  the token é " * 30 + "x" * 300)
    train_bpe([str(tmp_path / "text.txt")], vocab_size=320, out=tmp_path / "whole")
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 20)
    train_bpe([str(tmp_path / "text.txt")], vocab_size=320, out=tmp_path / "pieces")
    assert (tmp_path / "whole/tokenizer.json").read_text() == (tmp_path / "pieces/tokenizer.json").read_text()


@pytest.mark.parametrize("content", ["", "[1]", '{"kind": "bytes", "colour": "red"}'])
def test_a_damaged_description_is_named(content, tmp_path):
    build_tokenizer(TokenizerConfig()).save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        load_tokenizer(tmp_path)
