"""Perplexity of documents: `python -m eval.perplexity --model FOLDER --data FILES`.

For any number of models, ours and any causal model of transformers, by the same code: nats a token, perplexity a token
and a word, bits a byte; by position in the document and by document length; and, with --extrapolate, against the
context length, beyond that of training too, as JSON and picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.command import add_model_flags, environment, positive
from eval.documents import DocumentsConfig, Text, open_documents
from eval.extrapolation import draw_extrapolation, extrapolate
from eval.figures import Totals, as_sequence, exp
from eval.models import CausalModel, load_model, pick_device
from eval.results_file import results_file, write_results
from eval.scoring import score_sequences
from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, Size, check_fields
from xlstm_lm.base.program import program

DEFINITIONS = {
    "loss": "nats a target token; targets are all tokens of the documents, the first given the token that begins a "
    "document, and, with count_end, the document's end",
    "perplexity": "exp(loss)",
    "word_perplexity": "exp(nats / words); words are separated by white space and, with count_line_ends, every end of "
    "line is one more",
    "bits_per_byte": "nats / ln 2 / UTF-8 bytes of the documents, without characters that the tokenizer leaves out; in "
    "buckets, of the bytes the tokens stand for",
}
GROUP = 16  # batches of documents that are read and sorted by length together


@dataclass(kw_only=True)
class PerplexityConfig:
    """How documents are scored."""

    context_length: Count | None = None
    """Score in windows of so many tokens that know nothing of each other; null carries the state through documents."""
    stride: Count | None = None
    """How far each window is ahead of the one before; null for whole windows."""
    count_end: bool = False
    """Whether the end of a document is a target too, as in training."""
    count_line_ends: bool = False
    """Whether an end of line is a word, as in word-level corpora such as WikiText."""
    batch_size: Size = 8
    """Rows in a batch; changes no figure."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stride is not None and self.context_length is None:
            raise ValueError(f"stride {self.stride} is the step of windows; give a context length with it.")


def measure(model: CausalModel, texts: Iterator[Text], config: PerplexityConfig) -> dict[str, Any]:
    """Score documents: totals, and the same by position and by document length.

    Raises:
        ValueError: there is no document, the model cannot be scored this way, or the window cannot be.
    """
    by_position: dict[int, Totals] = {}
    by_length: dict[int, Totals] = {}
    documents: dict[int, int] = {}
    total, words = Totals(), 0
    for group in _groups(texts, GROUP * config.batch_size):
        console.progress(f"scoring {model.name}: {sum(documents.values()):,} documents, {total.tokens:,} tokens done")
        sequences = [as_sequence(model, text, config.count_end) for text in group]
        scores = score_sequences(
            model, sequences, batch_size=config.batch_size, window=config.context_length, stride=config.stride
        )
        for text, sequence, score in zip(group, sequences, scores, strict=True):
            bytes_T = model.tokenizer.bytes_per_token.numpy()[sequence[1:]]
            for first, last in _doublings(len(score.nats)):
                by_position.setdefault(first, Totals()).add(score.nats[first:last], bytes_T[first:last].sum())
            shortest = 1 << (max(len(score.nats), 1).bit_length() - 1)
            by_length.setdefault(shortest, Totals()).add(score.nats, bytes_T.sum())
            documents[shortest] = documents.get(shortest, 0) + 1
            total.add(score.nats, len(text.text.encode()) - model.tokenizer.missing_bytes(text.text))
            words += count_words(text.text, config.count_line_ends)
    if not total.tokens:
        raise ValueError("The data has no token to predict; give documents with text in them.")
    return {
        "documents": sum(documents.values()),
        "words": words,
        "nats": total.nats,
        **total.figures(),
        "word_perplexity": exp(total.nats / words) if words else None,
        "by_position": [
            {"from": first, "to": 2 * first or 1, **totals.figures()} for first, totals in sorted(by_position.items())
        ],
        "by_document_length": [
            {"from": shortest, "to": 2 * shortest, "documents": documents[shortest], **totals.figures()}
            for shortest, totals in sorted(by_length.items())
        ],
    }


def count_words(text: str, count_line_ends: bool) -> int:
    """Words between white space and, on request, an end of line each."""
    return len(text.split()) + count_line_ends * text.count("\n")


