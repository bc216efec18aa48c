"""A model's parts and what each of them costs: parameters, FLOPs, state, and traffic of a step that writes a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from xlstm_lm.models import LSTMConfig, ModelConfig
from xlstm_lm.models.block import FEEDFORWARD, Block, BlockConfig
from xlstm_lm.models.layers import BlockDiagonalLinear, CausalConv, HeadNorm
from xlstm_lm.models.lstm import Layer
from xlstm_lm.models.mixers.mixer import NORMS, PROJECTIONS, Mixer
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.conv import CONV

EMBEDDING, HEAD = "embedding", "head"
PART_OF_MODULE = (
    ((nn.RMSNorm, nn.LayerNorm, HeadNorm), NORMS),
    (CausalConv, CONV.name),
    ((nn.Linear, BlockDiagonalLinear), PROJECTIONS),
)
"""Part to which the parameters of a kind of module belong. A mixer's own parameters belong to its cell, or to the part
that `Mixer.parts` names."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a model: of all blocks of a kind together, or outside of the blocks."""

    block: str = ""
    """Kind of the blocks; empty outside of them."""
    name: str
    """Name of the part: embedding, projections, the name of an operation, norms, feed-forward or head."""
    parameters: int = 0
    """Number of parameters."""
    flops: float = 0.0
    """FLOPs of the forward pass for one token of a row."""
    step_flops: float = 0.0
    """FLOPs of the step that reads one more token."""
    state_bytes: int = 0
    """Bytes of one sequence's state; those of a block stand with its cell."""
    state_traffic: int = 0
    """Bytes of the state that the step reads and writes."""
    kept_bytes: float = 0.0
    """Bytes that the forward pass keeps for the backward pass, for each token of a row, on a GPU without activation
    checkpointing."""
    weight_bytes: int = 0
    """Bytes of weights that the step reads, once for all sequences of a batch."""


def components(
    config: ModelConfig, context_length: int, *, chunk_length: int | None = None, bytes_per_number: int = 2
) -> list[Component]:
    """Parts of the model from the embedding to the head. Allocates no memory for weights, and builds each kind of block
    once.

    A product of (m, k) and (k, n) counts 2 m k n FLOPs. Norms, activations, skips and soft caps count none.

    Args:
        config: The model.
        context_length: Tokens of a row, and tokens before the step.
        chunk_length: Chunk length in which the cells' FLOPs are counted; None for that of the configuration.
        bytes_per_number: Bytes of a weight and of an activation; cell states have four.
    """
    vocabulary = config.vocab_size * config.embedding_dim
    embedding = Component(
        name=EMBEDDING, parameters=vocabulary, weight_bytes=bytes_per_number * config.embedding_dim
    )  # of which a step reads one row
    found = [embedding]
    if isinstance(config, LSTMConfig):
        for width, count in Counter(config.input_widths).items():
            found += _of_layer(config, width, count, bytes_per_number)
    else:
        blocks = config.blocks()
        distinct = [block for index, block in enumerate(blocks) if block not in blocks[:index]]
        for block in distinct:
            found += _of_block(block, blocks.count(block), context_length, chunk_length, bytes_per_number)
    with torch.device("meta"):
        norm = sum(parameter.numel() for parameter in config.build_final_norm().parameters())
    if norm:
        found.append(Component(name=NORMS, parameters=norm, weight_bytes=bytes_per_number * norm))
    head = config.head_width * config.vocab_size
    of_head = Component(
        name=HEAD,
        parameters=0 if config.tie_embeddings else head,
        flops=2.0 * head,
        step_flops=2.0 * head,
        weight_bytes=bytes_per_number * head,
    )
    return [*found, of_head]


def _of_block(
    block: BlockConfig, count: int, context_length: int, chunk_length: int | None, bytes_per_number: int
) -> list[Component]:
    mixer = block.mixer
    cell = mixer.operations(1)[0].operation.name
    with torch.device("meta"):
        parameters = parameters_by_part(Block(block), cell)
    return _by_part(
        mixer.kind,
        cell,
        count,
        bytes_per_number,
        parameters=parameters,
        flops=block.flops_by_part(context_length, chunk_length),
        step_flops=block.step_flops_by_part(context_length),
        kept=block.kept_by_part(Storage(bytes_per_number, "cuda"), context_length),
        state_bytes=mixer.state_bytes(bytes_per_number, context_length),
        state_traffic=mixer.state_traffic(bytes_per_number, context_length),
    )


def _of_layer(config: LSTMConfig, input_width: int, count: int, bytes_per_number: int) -> list[Component]:
    flops = config.layer_flops_by_part(input_width)
    with torch.device("meta"):
        parameters = parameters_by_part(Layer(config, input_width), config.cell)
    state = config.layer_state_bytes(bytes_per_number)
    return _by_part(
        config.cell,
        config.cell,
        count,
        bytes_per_number,
        parameters=parameters,
        flops=flops,
        step_flops=flops,
        kept=config.layer_kept_by_part(Storage(bytes_per_number, "cuda"), input_width),
        state_bytes=state,
        state_traffic=2 * state,
    )


def _by_part(
    block: str,
    cell: str,
    count: int,
    bytes_per_number: int,
    *,
    parameters: Counter[str],
    flops: Mapping[str, float],
    step_flops: Mapping[str, float],
    kept: Mapping[str, float],
    state_bytes: int,
    state_traffic: int,
) -> list[Component]:
    """The parts of `count` equal blocks, given the numbers of one; the part `cell` has its state."""
    return [
        Component(
            block=block,
            name=name,
            parameters=count * parameters[name],
            flops=count * flops.get(name, 0.0),
            step_flops=count * step_flops.get(name, 0.0),
            state_bytes=count * state_bytes if name == cell else 0,
            state_traffic=count * state_traffic if name == cell else 0,
            kept_bytes=count * kept.get(name, 0.0),
            weight_bytes=count * bytes_per_number * parameters[name],
        )
        for name in dict.fromkeys([*flops, *parameters])
    ]


def parameters_by_part(block: nn.Module, cell: str) -> Counter[str]:
    """Number of parameters of each part of a block or layer.

    Args:
        block: The module; its parameters may be on the meta device.
        cell: Name of the part to which the mixer's own parameters belong.
    """
    counts: Counter[str] = Counter()
    for path, module in block.named_modules():
        kind = next((part for kinds, part in PART_OF_MODULE if isinstance(module, kinds)), cell)
        own = module.parts if isinstance(module, Mixer) else {}
        part = FEEDFORWARD if path.split(".")[0] == "feedforward" else kind
        for name, parameter in module.named_parameters(recurse=False):
            counts[own.get(name, part)] += parameter.numel()
    return counts
