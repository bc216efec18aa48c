"""Gated DeltaNet: a linear attention that erases what a key held before it writes (arXiv 2412.06464)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, Factor, Size
from xlstm_lm.models.layers import CausalConv, Float32Linear, HeadNorm
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    PROJECTIONS,
    FeedForwardConfig,
    Mixer,
    MixerConfig,
    Observer,
    OperationUse,
    State,
    check_heads,
    head_norm_kept,
    residual_std,
    silu_feedforward,
    small_std,
)
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.backend import COUNTED_CHUNK
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.gated_delta import GATED_DELTA, gated_delta

SMALLEST_STEP, LARGEST_STEP, LARGEST_DECAY = 1e-3, 1e-1, 16.0  # at the start, as published
GatedDeltaBackend = Literal["auto", "recurrence", "chunkwise", "compiled", "fla"]


@dataclass(kw_only=True)
class GatedDeltaConfig(MixerConfig):
    """Settings of Gated DeltaNet."""

    kind: Literal["gated_delta"] = "gated_delta"
    """Kind of mixer."""
    num_heads: Size
    """Heads of the cell."""
    delta_key_factor: Factor = 0.75
    """Width of queries and keys over the model width."""
    delta_value_factor: Factor = 1.5
    """Width of values over the model width."""
    feedforward_factor: Factor = 2.667
    """Feed-forward width over the model width, rounded up to a multiple of 64."""
    feedforward_dim: Size | None = None
    """Feed-forward width; null for the factor's."""
    conv_width: Size = 4
    """Width of the causal convolution, in tokens."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norm of each head."""
    chunk_length: Size | None = None
    """Chunk length, in tokens; null for the backend's choice."""
    delta_backend: GatedDeltaBackend = "auto"
    """Backend of the cell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, "query and key width embedding_dim * delta_key_factor", self.qk_dim)
        check_heads(self.num_heads, "value width embedding_dim * delta_value_factor", self.v_dim)

    @property
    def qk_dim(self) -> int:
        """Width of the queries of all heads."""
        return round(self.embedding_dim * self.delta_key_factor)

    @property
    def v_dim(self) -> int:
        """Width of the values of all heads."""
        return round(self.embedding_dim * self.delta_value_factor)

    @property
    def convolved_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.qk_dim + self.v_dim

    def papers(self) -> list[str]:
        return ["2412.06464"]

    def build(self) -> GatedDeltaMixer:
        return GatedDeltaMixer(self)

    @property
    def projection_weights(self) -> int:
        """Queries, keys, values, output gate, the cell's two gates and the output."""
        return self.embedding_dim * (self.convolved_dim + 2 * self.v_dim + 2 * self.num_heads)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, in float32 once more for the gates; q, k, v before, in and behind the convolution, q and k
        normalized; h, norm, output gate before and behind its activation, and the product."""
        a, D, C, V = storage.itemsize, self.embedding_dim, self.convolved_dim, self.v_dim
        cell, conv = (use.kept(context_length, storage) for use in self.operations(1))
        return {
            PROJECTIONS: a * D + storage.copied * D + a * (C + V + V),
            CONV.name: a * C + conv,
            GATED_DELTA.name: a * (C + 2 * self.qk_dim + V) + 5 * FLOAT32 * self.num_heads + cell,
            NORMS: head_norm_kept(storage, "rms", self.num_heads, V) + 2 * a * V,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """A float32 matrix a head, and the convolution's last inputs."""
        cell = 4 * self.qk_dim * self.v_dim // self.num_heads
        return cell + bytes_per_activation * (self.conv_width - 1) * self.convolved_dim

    def operations(self, micro_rows: int) -> list[OperationUse]:
        K, V = self.qk_dim // self.num_heads, self.v_dim // self.num_heads
        counted = {"H": self.num_heads, "L": self.chunk_length or COUNTED_CHUNK}
        cell = OperationUse(GATED_DELTA, {"K": K, "V": V}, backend=self.delta_backend, counted=counted)
        return [cell, OperationUse(CONV, {"D": self.convolved_dim, "W": self.conv_width})]

    def feedforward(self) -> FeedForwardConfig:
        return silu_feedforward(self.feedforward_dim, self.embedding_dim * self.feedforward_factor)


class GatedDeltaMixer(Mixer):
    """Gated DeltaNet. The state holds the convolution's last inputs, then the cell's matrices (B, H, K, V)."""

    def __init__(self, config: GatedDeltaConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = (config.qk_dim, config.qk_dim, config.v_dim)
        self.qkv = nn.Linear(config.embedding_dim, config.convolved_dim, bias=False)
        self.conv = CausalConv(config.convolved_dim, config.conv_width)
        # Write strengths, then decays: both in float32, because 16 bits would round the decays of a long memory to 1.
        self.gates = Float32Linear(config.embedding_dim, 2 * config.num_heads)
        self.log_decay = nn.Parameter(torch.empty(config.num_heads))
        self.output_gate = nn.Linear(config.embedding_dim, config.v_dim, bias=False)
        self.head_norm = HeadNorm(config.num_heads, config.v_dim // config.num_heads, "rms", config.norm_eps)
        self.out = nn.Linear(config.v_dim, config.embedding_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        context: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        del observe, overwrite_state
        convolved_BTE, conv_state = self.conv(self.qkv(x_BTD), context, state and state[0], return_state)
        heads = (x.unflatten(-1, (self.config.num_heads, -1)) for x in F.silu(convolved_BTE).split(self.widths, -1))
        q_BTHK, k_BTHK, v_BTHV = heads
        beta_BTH, step_BTH = self.gates(x_BTD).chunk(2, dim=-1)
        q_BTHK, k_BTHK = (F.normalize(each, dim=-1, eps=1e-6) for each in (q_BTHK, k_BTHK))
        log_decay_BTH = -self.log_decay.to(step_BTH.dtype).exp() * F.softplus(step_BTH)
        beta_BTH = beta_BTH.sigmoid()
        before_BHKV = state[1] if state else None
        chunk_length, backend = self.config.chunk_length, self.config.delta_backend
        if self.divided_rows is not None:
            before_BHKV = self.divided_rows.delta_state_before(
                k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, context, chunk_length, backend, before_BHKV
            )
        result = gated_delta(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_BTH,
            beta_BTH,
            resets=context,
            initial_state=before_BHKV,
            return_state=return_state,
            chunk_length=chunk_length,
            backend=backend,
        )
        h_BTHV, C_BHKV = result if isinstance(result, tuple) else (result, None)
        y_BTD = self.out(self.head_norm(h_BTHV) * F.silu(self.output_gate(x_BTD)))
        return y_BTD, None if C_BHKV is None else (conv_state, C_BHKV)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Small projections; decays of rates up to 16 and steps between 0.001 and 0.1, as in Mamba-2."""
        width, heads = self.config.embedding_dim, self.config.num_heads
        for projection in (self.qkv, self.output_gate, self.gates):
            yield projection.weight
            nn.init.normal_(projection.weight, std=small_std(width))
        yield self.out.weight
        nn.init.normal_(self.out.weight, std=residual_std(width, depth))
        yield self.head_norm.weight
        nn.init.ones_(self.head_norm.weight)
        yield from self.conv.initialize_in_turn()
        yield self.gates.bias
        nn.init.zeros_(self.gates.bias)
        step = torch.empty(heads).uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP)).exp()
        self.gates.bias[heads:] = step + torch.log(-torch.expm1(-step))  # softplus of this is the step
        yield self.log_decay
        self.log_decay.uniform_(1e-3, LARGEST_DECAY).log_()