def as_markdown(result: dict[str, Any]) -> str:
    """What was measured of one model, for people."""
    lines = []
    if "documents" in result:
        lines.append(
            f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
            f"{result['words']:,} words; {result['how']}"
        )
        lines.append(
            f"{result['loss']:.4f} nats a token, perplexity {result['perplexity']:.4f} a token, "
            f"{_number(result['word_perplexity'])} a word, {_number(result['bits_per_byte'])} bits per byte"
        )
        for key, what in (("by_position", "position"), ("by_document_length", "tokens of the document")):
            lines += ["", f"| {what} | tokens | nats a token | bits per byte |", "|---|---|---|---|"]
            lines += [
                f"| {row['from']:,} to {row['to'] - 1:,} | {row['tokens']:,} | {row['loss']:.4f} | "
                f"{_number(row['bits_per_byte'])} |"
                for row in result[key]
            ]
    if "extrapolation" in result:
        lines += ["", "| context | times trained | tokens | nats a token | bits per byte | second half |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in result["extrapolation"]:
            times = "" if row["times_trained"] is None else f"{row['times_trained']:g}"
            lines.append(
                f"| {row['context_length']:,} | {times} | {row['tokens']:,} | {row['loss']:.4f} | "
                f"{_number(row['bits_per_byte'])} | {_number(row['second_half']['bits_per_byte'])} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure models on data, print the tables and, with --out, write JSON and picture."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    with program("eval.perplexity"):
        _check(options)
        data = DocumentsConfig(data=options.data, split_at=options.split_at, max_documents=options.max_documents)
        config = PerplexityConfig(
            context_length=options.context_length,
            stride=options.stride,
            count_end=options.count_end,
            count_line_ends=options.count_line_ends,
            batch_size=options.batch_size,
        )
        open_documents(data)  # a missing file shows before a model is loaded
        results = [_measure_one(name, data, config, options) for name in options.model]
        written = {
            "data": asdict(data),
            "settings": asdict(config),
            "definitions": DEFINITIONS,
            "environment": environment(pick_device(options.device), ("transformers",)),
            "models": results,
        }
        if options.out:
            write_results(options.out, written)
            print(f"\nWrote {options.out}")
            if options.extrapolate or options.context_lengths:
                draw_extrapolation(results, options.out.with_suffix(".png"))
                print(f"Wrote {options.out.with_suffix('.png')}")


def _measure_one(
    name: str, data: DocumentsConfig, config: PerplexityConfig, options: argparse.Namespace
) -> dict[str, Any]:
    console.stage(f"loading {name}")
    model = load_model(
        name,
        library=options.library,
        device=options.device,
        dtype=options.dtype,
        trained_context=options.trained_context,
    )
    result: dict[str, Any] = {
        "model": name,
        "parameters": model.num_parameters,
        "trained_context": model.trained_context,
        "carries_state": model.carries_state,
    }
    console.stage(f"scoring {name}")
    lengths = options.context_lengths
    if options.extrapolate:
        if model.trained_context is None:
            raise ValueError(f"{name} does not say how long its training rows were; give --trained-context.")
        doublings = int(math.log2(options.extrapolate))
        lengths = [model.trained_context << power for power in range(doublings + 1)]
    if lengths:
        texts = list(open_documents(data))
        result["extrapolation"] = extrapolate(
            model, texts, lengths, batch_size=options.batch_size, max_tokens=options.max_tokens
        )
    else:
        config, how = choose_windows(model, config)
        result |= {"how": how, **measure(model, open_documents(data), config)}
    console.end_stage()
    print(f"\n{name}: {model.num_parameters:,} parameters, trained on {model.trained_context or 'unknown'} tokens")
    print(as_markdown(result))
    return result


def choose_windows(model: CausalModel, config: PerplexityConfig) -> tuple[PerplexityConfig, str]:
    """The windows of a model that cannot carry its state, where none were asked for, and the setting in words."""
    values = asdict(config)
    if config.context_length is None and not model.carries_state:
        if model.trained_context is None:
            raise ValueError(f"{model.name} neither carries a state nor says its context; give --context-length.")
        values |= {"context_length": model.trained_context, "stride": max(1, model.trained_context // 2)}
    config = PerplexityConfig(**values)
    if config.context_length is None:
        return config, "state carried through each document"
    return config, f"windows of {config.context_length} tokens, stride {config.stride or config.context_length}"


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.perplexity", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, nargs="+", metavar="FOLDER", help="Runs, checkpoints, exports, hub ids.")
    add("--data", required=True, nargs="+", metavar="FILE", help="Text, JSON lines or parquet, patterns, or a recipe.")
    add("--split-at", metavar="REGEX", help="A new document begins at every line of a text file that matches.")
    add("--max-documents", type=positive, metavar="N", help="Only the first so many documents.")
    add("--context-length", type=positive, metavar="T", help="Windows of so many tokens instead of a carried state.")
    add("--stride", type=positive, metavar="N", help="Step of the windows. Default: half the trained context, or T.")
    add("--count-end", action="store_true", help="The end of a document is a target too, as in training.")
    add("--count-line-ends", action="store_true", help="An end of line is a word, as in WikiText.")
    curve = parser.add_mutually_exclusive_group()
    curve.add_argument(
        "--extrapolate",
        type=positive,
        metavar="N",
        help="Instead: 1, 2, 4, ... N times the trained context, all on the same tokens.",
    )
    curve.add_argument("--context-lengths", type=positive, nargs="+", metavar="T", help="Instead: these lengths.")
    add("--max-tokens", type=positive, metavar="N", help="Tokens at each context length, at most.")
    add("--out", type=results_file, metavar="FILE", help="Write JSON and, beside it, the picture of context lengths.")
    add_model_flags(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    for length in [options.context_length, *(options.context_lengths or [])]:
        if length == 1:
            raise ValueError("A context length of 1 predicts nothing from context; it must be at least 2.")
    if options.extrapolate and options.extrapolate & (options.extrapolate - 1):
        raise ValueError(f"--extrapolate {options.extrapolate} is no power of two; 16 gives 1, 2, 4, 8 and 16 times.")
    if options.max_tokens and not (options.extrapolate or options.context_lengths):
        raise ValueError("--max-tokens limits the tokens at each context length; elsewhere use --max-documents.")


def _groups(texts: Iterator[Text], size: int) -> Iterator[list[Text]]:
    group: list[Text] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _doublings(length: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ... up to `length`."""
    first = 0
    while first < length:
        yield first, min(2 * first or 1, length)
        first = 2 * first or 1


def _number(value: float | None) -> str:
    return "beyond measure" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
