"""Rows that several processes divide beside whole rows in one process; a program for torchrun.

Prints JSON: for each kind of model the largest relative error of hidden states and of every parameter's gradient, in
float64, or the exchanges of a pass, or its memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from tests.models.family_cases import CONFIGS, make_model
from xlstm_lm.models import HybridConfig, build_model
from xlstm_lm.models.language_model import LanguageModel
from xlstm_lm.parallel.collectives import CountCollectives
from xlstm_lm.parallel.divided_rows import DividedRows
from xlstm_lm.parallel.live_bytes import LiveBytes
from xlstm_lm.parallel.process_group import World, join_world

KINDS = [name for name, config in CONFIGS.items() if config.family != "lstm"]
SLICE = 7  # tokens: no multiple of any chunk
ROWS = 3
Rows = tuple[Tensor, Tensor | None, Tensor]


def make_rows(slices: int) -> Rows:
    """A document through all slices; documents that start at and beside boundaries; many documents."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT, targets_BT = torch.randint(0, 61, (2, ROWS, slices * SLICE), generator=generator).unbind(0)
    resets_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    resets_BT[1, [SLICE - 1, SLICE, slices * SLICE - SLICE + 1]] = True
    resets_BT[2] = torch.rand(slices * SLICE, generator=generator) < 0.3
    return tokens_BT, resets_BT, targets_BT


def run(model: LanguageModel, rows: Rows) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and the gradients of the summed loss."""
    tokens_BT, resets_BT, targets_BT = rows
    hidden_BTD = model(tokens_BT, resets_BT)
    model.loss(hidden_BTD, targets_BT).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return hidden_BTD.detach(), gradients


def own_part(world: World, rows: Rows) -> Rows:
    """This process's slice of its rows: with two data ranks, the last row is with the second."""
    first, stop = (0, ROWS) if world.data.size == 1 else [(0, 2), (2, 3)][world.data.rank]
    axis = world.sequence
    tokens, resets, targets = (x if x is None else x[first:stop].chunk(axis.size, 1)[axis.rank] for x in rows)
    return tokens, resets, targets


def error(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def worst_error(name: str, world: World, most_gathered: int, *, with_resets: bool, checkpointing: bool) -> float:
    """Largest error on this rank, in float64."""
    model = make_model(name).double()
    tokens_BT, resets_BT, targets_BT = make_rows(world.sequence.size)
    rows = (tokens_BT, resets_BT if with_resets else None, targets_BT)
    hidden_BTD, gradients = run(model, rows)

    model.divide_rows(DividedRows(world.sequence, most_gathered))
    model.activation_checkpointing = checkpointing
    part_BTD, parts = run(model, own_part(world, rows))
    (expected_BTD, _, _) = own_part(world, (hidden_BTD, None, targets_BT))
    return max(
        error(part_BTD, expected_BTD), *(error(world.sum_(part), whole) for part, whole in zip(parts, gradients))
    )


def errors(world: World, exchange: str, checkpointing: bool) -> dict[str, float]:
    """Largest error of every kind of model over all ranks."""
    most_gathered = world.size if exchange == "gather" else 1
    found = {}
    for name in KINDS:
        for with_resets in (True, False):
            own = worst_error(name, world, most_gathered, with_resets=with_resets, checkpointing=checkpointing)
            found[f"{name}{'' if with_resets else ' without resets'}"] = max(world.all_gather(own))
    return found


def exchanges(world: World, exchange: str) -> dict[str, list[Any]]:
    """Kind, number and bytes of the exchanges of forward and backward pass in float32."""
    found = {}
    for name in KINDS:
        model = make_model(name)
        model.divide_rows(DividedRows(world.sequence, world.size if exchange == "gather" else 1))
        with CountCollectives() as sent:
            run(model, own_part(world, make_rows(world.sequence.size)))
        found[name] = [[key.kind, amount.calls, amount.bytes] for key, amount in sent.amounts.items()]
    return found


def memory(world: World) -> dict[str, int]:
    """Peak of live bytes of a pass over a long row, whole and divided."""
    torch.manual_seed(0)
    pattern = ["mlstm", "mlstm_paper", "slstm", "mamba2", "gated_delta"]
    model = build_model(HybridConfig(vocab_size=61, embedding_dim=32, num_blocks=5, num_heads=2, pattern=pattern))
    tokens_BT = torch.randint(0, 61, (ROWS, 1024))
    rows = (tokens_BT, torch.rand(tokens_BT.shape) < 0.01, tokens_BT)
    with LiveBytes() as whole:
        run(model, rows)
    model.divide_rows(DividedRows(world.sequence))
    with LiveBytes() as divided:
        run(model, own_part(world, rows))
    return {"whole": whole.peak, "divided": divided.peak}


@torch.no_grad()
def perplexity(world: World) -> dict[str, float]:
    """Perplexity of a row of 131,072 tokens with few documents, in float32, whole and divided."""
    torch.manual_seed(0)
    pattern = ["mlstm", "slstm", "mlstm_paper", "mamba2"]
    model = build_model(HybridConfig(vocab_size=61, embedding_dim=32, num_blocks=4, num_heads=2, pattern=pattern))
    tokens_BT = torch.randint(0, 61, (1, 131_072))
    rows = (tokens_BT, torch.rand(tokens_BT.shape) < 1e-4, (tokens_BT + tokens_BT.roll(1, 1)) % 61)
    found = {}
    for name in ("whole", "divided"):
        tokens, resets, targets = rows if name == "whole" else own_part(world, rows)
        model.divide_rows(None if name == "whole" else DividedRows(world.sequence))
        nats = model.loss(model(tokens, resets), targets).double()
        nats = nats.clone() if name == "whole" else world.sum_(nats.clone())
        found[name] = (nats / tokens_BT.numel()).exp().item()
    return found


if __name__ == "__main__":
    command, exchange, sequence, *rest = sys.argv[1:]
    world = join_world().with_sequence(int(sequence))
    report: Any
    match command:
        case "errors":
            report = errors(world, exchange, "checkpointing" in rest)
        case "exchanges":
            report = exchanges(world, exchange)
        case "memory":
            report = memory(world)
        case "perplexity":
            report = perplexity(world)
    if world.is_first:
        print(json.dumps(report))
