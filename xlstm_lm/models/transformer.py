"""The transformer baseline: Llama's blocks (arXiv 2302.13971), with rotary positions that restart with a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, Factor, Range, Size, VocabSize, check_fields
from xlstm_lm.models.language_model import LanguageModel, State
from xlstm_lm.models.layers import GatedFeedForward, NumBlocks, SoftCap, make_norm, round_up
from xlstm_lm.ops.attention import Packing, attention, pack


@dataclass(kw_only=True)
class TransformerConfig:
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
    norm_eps: Epsilon = 1e-6
    """Epsilon of all norms."""
    logit_soft_cap: SoftCap | None = None
    """Soft cap of the logits; null for none."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.embedding_dim % 2:
            raise ValueError(f"embedding_dim is {self.embedding_dim}; rotary positions need an even width.")
        if self.embedding_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads {self.num_heads} does not give heads of an even width to embedding_dim "
                f"{self.embedding_dim}; choose a divisor of {self.embedding_dim // 2}."
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_heads {self.num_heads}; choose "
                "a divisor of it, or null."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embedding_dim // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward."""
        return self.feedforward_dim or round_up(int(self.embedding_dim * self.feedforward_factor), 64)


class Context(NamedTuple):
    """What every block is told of the rows."""

    packing: Packing
    cosine_BT1K: Tensor
    sine_BT1K: Tensor
    seen_BS: Tensor
    """Which keys of earlier calls are still seen after the last token."""
    position_B: Tensor
    """The next token's position in its document."""


class Attention(nn.Module):
    """Causal attention with rotary positions (arXiv 2104.09864): (B, T, D) -> (B, T, D).

    The state holds keys, values, which of them are still seen, and the next token's position.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        self.qkv = nn.Linear(config.embedding_dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)

    def forward(
        self, x_BTD: Tensor, context: Context, state: State | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        q, k = (rotate(x, context.cosine_BT1K, context.sine_BT1K) for x in (q, k))
        if state is not None:
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        out_BTD = self.out(attention(q, k, v, context.packing).flatten(2))
        return out_BTD, (k, v, context.seen_BS, context.position_B) if return_state else None


class Block(nn.Module):
    """Pre-norm residual block: attention, then a gated feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = make_norm("rms", config.embedding_dim, config.norm_eps)
        self.mixer = Attention(config)
        self.feedforward_norm = make_norm("rms", config.embedding_dim, config.norm_eps)
        self.feedforward = GatedFeedForward(config.embedding_dim, config.hidden_dim, F.silu)

    def forward(
        self, x_BTD: Tensor, context: Context, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        mixed_BTD, state = self.mixer(self.norm(x_BTD), context, state, return_state)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD)), state


class Transformer(LanguageModel):
    """A stack of attention blocks."""

    def __init__(self, config: TransformerConfig) -> None:
        blocks = (Block(config) for _ in range(config.num_blocks))
        final_norm = make_norm("rms", config.embedding_dim, config.norm_eps)
        super().__init__(config, blocks, final_norm, config.embedding_dim)

    def make_context(self, tokens_BT: Tensor, resets_BT: Tensor | None, state: list[State] | None) -> Context:
        """Positions, counted from the start of each document, and which keys each token sees."""
        B, T = tokens_BT.shape
        device = tokens_BT.device
        seen_BS = torch.ones(B, 0, dtype=torch.bool, device=device)
        position_BT = torch.arange(T, device=device).expand(B, T)
        own_BT = torch.ones(B, T, dtype=torch.bool, device=device)
        before_B = torch.zeros(B, dtype=torch.int64, device=device)
        if state is not None:
            _, _, seen_BS, before_B = state[0]
        packing = pack(B, T, device, resets_BT, seen_BS)
        if resets_BT is not None:
            resets_BT = resets_BT.to(device, non_blocking=True)
            start_BT = torch.where(resets_BT, position_BT, -1).cummax(dim=1).values
            position_BT = torch.where(start_BT >= 0, position_BT - start_BT, position_BT + before_B[:, None])
            own_BT = start_BT == start_BT[:, -1:]
            seen_BS = seen_BS & ~resets_BT.any(1, keepdim=True)
        else:
            position_BT = position_BT + before_B[:, None]
        angle_BT1K = position_BT[:, :, None, None] * self._frequencies(device)
        dtype = self.embedding.weight.dtype
        return Context(
            packing,
            angle_BT1K.cos().to(dtype),
            angle_BT1K.sin().to(dtype),
            torch.cat((seen_BS, own_BT), dim=1),
            position_BT[:, -1] + 1,
        )

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians a step of each pair of units, twice over: (K,), float32 (float64 for such a model)."""
        K = self.config.head_dim
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        exponent = torch.arange(0, K, 2, device=device, dtype=dtype) / K
        return (self.config.rope_theta**-exponent).repeat(2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the xLSTM of its size, so that neither has an advantage: N(0, 2 / 5D), and what leads back to the
        residual stream smaller with depth."""
        width, depth = self.config.embedding_dim, len(self.blocks)
        small, scaled_by_depth = (2 / (5 * width)) ** 0.5, 2 / (depth * width**0.5)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                leads_back = name.endswith(("mixer.out.weight", "feedforward.down.weight"))
                nn.init.normal_(parameter, std=scaled_by_depth if leads_back else small)


def rotate(x_BTHK: Tensor, cosine_BT1K: Tensor, sine_BT1K: Tensor) -> Tensor:
    """Turn unit j and unit j + K / 2 of each head as a pair, by the angles of their positions."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cosine_BT1K + torch.cat((-second, first), dim=-1) * sine_BT1K
