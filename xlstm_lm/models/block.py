"""Residual blocks, and what a family's configuration derives from the blocks that it describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.models.layers import GatedFeedForward, NormKind, make_norm
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    FeedForwardConfig,
    MixerConfig,
    OperationUse,
    State,
    residual_std,
    small_std,
)
from xlstm_lm.models.storage import Storage

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


FEEDFORWARD = "feed-forward"
"""Part of a block in the accounting."""


class BlockConfig(NamedTuple):
    """A residual block."""

    mixer: MixerConfig
    norm: NormKind
    """Norm before the mixer and before the feed-forward."""
    norm_eps: float
    feedforward: FeedForwardConfig | None
    """None for a block that is a mixer alone."""
    dropout: float = 0.0
    """Share of units dropped in training, of what the mixer and the feed-forward add."""

    def flops_by_part(self, context_length: int, chunk_length: int | None = None) -> dict[str, float]:
        """FLOPs of the forward pass for one token, as in `MixerConfig.flops_by_part`, with the feed-forward's."""
        return self.mixer.flops_by_part(context_length, chunk_length) | self._feedforward_flops()

    def step_flops_by_part(self, context_length: int) -> dict[str, float]:
        """FLOPs of one more token after `context_length`, as in `MixerConfig.step_flops_by_part`."""
        return self.mixer.step_flops_by_part(context_length) | self._feedforward_flops()

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """Bytes that the block keeps for the backward pass for each token, as in `MixerConfig.kept_by_part`, with its
        norms and the feed-forward: its input, gate and up, the activated gate, and the product; and what dropout
        multiplies by, on a GPU a byte."""
        found, width = self.mixer.kept_by_part(storage, context_length), self.mixer.embedding_dim
        norms = 2 if self.feedforward else 1
        found[NORMS] = found.get(NORMS, 0.0) + norms * storage.norm(self.norm, width)
        if self.dropout:
            found[NORMS] += norms * width * (storage.itemsize if storage.device == "cpu" else 1)
        if self.feedforward:
            found[FEEDFORWARD] = storage.itemsize * (width + 4.0 * self.feedforward.hidden)
        return found

    def _feedforward_flops(self) -> dict[str, float]:
        return {FEEDFORWARD: 6.0 * self.mixer.embedding_dim * self.feedforward.hidden} if self.feedforward else {}


class Block(nn.Module):
    """Pre-norm residual block: a mixer along time, then a gated feed-forward where it has one."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width = config.mixer.embedding_dim
        self.norm = make_norm(config.norm, width, config.norm_eps)
        self.mixer = config.mixer.build()
        self.feedforward = None
        if config.feedforward is not None:
            hidden, activation = config.feedforward
            self.feedforward_norm = make_norm(config.norm, width, config.norm_eps)
            self.feedforward = GatedFeedForward(width, hidden, ACTIVATIONS[activation])
        self.dropout = config.dropout
        self.context_key, self.has_gates = self.mixer.context_key, self.mixer.has_gates
        self.no_decay = {f"mixer.{name}" for name in self.mixer.no_decay}

    def make_context(self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None) -> Any:
        """The mixer's context."""
        return self.mixer.make_context(x_BTD, resets_BT, state)

    def forward(
        self, x_BTD: Tensor, context: Any, state: State | None = None, return_state: bool = False, **extras: Any
    ) -> tuple[Tensor, State | None]:
        """Tokens (B, T, D) and the mixer's state, as `Mixer.forward` describes its arguments."""
        mixed_BTD, state = self.mixer(self.norm(x_BTD), context, state, return_state, **extras)
        x_BTD = x_BTD + F.dropout(mixed_BTD, self.dropout, self.training)
        if self.feedforward is not None:
            x_BTD = x_BTD + F.dropout(self.feedforward(self.feedforward_norm(x_BTD)), self.dropout, self.training)
        return x_BTD, state

    def init_weights(self, index: int, depth: int) -> None:
        """Initialize every parameter, in block `index` from 0 of `depth`."""
        for _ in self.initialize_in_turn(index, depth):
            pass

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int, mixer_first: bool = False) -> Iterator[Tensor]:
        """Initialize every parameter; yields each right before its values are written.

        Args:
            index: Position of the block, from 0.
            depth: Number of blocks.
            mixer_first: Whether the mixer's weights are drawn before the feed-forward's.
        """
        yield self.norm.weight
        nn.init.ones_(self.norm.weight)
        if mixer_first:
            yield from self.mixer.initialize_in_turn(index, depth)
        if self.feedforward is not None:
            width = self.norm.weight.shape[0]
            yield self.feedforward_norm.weight
            nn.init.ones_(self.feedforward_norm.weight)
            yield self.feedforward.gate_up.weight
            nn.init.normal_(self.feedforward.gate_up.weight, std=small_std(width))
            yield self.feedforward.down.weight
            nn.init.normal_(self.feedforward.down.weight, std=residual_std(width, depth))
        if not mixer_first:
            yield from self.mixer.initialize_in_turn(index, depth)


