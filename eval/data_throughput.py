"""Tokens a second that one core reads, tokenizes, shuffles and packs: `python -m eval.data_throughput`."""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizers library starts its threads

from xlstm_lm.base.fields import Count, VocabSize, argument
from xlstm_lm.base.program import program
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.data import DataConfig, SourceConfig, Tokenizer, TrainingStream, load_tokenizer, train_bpe
from xlstm_lm.data.tokenize_sources import DATA_RECIPE, tokenize
from xlstm_lm.data.tokenizer import TokenizerConfig, build_tokenizer

GPUS = 8


def config_of(tokenizer: TokenizerConfig, context_length: int = 1024, lanes: int = 16) -> DataConfig:
    """The standard library's source in rows."""
    sources = [SourceConfig(kind="python_stdlib", on_bad_document="skip")]
    return DataConfig(
        context_length=context_length, global_batch_size=lanes, sources=sources, tokenizer=tokenizer, num_workers=0
    )


def tokens_per_second(config: DataConfig, tokenizer: Tokenizer, num_tokens: int) -> float:
    """Tokens a second of a stream, in this process (one worker does the same)."""
    lanes = config.global_batch_size
    stream = TrainingStream(config, tokenizer, lanes=range(lanes), seed=0)
    stream.next_batch()  # opens the files
    batches = max(1, num_tokens // (lanes * config.context_length))
    begin = time.process_time()
    for _ in range(batches):
        stream.next_batch()
    return batches * lanes * config.context_length / (time.process_time() - begin)


def measure(num_tokens: int, vocab_size: int) -> Iterator[tuple[str, float]]:
    """Measure each way from documents to rows.

    Args:
        num_tokens: Tokens to measure a stream over.
        vocab_size: Ids of the BPE tokenizer.

    Yields:
        Names of ways, and tokens a second of one core.
    """
    bytes_only = config_of(TokenizerConfig())
    yield "train on documents, bytes", tokens_per_second(bytes_only, build_tokenizer(bytes_only.tokenizer), num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        made = train_bpe([f"{sysconfig.get_path('stdlib')}/*.py"], vocab_size=vocab_size, out=f"{folder}/bpe")
        config, tokenizer = config_of(TokenizerConfig(kind="huggingface", name=str(made))), load_tokenizer(made)
        name = f"BPE {tokenizer.vocab_size}"
        yield f"train on documents, {name}", tokens_per_second(config, tokenizer, num_tokens)
        out = Path(folder) / "ids"
        begin = time.process_time()
        (statistics,) = tokenize(config, out, processes=1).values()
        yield f"xlstm-lm tokenize, {name}", statistics.tokens / (time.process_time() - begin)
        sources = read_recipe(out / DATA_RECIPE)[0]["data"]["sources"]
        config = replace(config, sources=[SourceConfig(**source) for source in sources])
        yield f"train on token ids, {name}", tokens_per_second(config, tokenizer, num_tokens)


@program("eval.data_throughput")
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.data_throughput", description=__doc__)
    parser.add_argument("--tokens", type=argument(Count), default=4_000_000, help="tokens to measure over")
    parser.add_argument("--vocab-size", type=argument(VocabSize), default=8192, help="of the BPE, trained on the spot")
    parser.add_argument(
        "--gpu",
        type=argument(Count),
        default=50_000,
        help="tokens a second that each GPU trains on, for the last column",
    )
    options = parser.parse_args()
    print(f"| way | tokens/s a core | cores for {GPUS} GPUs at {options.gpu:,} tokens/s |\n|---|---|---|")
    for way, rate in measure(options.tokens, options.vocab_size):
        print(f"| {way} | {rate:,.0f} | {GPUS * options.gpu / rate:.2f} |", flush=True)


if __name__ == "__main__":
    main()
