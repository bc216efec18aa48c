"""How far back the gradient of a loss reaches: `python -m eval.gradient_reach --models MODEL ... --runs FOLDER ...`.

The question that the LSTM was made for (Hochreiter, 1991; Bengio, Simard and Frasconi, 1994). A window is T + 1
successive tokens of one document, read from an empty state. Its loss is the cross entropy of the last token given the
T before; e_s is what the embedding gives for the s-th of these, before anything else has touched it. The reach is

    g(k) = || d loss / d e_(T-1-k) ||        k = 0, ..., T - 1

the Euclidean norm of the gradient k tokens before the input at which the prediction is read off. Models differ in
scale, so g(k) / g(0) of the same window is shown: its median and its 10 % and 90 % quantiles over all windows and all
distances of a bin (a quarter of a doubling). Beside it, the distance within which half, 90 % and 99 % of the whole
lies: the share g(k) / (g(0) + ... + g(T-1)) of each window, averaged over windows and summed from k = 0 on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.command import positive
from eval.documents import DocumentsConfig, Text, open_documents
from eval.gradient_reach_picture import draw_reach
from eval.gradient_reach_runs import load_study, train_runs
from eval.measure import environment
from eval.models import DTYPES
from eval.results_file import results_file, write_results
from eval.speed_models import Model, Own, describe_kernels, parse_model
from xlstm_lm import hub
from xlstm_lm.base.fields import NonNegative, argument
from xlstm_lm.base.finite import check_finite
from xlstm_lm.base.program import program
from xlstm_lm.data import Tokenizer, TokenizerConfig, build_tokenizer
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.ops.operation import recorded_choices

DEFAULT_MODELS = [
    f"{name}-cpu-0.7m" for name in ("rnn", "lstm", "gru", "transformer", "mamba1", "mamba2", "slstm", "mlstm", "xlstm")
]
DEFAULT_DATA = ["configs/data/python_stdlib.yaml"]
UNTRAINED, TRAINED = "at initialisation", "after training"
SHOWN_DISTANCES = (1, 4, 16, 64, 256, 1024, 4096)
"""Columns of the table."""
PARTS = (0.5, 0.9, 0.99)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(kw_only=True)
class Bin:
    """g(k) / g(0) at the distances first, ..., last."""

    first: int
    last: int
    low: float
    """10 % quantile over windows and distances."""
    median: float
    high: float
    """90 % quantile."""


@dataclass(kw_only=True)
class Reach:
    """One model, before or after training."""

    name: str
    stage: str
    source: str
    """The preset, or the run folder."""
    parameters: int
    kernels: str
    windows: int
    length: int
    """Inputs of a window."""
    loss: float
    """Nats: mean of the losses whose gradient is taken."""
    norm_at_zero: float
    """Median over windows of g(0)."""
    within: dict[str, int]
    """By part of the whole, such as 0.9: the least distance within which so much of it lies."""
    bins: list[Bin]


def input_gradients(module: nn.Module, embedding: nn.Embedding, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """g(k) of windows (B, T + 1), as (B, T) in float64 with k along the second axis, and the losses (B,).

    Args:
        module: has `hidden(tokens)` and `loss(hidden, targets)`, as `eval.speed_models` makes them.
        embedding: the layer of it whose output e is.
    """
    # cuDNN computes the gradient of a recurrent layer in training mode alone; nothing else may differ there.
    for each in module.modules():
        each.training = not isinstance(each, nn.Dropout)
    embedded: list[Tensor] = []

    def take(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    with embedding.register_forward_hook(take):
        hidden_BTD = module.hidden(tokens_BT[:, :-1])
    loss_B1 = module.loss(hidden_BTD[:, -1:], tokens_BT[:, -1:], reduction="none")
    [gradient_BTD] = torch.autograd.grad(loss_B1.sum(), embedded)  # rows know nothing of each other
    return gradient_BTD.double().norm(dim=-1).flip(1), loss_B1.detach()[:, 0]


def make_bins(length: int) -> list[tuple[int, int]]:
    """First and last distance of each bin: 1, 2, ... and from 8 on a quarter of a doubling, up to `length` - 1."""
    edges = {round(2 ** (quarter / 4)) for quarter in range(4 * length.bit_length())}
    edges = [*sorted(edge for edge in edges if edge < length), length]
    return [(first, after - 1) for first, after in itertools.pairwise(edges)]


def summarize(norms_BT: Tensor) -> dict[str, Any]:
    """The fields norm_at_zero, within and bins of a `Reach`, from g(k) of every window (B, T)."""
    relative_BT = norms_BT / norms_BT[:, :1]
    bins = []
    for first, last in make_bins(norms_BT.shape[1]):
        low, median, high = np.quantile(relative_BT[:, first : last + 1].numpy(), QUANTILES).tolist()
        bins.append(Bin(first=first, last=last, low=low, median=median, high=high))
    reached_T = (norms_BT / norms_BT.sum(1, keepdim=True)).mean(0).cumsum(0)
    last = len(reached_T) - 1  # the whole, but for rounding
    within = {str(part): min(int((reached_T < part).sum()), last) for part in PARTS}
    return {"norm_at_zero": float(norms_BT[:, 0].median()), "within": within, "bins": bins}


def make_windows(texts: Iterable[Text], tokenizer: Tokenizer, length: int, count: int) -> Tensor:
    """`count` windows (count, `length` + 1) of successive tokens of one document each, spread evenly over the texts.

    Raises:
        ValueError: the documents have fewer such windows.
    """
    found = []
    for text in texts:
        tokens_N = tokenizer.encode_array(text.text)
        usable = len(tokens_N) // (length + 1) * (length + 1)
        found += list(tokens_N[:usable].reshape(-1, length + 1))
    if len(found) < count:
        raise ValueError(
            f"The documents hold {len(found)} windows of {length + 1} tokens, but --windows is {count}: give more or "
            "longer documents, fewer windows or a smaller --length."
        )
    chosen = np.linspace(0, len(found) - 1, count).round().astype(int)
    return torch.from_numpy(np.stack([found[index] for index in chosen]).astype(np.int64))


def measure_reach(module: nn.Module, model: Model, windows_NT: Tensor, batch_size: int, **names: str) -> Reach:
    """The reach of one model over windows (N, T + 1); `names` are the fields stage and source."""
    embedding = module.model.get_input_embeddings() if model.is_stock else module.model.embedding
    with recorded_choices() as taken:
        found = [
            input_gradients(module, embedding, windows.to(embedding.weight.device))
            for windows in windows_NT.split(batch_size)
        ]
    norms_NT, nats_N = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    check_finite(norms_NT, module, f"The gradients of {model.name}")
    return Reach(
        name=model.name,
        parameters=count_parameters(model.config),
        kernels=describe_kernels(model, taken),
        windows=len(windows_NT),
        length=norms_NT.shape[1],
        loss=float(nats_N.mean()),
        **summarize(norms_NT),
        **names,
    )


def as_markdown(reaches: list[Reach]) -> str:
    """A table for each stage: g(k) / g(0) at some distances, and within which distance what part of the whole lies."""
    tables = []
    for stage in dict.fromkeys(reach.stage for reach in reaches):
        rows = [reach for reach in reaches if reach.stage == stage]
        shown = [index for index, each in enumerate(rows[0].bins) if each.first in SHOWN_DISTANCES]
        if len(rows[0].bins) - 1 not in shown:
            shown.append(len(rows[0].bins) - 1)
        head = ["model", "parameters", "loss, nats", *(_distances(rows[0].bins[index]) for index in shown)]
        head += [f"{float(part):.0%} within" for part in rows[0].within]
        lines = [f"{stage}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for reach in rows:
            cells = [reach.name, f"{reach.parameters:,}", f"{reach.loss:.3f}"]
            cells += [f"{reach.bins[index].median:.1e}" for index in shown]
            cells += [f"{distance:,}" for distance in reach.within.values()]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
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
            definition = __doc__.split("\n\n", 1)[1]
            content = {"environment": made_with, "definition": definition, "data": options.data}
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
        models = [Model(run.name, run.config.model, is_stock=False) for run in runs]
        folders = {run.folder: run.name for run in runs}
        trained_stage = f"after {runs[0].tokens:,} tokens of training"
        at_once = options.at_once or study.at_once
        train_runs(runs, at_once, options.max_minutes and 60 * options.max_minutes)
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
        help="To measure at initialisation: presets of configs/model, recipes, or families with fields, as "
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