def make_contexts(
    blocks: Iterable[Any], x_BTD: Tensor, resets_BT: Tensor | None, states: Sequence[State | None]
) -> list[Any]:
    """The context of each block; blocks with the same `context_key` share one, which is computed once."""
    contexts: dict[Any, Any] = {}
    keys = []
    for block, state in zip(blocks, states, strict=True):
        keys.append(block.context_key)
        if block.context_key not in contexts:
            contexts[block.context_key] = block.make_context(x_BTD, resets_BT, state)
    return [contexts[key] for key in keys]


class BlockStack:
    """Base of the configurations of models that are a stack of residual blocks.

    A subclass is a dataclass with `vocab_size`, `embedding_dim`, `num_blocks`, `norm_eps`, `dropout`, `logit_soft_cap`
    and `tie_embeddings`, and answers `block_mixers`.
    """

    embedding_dim: int
    dropout: float
    norm_eps: float
    norm: ClassVar[NormKind] = "rms"
    drawn_in_order: ClassVar[bool] = False
    """Whether initial weights are drawn from the first layer to the last. Otherwise the head follows the embedding,
    and a block's feed-forward precedes its mixer. Weights of a seed depend on it, so it never changes."""

    def block_mixers(self) -> Sequence[MixerConfig]:
        """The mixer of every block, first to last."""
        raise NotImplementedError

    def mixer_settings(self, mixer: type[MixerConfig]) -> dict[str, Any]:
        """Values of the fields that a mixer's configuration has in common with this one, by name."""
        own = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]  # each subclass is a dataclass
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(mixer) if field.name in own}

    def blocks(self) -> list[BlockConfig]:
        """Every block, first to last."""
        return [
            BlockConfig(each, self.norm, self.norm_eps, each.feedforward(), self.dropout)
            for each in self.block_mixers()
        ]

    def build_blocks(self) -> Iterator[nn.Module]:
        """Modules of the blocks."""
        return map(Block, self.blocks())

    def build_final_norm(self) -> nn.Module:
        """Module behind the last block."""
        return make_norm(self.norm, self.embedding_dim, self.norm_eps)

    @property
    def head_width(self) -> int:
        """Width of the hidden states that the head sees."""
        return self.embedding_dim

    @property
    def embedding_std(self) -> float:
        """Standard deviation of embedding and head at the start."""
        return small_std(self.embedding_dim)

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Bytes of one sequence's state after `context_length` tokens."""
        return sum(mixer.state_bytes(bytes_per_activation, context_length) for mixer in self.block_mixers())

    def operations(self, micro_rows: int) -> list[OperationUse]:
        """Operations that a forward pass over `micro_rows` rows calls, each with other sizes or settings once."""
        uses: list[OperationUse] = []
        for mixer in self.block_mixers():
            uses += [use for use in mixer.operations(micro_rows) if use not in uses]
        return uses
