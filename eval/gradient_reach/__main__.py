"""How far back the gradient of a loss reaches: `python -m eval.gradient_reach --models MODEL ... --runs FOLDER ...`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.bench.measure import environment
from eval.bench.speed_models import Model, Own, parse_model
from eval.bench.tables import markdown_table
from eval.command import positive
from eval.gradient_reach.picture import draw_reach
from eval.gradient_reach.reach import DEFINITION, Bin, Reach, make_windows, measure_reach
from eval.gradient_reach.runs import load_study, train_runs
from eval.scoring.documents import DocumentsConfig, open_documents
from eval.scoring.models import DTYPES
from eval.study.results_file import results_file, write_results
from xlstm_lm import hub
from xlstm_lm.base.fields import NonNegative, argument
from xlstm_lm.base.program import program
from xlstm_lm.data import Tokenizer, TokenizerConfig, build_tokenizer

DEFAULT_MODELS = [
    f"{name}-cpu-0.7m" for name in ("rnn", "lstm", "gru", "transformer", "mamba1", "mamba2", "slstm", "mlstm", "xlstm")
]
DEFAULT_DATA = ["configs/data/python_stdlib.yaml"]
UNTRAINED, TRAINED = "at initialisation", "after training"
SHOWN_DISTANCES = (1, 4, 16, 64, 256, 1024, 4096)
"""Columns of the table."""


def as_markdown(reaches: list[Reach]) -> str:
    """A table for each stage: g(k) / g(0) at some distances, and the distances that contain a part of the whole."""
    tables = []
    for stage in dict.fromkeys(reach.stage for reach in reaches):
        rows = [reach for reach in reaches if reach.stage == stage]
        shown = [index for index, each in enumerate(rows[0].bins) if each.first in SHOWN_DISTANCES]
        if len(rows[0].bins) - 1 not in shown:
            shown.append(len(rows[0].bins) - 1)
        head = ["model", "parameters", "loss, nats", *(_distances(rows[0].bins[index]) for index in shown)]
        head += [f"{float(part):.0%} within" for part in rows[0].within]
        cells = [
            [reach.name, f"{reach.parameters:,}", f"{reach.loss:.3f}"]
            + [f"{reach.bins[index].median:.1e}" for index in shown]
            + [f"{distance:,}" for distance in reach.within.values()]
            for reach in rows
        ]
        tables.append(f"{stage}\n\n" + markdown_table(f"| {' | '.join(head)} |", cells))
    return "\n\n".join(tables)


def _distances(each: Bin) -> str:
    return f"k = {each.first}" if each.first == each.last else f"k = {each.first} to {each.last}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and, with --out, write JSON and a picture beside it."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # as in training
    with program("python -m eval.gradient_reach"):
        made_with = environment(options.device)  # the checkout may change later
        reaches = _measure_all(options)
        print("\nMedian of g(k) / g(0), and the distance within which a part of the whole lies")
        print(f"\n{as_markdown(reaches)}")
        if options.out:
            content = {"environment": made_with, "definition": DEFINITION, "data": options.data}
            content["reaches"] = [asdict(reach) for reach in reaches]
            write_results(options.out, content)
            draw_reach(content["reaches"], options.out.with_suffix(".png"))
            print(f"\nWrote {options.out} and {options.out.with_suffix('.png')}")


def _measure_all(options: argparse.Namespace) -> list[Reach]:
    models = [parse_model(text) for text in options.models]
    last_parts = [Path(folder).name for folder in options.runs]
    folders = {
        Path(each): last if last_parts.count(last) == 1 else each for each, last in zip(options.runs, last_parts)
    }
    trained_stage = TRAINED
    if options.config:
        study, runs = load_study(options.config)
        options.length, options.windows = runs[0].config.data.context_length, study.windows
        options.data = [str(options.config.parent / study.recipe)]
        models = [Model(run.model, run.config.model, is_stock=False) for run in runs]
        folders = {run.folder: run.model for run in runs}
        trained_stage = f"after {runs[0].tokens:,} tokens of training"
        at_once = options.at_once or study.at_once
        train_runs(options.config, runs, at_once, options.max_minutes and 60 * options.max_minutes)
    texts = list(open_documents(DocumentsConfig(data=options.data)))
    windows: dict[str, Tensor] = {}  # by the tokenizer

    def measure(module: nn.Module, model: Model, tokenizer: Tokenizer, **names: str) -> Reach:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{model.name} knows {model.config.vocab_size} tokens, but a model at initialisation reads bytes, and "
                f"the end of a document: give it a vocab_size of {tokenizer.vocab_size} or more."
            )
        key = tokenizer.fingerprint()
        if key not in windows:
            windows[key] = make_windows(texts, tokenizer, options.length, options.windows)
        reach = measure_reach(module, model, windows[key], options.batch_size, **names)
        print(f"{reach.name} {reach.stage}: 90 % within {reach.within['0.9']:,} tokens", flush=True)
        return reach

    reaches = []
    device, dtype = options.device, DTYPES[options.dtype]
    for model in models:
        module = model.build(device, dtype)
        reaches.append(measure(module, model, build_tokenizer(TokenizerConfig()), stage=UNTRAINED, source=model.name))
    for folder, name in folders.items():
        trained = hub.load(folder)
        module = Own(trained.model).to(device, dtype)
        model = Model(name, trained.model.config, is_stock=False)
        reaches.append(measure(module, model, trained.tokenizer, stage=trained_stage, source=str(folder)))
    return reaches


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.gradient_reach", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="To measure at initialisation: presets, recipes, or families with fields, as "
        f"eval.throughput takes them. Default, where no run is given: {' '.join(DEFAULT_MODELS)}.",
    )
    add("--runs", nargs="+", default=[], metavar="FOLDER", help="To measure: runs, checkpoints or exports.")
    add("--config", type=Path, metavar="FILE", help="Train or reuse this study's runs, and measure before and after.")
    add("--at-once", type=positive, metavar="N", help="With --config: runs at a time. Default: what the study says.")
    add(
        "--max-minutes",
        type=argument(NonNegative),
        metavar="M",
        help="With --config: stop training and save after so long.",
    )
    add("--data", nargs="+", default=DEFAULT_DATA, metavar="FILE", help="Default: held-out source of Python's library.")
    add("--length", type=positive, default=1024, metavar="T", help="Inputs of a window. Default: 1024.")
    add("--windows", type=positive, default=64, metavar="N", help="Default: 64.")
    add("--batch-size", type=positive, default=8, metavar="N", help="Windows computed at once. Default: 8.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=list(DTYPES), help="Default: float32.")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads. Default: 1.")
    add("--out", type=results_file, metavar="FILE", help="Write JSON and, beside it, the picture.")
    options = parser.parse_args(arguments)
    if options.config and (options.models or options.runs):
        parser.error("--config names the models itself: leave --models and --runs out")
    for flag, value in (("--at-once", options.at_once), ("--max-minutes", options.max_minutes)):
        if value is not None and not options.config:
            parser.error(f"{flag} is for training; give --config too")
    if options.length == 1:
        parser.error("--length 1 leaves no distance; it must be at least 2")
    options.models = options.models or ([] if options.runs or options.config else DEFAULT_MODELS)
    return options


if __name__ == "__main__":
    main()
