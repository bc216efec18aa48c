"""How fast whole models train, or with --generate write: `python -m eval.throughput --models xlstm-400m ...`.

Every model gets its best kernel, which is named, and the same loss. A batch holds the same number of tokens at every
length (to a whole number of rows), each row one document: what a document's beginning costs inside a row is not in it.
The models of a table take turns in one process; the share of the arithmetic peak (MFU) refers to a large matrix
product measured in the same run, with the operations of `xlstm_lm.models.accounting.training_flops_per_token`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from eval.bench.generation_speed import GenerationRow, as_markdown_generation, draw_generation, measure_generation
from eval.bench.measure import DTYPES, Ceilings, Step, Timing, take_turns
from eval.bench.speed_models import Model, describe_kernels, parse_model
from eval.bench.tables import ceilings_of_study, go_through, markdown_table
from eval.study.journal import Journal, run_in_children
from eval.study.picture import draw_over_length
from eval.study.results_file import results_file
from xlstm_lm.base.fields import Count, NonNegative, Positive, Size, argument
from xlstm_lm.base.program import program
from xlstm_lm.models.accounting import count_parameters, training_flops_per_token
from xlstm_lm.ops.operation import recorded_choices

SILENCE = 180.0
"""Seconds after which a step on a GPU counts as hanging; the first of a compiled model takes long."""
CPU_MODELS = ["xlstm-cpu-0.7m", "transformer-cpu-0.7m", "mamba2-cpu-0.7m", "lstm-cpu-0.7m"]
GPU_MODELS = ["xlstm-400m", "transformer-400m", "mamba2-400m"]


@dataclass(kw_only=True)
class Row:
    """One model at one length."""

    name: str
    parameters: int
    length: int
    batch_size: int
    dtype: str
    mode: str
    """eager or compiled."""
    kernels: str = ""
    milliseconds: float | None = None
    """Time of a forward and a backward pass."""
    spread_milliseconds: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    """Tokens a second relative to the first model of the table that ran."""
    flops_share: float | None = None
    """MFU, of the matrix product measured in this run."""
    peak_bytes: int | None = None
    """Memory on the GPU at most, with the weights of the models measured so far."""
    problem: str = ""


def training_step(model: nn.Module, tokens_BT: torch.Tensor, mode: str) -> Step:
    """Forward and backward, without an optimizer: what a micro batch costs."""

    def loss() -> torch.Tensor:
        return model.loss(model.hidden(tokens_BT[:, :-1]), tokens_BT[:, 1:], reduction="mean")

    compute = torch.compile(loss) if mode == "compiled" else loss

    def step() -> None:
        compute().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def measure_length(
    models: list[Model], length: int, options: argparse.Namespace, journal: Journal, ceilings: Ceilings
) -> list[Row]:
    """All models, in every mode, at one length."""
    dtype, batch_size = DTYPES[options.dtype], max(1, options.tokens // length)
    vocabulary = min(model.config.vocab_size for model in models)
    tokens_BT = torch.randint(0, vocabulary, (batch_size, length + 1), device=options.device)
    rows: dict[str, Row] = {}
    makers = {}

    def prepare(row: Row, model: Model) -> Step:
        module = model.build(options.device, dtype)
        if options.activation_checkpointing:
            if model.is_stock:
                module.model.gradient_checkpointing_enable()
            else:
                module.model.activation_checkpointing = True
        with recorded_choices() as taken:
            training_step(module, tokens_BT, "eager")()
        row.kernels = describe_kernels(model, taken)
        step = training_step(module, tokens_BT, row.mode)
        if options.device == "cuda":
            step()  # compiles, which takes memory of its own
            torch.cuda.reset_peak_memory_stats()
            step()
            row.peak_bytes = torch.cuda.max_memory_allocated()
        return step

    for mode in options.modes:
        for model in models:
            name = f"{model.name}, {mode}"
            rows[name] = Row(
                name=model.name,
                parameters=count_parameters(model.config),
                length=length,
                batch_size=batch_size,
                dtype=options.dtype,
                mode=mode,
            )
            makers[name] = functools.partial(prepare, rows[name], model)
    outcomes = take_turns(
        f"T {length}", makers, journal=journal, device=options.device, rounds=options.rounds, seconds=options.seconds
    )
    first = None
    for name, outcome in outcomes.items():
        row = rows[name]
        if not isinstance(outcome, Timing):
            row.problem = f"fails: {outcome}"
            continue
        row.milliseconds, row.spread_milliseconds = outcome.milliseconds, outcome.spread_milliseconds
        row.tokens_per_second = batch_size * length / outcome.milliseconds * 1e3
        first = first or row.tokens_per_second
        row.ratio = row.tokens_per_second / first
        config = next(model.config for model in models if model.name == row.name)
        operations = training_flops_per_token(config, length) * row.tokens_per_second
        row.flops_share = operations / ceilings.operations_per_second
    return list(rows.values())


def as_markdown(rows: list[Row]) -> str:
    """The rows of one length as a table for people."""
    cells = []
    for row in rows:
        speed = ratio = share = ""
        if row.milliseconds is not None:
            spread = row.tokens_per_second * row.spread_milliseconds / row.milliseconds
            speed = f"{row.tokens_per_second:,.0f} ± {spread:,.0f}"
            ratio, share = f"{row.ratio:.2f}", f"{row.flops_share:.1%}"
        memory = f"{row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes else ""
        cells.append([row.name, f"{row.parameters:,}", row.mode, row.kernels, speed, ratio, share, memory, row.problem])
    head = "| model | parameters | mode | kernels | tokens/s (median ± MAD) | to the first | MFU | memory | |"
    return markdown_table(head, cells)


def draw(rows: list[Row], path: Path) -> bool:
    """Tokens a second over the length."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.tokens_per_second:
            curves.setdefault(f"{row.name}, {row.mode}", []).append((row.length, row.tokens_per_second))
    labels = {"x_label": "sequence length", "y_label": "tokens/s, forward + backward"}
    return bool(curves) and draw_over_length({"training": curves}, path, **labels)


