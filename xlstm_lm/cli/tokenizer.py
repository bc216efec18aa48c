"""`xlstm-lm tokenizer train`: train a tokenizer."""

from __future__ import annotations

import argparse
import shlex

from xlstm_lm.base import console
from xlstm_lm.base.fields import VocabSize, argument


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the files, the size of the vocabulary, and the folder."""
    parser.add_argument("action", choices=["train"])
    parser.add_argument("--files", nargs="+", required=True, metavar="FILE", help="Text files or glob patterns.")
    parser.add_argument(
        "--vocab-size",
        type=argument(VocabSize),
        required=True,
        metavar="N",
        help="Vocabulary, end of document included.",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="A new folder, as transformers reads it.")


def run(options: argparse.Namespace) -> None:
    """Train the tokenizer, and print the flags that use it."""
    from xlstm_lm.data import train_bpe

    console.stage("training the tokenizer")
    out = train_bpe(options.files, vocab_size=options.vocab_size, out=options.out)
    console.end_stage()
    print(f"Wrote {out}. Use it:  --data.tokenizer.kind huggingface --data.tokenizer.name {shlex.quote(str(out))}")
