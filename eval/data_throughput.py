"""How many tokens a second one core reads, tokenizes, shuffles and packs: `python -m eval.data_throughput`."""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

from xlstm_lm.base.fields import Count, VocabSize, argument
from xlstm_lm.base.program import program
from xlstm_lm.data import (
    DataConfig,
    SourceConfig,
    Tokenizer,
    TrainingStream,
    build_tokenizer,
    load_tokenizer,
    train_bpe,
)


def tokens_per_second(tokenizer: Tokenizer, num_tokens: int, context_length: int = 1024, lanes: int = 16) -> float:
    """Tokens a second of a stream over the standard library's source, in this process (one worker does the same)."""
    sources = [SourceConfig(kind="python_stdlib", on_bad_document="skip")]
    config = DataConfig(context_length=context_length, global_batch_size=lanes, sources=sources, num_workers=0)
    stream = TrainingStream(config, tokenizer, lanes=range(lanes), seed=0)
    stream.next_batch()  # opens the files
    batches = max(1, num_tokens // (lanes * context_length))
    begin = time.process_time()
    for _ in range(batches):
        stream.next_batch()
    return batches * lanes * context_length / (time.process_time() - begin)


@program("eval.data_throughput")
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.data_throughput", description=__doc__)
    parser.add_argument("--tokens", type=argument(Count), default=4_000_000, help="tokens to measure over")
    parser.add_argument("--vocab-size", type=argument(VocabSize), default=8192, help="of the BPE, trained on the spot")
    options = parser.parse_args()
    print("| tokenizer | tokens/s a core | MB of text/s a core |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        stdlib = Path(sysconfig.get_path("stdlib"))
        bpe = load_tokenizer(train_bpe([str(stdlib / "*.py")], vocab_size=options.vocab_size, out=folder))
    sample = (stdlib / "argparse.py").read_text()
    for name, tokenizer in (("bytes", build_tokenizer(DataConfig().tokenizer)), (f"BPE {bpe.vocab_size}", bpe)):
        rate = tokens_per_second(tokenizer, options.tokens)
        bytes_per_token = len(sample.encode()) / len(tokenizer.encode(sample))
        print(f"| {name} | {rate:,.0f} | {rate * bytes_per_token / 1e6:.2f} |")


if __name__ == "__main__":
    main()
