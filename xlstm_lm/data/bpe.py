"""Training a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.outputs import check_new_folder, whole_or_not_at_all
from xlstm_lm.base.paths import user_path
from xlstm_lm.data.cuts import Cuts
from xlstm_lm.data.documents import documents
from xlstm_lm.data.match_boundaries import UnknownBoundariesError
from xlstm_lm.data.sources import FileSource, SourceConfig
from xlstm_lm.data.tokenizer_files import END_OF_DOCUMENT, TokenizerConfig, save_tokenizer

PIECE_CHARACTERS = 1 << 20


def train_bpe(files: Sequence[str], *, vocab_size: int, out: str | Path) -> Path:
    """Train a byte-level BPE and write it in Hugging Face's layout.

    Args:
        files: text files or glob patterns, compressed or not; each file is read whole.
        vocab_size: number of ids to reach, the 256 bytes and the end-of-document token included. A small text may give
            fewer, which is announced.
        out: a new folder; `load_tokenizer` and `transformers.AutoTokenizer.from_pretrained` read it.

    Returns:
        the folder.

    Raises:
        ValueError: `out` is not free for a new folder, a vocabulary too small for the bytes, or a file that is missing,
            empty or not UTF-8.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the end of a document need 257")
    folder = user_path(out)
    check_new_folder(folder)
    source = FileSource(SourceConfig(kind="text", paths=list(files)))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    try:
        cuts = Cuts(json.loads(backend.to_str()), str)
    except UnknownBoundariesError:
        cuts = None
    size = sum(source.shard_sizes)
    announce_once(f"training a tokenizer on {size / 1e6:,.1f} MB of files ({source.num_shards}) ...")
    backend.train_from_iterator(_texts(source, cuts), trainer, length=size // PIECE_CHARACTERS + source.num_shards)
    if (reached := backend.get_vocab_size()) < vocab_size:
        announce_once(
            f"the tokenizer has {reached} ids instead of {vocab_size}: no further pair of tokens is left to merge in "
            "its text; give more text for a larger vocabulary"
        )
    config = TokenizerConfig(kind="huggingface", name=str(folder), end_of_document=END_OF_DOCUMENT)
    with whole_or_not_at_all(folder) as partial:
        save_tokenizer(backend, config, END_OF_DOCUMENT, partial)
    return folder


def _texts(source: FileSource, cuts: Cuts | None) -> Iterator[str]:
    """The files, in pieces with the same words where `cuts` are known: the library needs less memory for them."""
    for record in documents(source):
        begin = 0
        while begin < len(record.text):
            end = cuts.after(record.text, begin + PIECE_CHARACTERS) if cuts else len(record.text)
            yield record.text[begin:end]
            begin = end
