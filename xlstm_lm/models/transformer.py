"""The transformer baseline: Llama's blocks (arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from xlstm_lm.base.fields import Epsilon, Factor, Range, Share, Size, VocabSize, check_fields
from xlstm_lm.models.block import BlockStack
from xlstm_lm.models.layers import NumBlocks, SoftCap
from xlstm_lm.models.mixers.attention import AttentionConfig


@dataclass(kw_only=True)
class TransformerConfig(BlockStack):
    """A Llama-style transformer."""

    family: Literal["transformer"] = "transformer"
    """Model family."""
    vocab_size: VocabSize = 50304
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    embedding_dim: Size = 768
    """Model width."""
    num_blocks: NumBlocks = 12
    """Number of residual blocks."""
    num_heads: Size = 12
    """Attention heads."""
    num_key_value_heads: Size | None = None
    """Heads of keys and values, each shared by a group of queries; null for as many as num_heads."""
    feedforward_factor: Factor = 2.667
    """Feed-forward width over the model width, rounded down to a whole number, then up to a multiple of 64."""
    feedforward_dim: Size | None = None
    """Feed-forward width where it does not follow from the factor."""
    rope_theta: Annotated[float, Range(0, 1e15, open_below=True)] = 10000.0
    """Base of the rotary positions' wavelengths."""
    window: Size | None = None
    """Tokens that each query sees back, itself included; null for all."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of all norms."""
    logit_soft_cap: SoftCap | None = None
    """Soft cap of the logits; null for none."""
    dropout: Share = 0.0
    """Share of units dropped in training, of the embedding and of what each mixer and feed-forward adds."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""

    drawn_in_order = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.block_mixers()

    @property
    def mixer(self) -> AttentionConfig:
        """Attention of every block."""
        return AttentionConfig(**self.mixer_settings(AttentionConfig))

    def block_mixers(self) -> Sequence[AttentionConfig]:
        return [self.mixer] * self.num_blocks
