"""The speed of generation: time to the first token, tokens a second after it, and memory, against prompt length and
batch. The part of `eval.throughput` behind --generate."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.bench.measure import DTYPES, Step, Timing, clock, summarize, synchronize, take_turns
from eval.bench.speed_models import Model, describe_kernels
from eval.bench.tables import markdown_table
from eval.study.journal import Journal
from eval.study.picture import draw_over_length
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.ops.operation import recorded_choices

Timed = tuple[float, float]
"""Seconds to the first token, and for all after it."""


@dataclass(kw_only=True)
class GenerationRow:
    """One model at one prompt length and batch size."""

    name: str
    parameters: int
    length: int
    batch_size: int
    new_tokens: int
    dtype: str
    kernels: str = ""
    first_token_milliseconds: float | None = None
    first_token_spread: float | None = None
    tokens_per_second: float | None = None
    """Speed of the whole batch, after the first token."""
    tokens_per_second_spread: float | None = None
    state_bytes: int | None = None
    """State of all rows, behind the prompt."""
    peak_bytes: int | None = None
    """Memory on the GPU at most, weights included."""
    problem: str = ""


@torch.inference_mode()
def write(model: nn.Module, prompts_BT: Tensor, new_tokens: int) -> Iterator[list[Any]]:
    """Greedy continuation by one of our models: yields the state behind the prompt, once the first token is known, then
    behind the last token."""
    hidden_BTD, state = model(prompts_BT, return_state=True)
    token_B1 = model.logits(hidden_BTD[:, -1:]).argmax(-1)
    yield state
    for _ in range(new_tokens):
        hidden_B1D, state = model.decode_step(token_B1, state)
        token_B1 = model.logits(hidden_B1D).argmax(-1)
    yield state


def run_own(model: nn.Module, prompts_BT: Tensor, new_tokens: int, device: str) -> Timed:
    """One continuation, timed."""
    now = clock(device)
    synchronize(device)
    start = now()
    steps = write(model, prompts_BT, new_tokens)
    next(steps)
    synchronize(device)
    first = now()
    next(steps)
    synchronize(device)
    return first - start, now() - first


def run_stock(model: nn.Module, prompts_BT: Tensor, new_tokens: int, device: str) -> Timed:
    """The same through `generate` of transformers: once for one token, once for all."""
    options = {
        "attention_mask": torch.ones_like(prompts_BT),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    marks = []
    now = clock(device)
    for count in (1, 1 + new_tokens):
        synchronize(device)
        start = now()
        model.generate(prompts_BT, min_new_tokens=count, max_new_tokens=count, **options)
        synchronize(device)
        marks.append(now() - start)
    return marks[0], marks[1] - marks[0]


def measure_generation(
    models: list[Model], length: int, batch_size: int, options: argparse.Namespace, journal: Journal
) -> list[GenerationRow]:
    """All models at one prompt length and batch size."""
    device, new_tokens = options.device, options.new_tokens
    vocabulary = min(model.config.vocab_size for model in models)
    prompts_BT = torch.randint(0, vocabulary, (batch_size, length), device=device)
    rows = {
        model.name: GenerationRow(
            name=model.name,
            parameters=count_parameters(model.config),
            length=length,
            batch_size=batch_size,
            new_tokens=new_tokens,
            dtype=options.dtype,
        )
        for model in models
    }
    timed: dict[str, list[Timed]] = {model.name: [] for model in models}

    def prepare(model: Model) -> Step:
        row = rows[model.name]
        module = model.build(device, DTYPES[options.dtype], generating=True).eval()
        run: Callable[..., Timed] = run_stock if model.is_stock else run_own
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with recorded_choices() as taken:
            run(module.model, prompts_BT, min(2, new_tokens), device)
        if not model.is_stock:
            row.state_bytes = _bytes_of(next(write(module.model, prompts_BT, 1)))
        if device == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated()
        row.kernels = describe_kernels(model, taken)

        def step() -> None:
            timed[model.name].append(run(module.model, prompts_BT, new_tokens, device))

        return step

    makers = {model.name: functools.partial(prepare, model) for model in models}
    title = f"prompts of {length}, batch {batch_size}"
    outcomes = take_turns(title, makers, journal=journal, device=device, rounds=options.rounds, seconds=options.seconds)
    for name, outcome in outcomes.items():
        row = rows[name]
        if not isinstance(outcome, Timing):
            row.problem = f"fails: {outcome}"
            continue
        first, after = zip(*timed[name][2:])  # the two before warm up
        first_timing, after_timing = summarize(list(first)), summarize(list(after))
        row.first_token_milliseconds = first_timing.milliseconds
        row.first_token_spread = first_timing.spread_milliseconds
        row.tokens_per_second = batch_size * new_tokens / after_timing.milliseconds * 1e3
        relative_spread = after_timing.spread_milliseconds / after_timing.milliseconds
        row.tokens_per_second_spread = row.tokens_per_second * relative_spread
    return list(rows.values())


def _bytes_of(state: Any) -> int:
    """Bytes of all tensors in nested lists and tuples."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(_bytes_of, state)) if isinstance(state, (list, tuple)) else 0


def as_markdown_generation(rows: list[GenerationRow]) -> str:
    """The rows of one prompt length and batch size as a table for people."""
    cells = []
    for row in rows:
        first = speed = ""
        if row.tokens_per_second is not None:
            first = f"{row.first_token_milliseconds:,.1f} ± {row.first_token_spread:,.1f}"
            speed = f"{row.tokens_per_second:,.0f} ± {row.tokens_per_second_spread:,.0f}"
        state = f"{row.state_bytes / 2**20:,.2f} MiB" if row.state_bytes is not None else ""
        memory = f"{row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes else ""
        cells.append([row.name, f"{row.parameters:,}", row.kernels, first, speed, state, memory, row.problem])
    head = "| model | parameters | kernels | first token, ms (median ± MAD) | then tokens/s | state | memory | |"
    return markdown_table(head, cells)


def draw_generation(rows: list[GenerationRow], path: Path) -> bool:
    """Time to the first token, tokens a second and state over the prompt length, for each batch size."""
    quantities = {
        "ms to the first token": lambda row: row.first_token_milliseconds,
        "tokens/s after it": lambda row: row.tokens_per_second,
        "state, MiB": lambda row: row.state_bytes and row.state_bytes / 2**20,
    }
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for quantity, value in quantities.items():
        for row in rows:
            if row.tokens_per_second is not None and value(row) is not None:
                curve = f"{row.name}, batch {row.batch_size}"
                panels.setdefault(quantity, {}).setdefault(curve, []).append((row.length, value(row)))
    return bool(panels) and draw_over_length(panels, path, x_label="prompt length", y_label="")
