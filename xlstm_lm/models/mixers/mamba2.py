"""Mamba-2, state space duality (arXiv 2405.21060)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, Range, Size
from xlstm_lm.models.layers import CausalConv
from xlstm_lm.models.mixers.mamba_steps import init_step_bias, negative_decay, positive_steps
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    PROJECTIONS,
    Mixer,
    MixerConfig,
    Observer,
    OperationUse,
    State,
)
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.backend import COUNTED_CHUNK
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.ssd import SSD, ssd

# Backends of any machine: a run that names a GPU's kernel is also read where that cannot run.
SSDBackend = Literal["auto", "recurrence", "mlstm", "chunkwise", "mamba_ssm"]


@dataclass(kw_only=True)
class Mamba2Config(MixerConfig):
    """Settings of Mamba-2."""

    kind: Literal["mamba2"] = "mamba2"
    """Kind of mixer."""
    expand: Annotated[int, Range(1, 1024)] = 2
    """Inner width over the model width."""
    state_dim: Annotated[int, Range(1, 2**16)] = 128
    """State units for each inner unit."""
    head_dim: Size = 64
    """Inner units that share a decay."""
    num_groups: Size = 1
    """Groups of heads that share B and C."""
    conv_width: Size = 4
    """Width of the causal convolution, in tokens."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the norm behind the cell."""
    scan_backend: SSDBackend = "auto"
    """Backend of the scan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_dim % self.head_dim or self.num_heads % self.num_groups:
            raise ValueError(
                f"head_dim {self.head_dim} and num_groups {self.num_groups} do not divide the inner width "
                f"embedding_dim * expand = {self.inner_dim} into whole heads and groups; choose divisors of it."
            )

    @property
    def inner_dim(self) -> int:
        """Width between the projections."""
        return self.embedding_dim * self.expand

    @property
    def num_heads(self) -> int:
        """Heads of the cell."""
        return self.inner_dim // self.head_dim

    @property
    def convolved_dim(self) -> int:
        """Width of the convolution: the inner units, B and C."""
        return self.inner_dim + 2 * self.num_groups * self.state_dim

    def papers(self) -> list[str]:
        return ["2405.21060"]

    def build(self) -> Mamba2Mixer:
        return Mamba2Mixer(self)

    @property
    def projection_weights(self) -> int:
        """Input with gate, B, C and steps, and the output."""
        return self.embedding_dim * (2 * self.inner_dim + self.convolved_dim + self.num_heads)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input and all that it is projected to, the convolution before and after its activation, keys scaled for
        the cell, its output with and without the skip, the gate, and the norm with its product."""
        a, D, E = storage.itemsize, self.embedding_dim, self.inner_dim
        scan, conv = (use.kept(context_length, storage) for use in self.operations(1))
        return {
            PROJECTIONS: a * (D + E + self.convolved_dim + self.num_heads + E),
            CONV.name: a * self.convolved_dim + conv,
            SSD.name: a * (self.convolved_dim + self.num_groups * self.state_dim + 2 * E) + scan,
            NORMS: a * 2 * E + storage.at_least_float32 * E,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Float32 states and the convolution's last inputs."""
        remembered = bytes_per_activation * (self.conv_width - 1) * self.convolved_dim
        return 4 * self.inner_dim * self.state_dim + remembered

    def operations(self, micro_rows: int) -> list[OperationUse]:
        sizes = {"P": self.head_dim, "N": self.state_dim}
        counted = {"H": self.num_heads, "G": self.num_groups, "L": COUNTED_CHUNK}
        scan = OperationUse(SSD, sizes, backend=self.scan_backend, counted=counted)
        return [scan, OperationUse(CONV, {"D": self.convolved_dim, "W": self.conv_width})]


class Mamba2Mixer(Mixer):
    """Mamba-2. The state holds the convolution's last inputs and (B, H, N, P)."""

    parts = MappingProxyType({"norm_weight": NORMS})

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        inner, shared = config.inner_dim, config.num_groups * config.state_dim
        self.widths = (inner, config.convolved_dim, config.num_heads)
        self.inner_widths = (inner, shared, shared)
        self.input = nn.Linear(config.embedding_dim, sum(self.widths), bias=False)
        self.conv = CausalConv(config.convolved_dim, config.conv_width)
        self.step_bias = nn.Parameter(torch.empty(config.num_heads))
        self.log_decay = nn.Parameter(torch.empty(config.num_heads))
        self.skip = nn.Parameter(torch.empty(config.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, config.embedding_dim, bias=False)

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
        config = self.config
        gate_BTE, inner_BTF, step_BTH = self.input(x_BTD).split(self.widths, dim=-1)
        inner_BTF, conv_state = self.conv(inner_BTF, context, state and state[0], return_state)
        x_BTE, b_BTF, c_BTF = F.silu(inner_BTF).split(self.inner_widths, dim=-1)
        x_BTHP = x_BTE.unflatten(-1, (config.num_heads, config.head_dim))
        b_BTGN, c_BTGN = (each.unflatten(-1, (config.num_groups, config.state_dim)) for each in (b_BTF, c_BTF))
        dt_BTH, a_H = positive_steps(step_BTH, self.step_bias), negative_decay(self.log_decay)
        before_BHNP = state[1] if state else None
        if self.divided_rows is not None:
            before_BHNP = self.divided_rows.ssd_state_before(x_BTHP, dt_BTH, a_H, b_BTGN, context, before_BHNP)
        y_BTHP, cell_state = ssd(
            x_BTHP,
            dt_BTH,
            a_H,
            b_BTGN,
            c_BTGN,
            resets=context,
            initial_state=before_BHNP,
            return_state=return_state,
            backend=config.scan_backend,
        )
        y_BTE = (y_BTHP + self.skip[:, None] * x_BTHP).flatten(2) * F.silu(gate_BTE)
        groups = y_BTE.unflatten(-1, (config.num_groups, -1))
        y_BTE = F.rms_norm(groups, groups.shape[-1:], eps=config.norm_eps).flatten(2) * self.norm_weight
        return self.out(y_BTE), None if cell_state is None else (conv_state, cell_state)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Published start: decays between 1 and 16; torch's own start for the projections, the one back to the residual
        stream smaller with depth."""
        yield self.input.weight
        self.input.reset_parameters()
        yield self.out.weight
        self.out.reset_parameters()
        self.out.weight /= depth**0.5
        yield from self.conv.initialize_in_turn()
        yield self.skip
        nn.init.ones_(self.skip)
        yield self.norm_weight
        nn.init.ones_(self.norm_weight)
        yield self.log_decay
        self.log_decay.uniform_(1, 16).log_()
        yield self.step_bias
        init_step_bias(self.step_bias)
