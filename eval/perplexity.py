"""Perplexity of documents: `python -m eval.perplexity --model FOLDER --data FILES`.

For any number of models, ours and any causal model of transformers, by the same code: nats a token, perplexity a token
and a word, bits a byte; by position in the document and by document length; and, with --extrapolate, against the
context length, beyond that of training too, as JSON and picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from eval.bench.tables import markdown_table
from eval.command import add_model_flags, environment, load_named_model, positive
from eval.scoring.documents import DocumentsConfig, open_documents
from eval.scoring.extrapolation import draw_extrapolation, extrapolate
from eval.scoring.models import pick_device
from eval.scoring.perplexity import PerplexityConfig, choose_windows, measure
from eval.study.results_file import results_file, write_results
from xlstm_lm.base import console
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


def as_markdown(result: dict[str, Any]) -> str:
    """The measurements of one model as text and tables."""
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
            rows = [[f"{row['from']:,} to {row['to'] - 1:,}", *_cells(row)] for row in result[key]]
            lines += ["", markdown_table(f"| {what} | tokens | nats a token | bits per byte |", rows)]
    if "extrapolation" in result:
        head = "| context | times trained | tokens | nats a token | bits per byte | second half |"
        rows = []
        for row in result["extrapolation"]:
            times = "" if row["times_trained"] is None else f"{row['times_trained']:g}"
            half = _number(row["second_half"]["bits_per_byte"])
            rows.append([f"{row['context_length']:,}", times, *_cells(row), half])
        lines += ["", markdown_table(head, rows)]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['tokens']:,}", f"{row['loss']:.4f}", _number(row["bits_per_byte"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure models on data, print the tables and, with --out, write JSON and picture."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    with program("eval.perplexity"):
        _check(options)
        data, config = (
            kind(**{each.name: getattr(options, each.name) for each in fields(kind)})
            for kind in (DocumentsConfig, PerplexityConfig)
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
            picture = options.out.with_suffix(".png")
            if (options.extrapolate or options.context_lengths) and draw_extrapolation(results, picture):
                print(f"Wrote {picture}")


def _measure_one(
    name: str, data: DocumentsConfig, config: PerplexityConfig, options: argparse.Namespace
) -> dict[str, Any]:
    console.stage(f"loading {name}")
    model = load_named_model(name, options)
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


def _number(value: float | None) -> str:
    return "beyond measure" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
