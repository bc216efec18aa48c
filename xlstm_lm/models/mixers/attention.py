"""Causal attention with rotary positions that restart with a document, as in Llama (arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from xlstm_lm.base.fields import Factor, Range, Size
from xlstm_lm.models.mixers.mixer import (
    PROJECTIONS,
    FeedForwardConfig,
    Mixer,
    MixerConfig,
    Observer,
    OperationUse,
    State,
    residual_std,
    silu_feedforward,
    small_std,
)
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.attention import ATTENTION, Packing, attention, pack


@dataclass(kw_only=True)
class AttentionConfig(MixerConfig):
    """Settings of causal attention."""

    kind: Literal["attention"] = "attention"
    """Kind of mixer."""
    num_heads: Size
    """Attention heads."""
    num_key_value_heads: Size | None = None
    """Heads of keys and values, each shared by a group of queries; null for as many as num_heads."""
    rope_theta: Annotated[float, Range(0, 1e15, open_below=True)] = 10000.0
    """Base of the rotary positions' wavelengths."""
    window: Size | None = None
    """Tokens that each query sees back, itself included; null for all."""
    feedforward_factor: Factor
    """Feed-forward width over the model width, rounded down to a whole number, then up to a multiple of 64."""
    feedforward_dim: Size | None
    """Feed-forward width; null for the factor's."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def papers(self) -> list[str]:
        return ["2302.13971"]

    def build(self) -> AttentionMixer:
        return AttentionMixer(self)

    @property
    def projection_weights(self) -> int:
        """Queries, keys, values and the output."""
        return self.embedding_dim * (2 * self.embedding_dim + 2 * self.key_value_heads * self.head_dim)

    def step_flops_by_part(self, context_length: int) -> dict[str, float]:
        """Projections, and 4 K for each key that the one query of a head sees, itself included."""
        keys = min(self.window or context_length + 1, context_length + 1)
        return {PROJECTIONS: 2.0 * self.projection_weights, ATTENTION.name: 4.0 * self.embedding_dim * keys}

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, q, k and v as projected, q and k turned, and the output; on a CPU, where each document of a row is
        attended to by itself, the output twice. Masks of windows are not counted."""
        del context_length
        a, D, kv = storage.itemsize, self.embedding_dim, self.key_value_heads * self.head_dim
        outputs = 2 if storage.device == "cpu" else 1
        return {
            PROJECTIONS: a * D + a * D,
            ATTENTION.name: a * (D + 2 * kv) + a * (D + kv) + a * D * (outputs - 1) + FLOAT32 * self.num_heads,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Keys and values, of the last window - 1 tokens where there is a window."""
        tokens = min(self.window - 1, context_length) if self.window else context_length
        return 2 * self.key_value_heads * self.head_dim * bytes_per_activation * tokens

    def state_traffic(self, bytes_per_activation: int, context_length: int) -> int:
        """Keys and values, read once, and those of one token, written."""
        written = 2 * self.key_value_heads * self.head_dim * bytes_per_activation
        return self.state_bytes(bytes_per_activation, context_length) + written

    def operations(self, micro_rows: int) -> list[OperationUse]:
        kinds = ("long", "short") if self.window is None else ("narrow",)
        counted = {"H": self.num_heads, "K": self.head_dim, "G": self.key_value_heads}
        counted |= {"window": self.window} if self.window else {}
        return [OperationUse(ATTENTION, {}, rows, counted=counted) for rows in kinds]

    def feedforward(self) -> FeedForwardConfig:
        return silu_feedforward(self.feedforward_dim, int(self.embedding_dim * self.feedforward_factor))


class Context(NamedTuple):
    """Everything that attention derives from the rows."""

    packing: Packing
    cosine_BT1K: Tensor
    sine_BT1K: Tensor
    seen_BS: Tensor
    """Which keys, those of earlier calls included, are still seen after the last token."""
    position_B: Tensor
    """The next token's position in its document."""


class AttentionMixer(Mixer):
    """Causal attention. The state holds keys, values, which of them are still seen, and the next token's position."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        self.qkv = nn.Linear(config.embedding_dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)
        self.context_key = ("attention", config.head_dim, config.rope_theta, config.window)

    def make_context(self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None) -> Context:
        """Positions, counted from the start of each document, and which keys each token sees."""
        B, T, _ = x_BTD.shape
        device = x_BTD.device
        seen_BS = torch.ones(B, 0, dtype=torch.bool, device=device)
        position_BT = torch.arange(T, device=device).expand(B, T)
        own_BT = torch.ones(B, T, dtype=torch.bool, device=device)
        before_B = torch.zeros(B, dtype=torch.int64, device=device)
        if self.divided_rows is not None:
            assert state is None, "attention carries no state from row to row"
            seen_BS, before_B = self.divided_rows.documents_before(B, T, resets_BT, device)
        elif state is not None:
            _, _, seen_BS, before_B = state
        packing = pack(B, T, device, resets_BT, seen_BS, self.config.window)
        if resets_BT is not None:
            resets_BT = resets_BT.to(device, non_blocking=True)
            start_BT = torch.where(resets_BT, position_BT, -1).cummax(dim=1).values
            position_BT = torch.where(start_BT >= 0, position_BT - start_BT, position_BT + before_B[:, None])
            own_BT = start_BT == start_BT[:, -1:]
            seen_BS = seen_BS & ~resets_BT.any(1, keepdim=True)
        else:
            position_BT = position_BT + before_B[:, None]
        angle_BT1K = position_BT[:, :, None, None] * self._frequencies(x_BTD)
        return Context(
            packing,
            angle_BT1K.cos().to(x_BTD.dtype),
            angle_BT1K.sin().to(x_BTD.dtype),
            self._within_reach(torch.cat((seen_BS, own_BT), dim=1)),
            position_BT[:, -1] + 1,
        )

    def _frequencies(self, x_BTD: Tensor) -> Tensor:
        """Radians a step of each pair of units, twice over: (K,), float32 (float64 for such a model)."""
        K = self.config.head_dim
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        exponent = torch.arange(0, K, 2, device=x_BTD.device, dtype=dtype) / K
        return (self.config.rope_theta**-exponent).repeat(2)

    def forward(
        self,
        x_BTD: Tensor,
        context: Context,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        del observe, overwrite_state
        q, k, v = self.qkv(x_BTD).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        q, k = (rotate(x, context.cosine_BT1K, context.sine_BT1K) for x in (q, k))
        if self.divided_rows is not None:
            state = self.divided_rows.keys_before(torch.cat((k, v), dim=2)).chunk(2, dim=2)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        out_BTD = self.out(attention(q, k, v, context.packing).flatten(2))
        if not return_state:
            return out_BTD, None
        return out_BTD, (self._within_reach(k), self._within_reach(v), context.seen_BS, context.position_B)

    def _within_reach(self, x_BS: Tensor) -> Tensor:
        """The part of earlier tokens (B, S, ...) that the next one can see."""
        window = self.config.window
        if window is None or x_BS.shape[1] < window:
            return x_BS
        return x_BS[:, x_BS.shape[1] - window + 1 :].clone()  # a view would keep all tokens in memory

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Weights as small as those of an xLSTM of this size: neither has an advantage."""
        yield self.qkv.weight
        nn.init.normal_(self.qkv.weight, std=small_std(self.config.embedding_dim))
        yield self.out.weight
        nn.init.normal_(self.out.weight, std=residual_std(self.config.embedding_dim, depth))


def rotate(x_BTHK: Tensor, cosine_BT1K: Tensor, sine_BT1K: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): units j and j + K / 2 of each head turn as a pair by their angle."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cosine_BT1K + torch.cat((-second, first), dim=-1) * sine_BT1K