@program("eval.throughput")
def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and, with --out, write them as JSON and as a picture."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    models = [parse_model(text) for text in options.models]
    names = [model.name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are called {', '.join(twice)}; tell them apart, as in NAME=MODEL.")
    if options.device == "cuda" and not options.journal:
        sys.exit(run_in_children("eval.throughput", arguments, SILENCE))
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # as in training
    journal = Journal(options.journal)
    ceilings = ceilings_of_study(options, journal)
    if options.generate:
        row_class, show = GenerationRow, as_markdown_generation
        tables = {
            f"prompts of {length}, batch {size}, {options.dtype}": functools.partial(
                measure_generation, models, length, size, options, journal
            )
            for length in options.lengths
            for size in options.batch_sizes
        }
    else:
        row_class, show = Row, as_markdown
        tables = {
            f"length {length}, {options.dtype}": functools.partial(
                measure_length, models, length, options, journal, ceilings
            )
            for length in options.lengths
        }
    configs = {model.name: asdict(model.config) for model in models}
    rows = go_through(tables, options, journal, row_class, show, models=configs)
    picture = options.picture or (options.out and options.out.with_suffix(".png"))
    if picture and (draw_generation if options.generate else draw)(rows, picture):
        print(f"\nWrote {picture}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.throughput", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="presets, recipes, or families with fields (xlstm:embedding_dim=256,num_blocks=8); with "
        "transformers: in front, transformers' class of those sizes; NAME=MODEL gives it another name. "
        f"Default: {' '.join(GPU_MODELS)}; on a CPU {' '.join(CPU_MODELS)}",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--dtype", choices=list(DTYPES), help="of the weights; default bfloat16 on a GPU, else float32")
    add("--threads", type=argument(Size), default=1, help="CPU threads (default 1)")
    add("--lengths", type=argument(Count), nargs="+", help="of rows, or of prompts with --generate")
    add("--tokens", type=argument(Count), help="in a batch (default 32768; on a CPU 2048)")
    add("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    add("--activation-checkpointing", action="store_true", help="recompute activations in the backward")
    add("--generate", action="store_true", help="time to first token, and tokens/s after it")
    add("--batch-sizes", type=argument(Count), nargs="+", default=[1, 8], help="of prompts, with --generate")
    add("--new-tokens", type=argument(Count), default=32, help="written after a prompt (default 32)")
    add("--rounds", type=argument(Count), default=9, help="timed rounds at most (default 9)")
    add("--seconds", type=argument(Positive), default=60.0, help="for the rounds of a table, three at least")
    add("--budget", type=argument(NonNegative), default=0, help="seconds after which no table is begun; 0: no limit")
    add("--out", type=results_file, help="also write the rows to this JSON file")
    add("--picture", type=Path, help="draw here instead of beside --out")
    add("--journal", type=Path, help=argparse.SUPPRESS)  # the process that a supervisor starts has one
    add("--begin", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.models = options.models or (GPU_MODELS if on_gpu else CPU_MODELS)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.tokens = options.tokens or (32768 if on_gpu else 2048)
    options.lengths = options.lengths or ([2048, 8192, 32768] if on_gpu else [512, 2048])
    if not options.generate and max(options.lengths) > options.tokens:
        parser.error(
            f"--lengths {max(options.lengths)} is longer than a batch of --tokens {options.tokens}, the same at every "
            f"length: give --tokens {max(options.lengths)} or more"
        )
    return options


if __name__ == "__main__":
    main()
