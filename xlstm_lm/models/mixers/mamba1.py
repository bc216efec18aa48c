"""Mamba-1, the selective scan (arXiv 2312.00752)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Range, Size
from xlstm_lm.models.layers import CausalConv
from xlstm_lm.models.mixers.mamba_steps import StepLinear, init_step_bias, negative_decay
from xlstm_lm.models.mixers.mixer import PROJECTIONS, Mixer, MixerConfig, Observer, OperationUse, State
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.selective_scan import SCAN, selective_scan

# Backends of any machine: a run that names a GPU's kernel is also read where that cannot run.
SelectiveScanBackend = Literal["auto", "recurrence", "compiled", "mamba_ssm"]


@dataclass(kw_only=True)
class Mamba1Config(MixerConfig):
    """Settings of Mamba-1."""

    kind: Literal["mamba1"] = "mamba1"
    """Kind of mixer."""
    expand: Annotated[int, Range(1, 1024)] = 2
    """Inner width over the model width."""
    state_dim: Annotated[int, Range(1, 2**16)] = 16
    """State units for each inner unit."""
    step_rank: Size | None = None
    """Rank of the step sizes' projection; null for a sixteenth of the model width."""
    conv_width: Size = 4
    """Width of the causal convolution, in tokens."""
    scan_backend: SelectiveScanBackend = "auto"
    """Backend of the selective scan."""

    @property
    def inner_dim(self) -> int:
        """Width between the projections."""
        return self.embedding_dim * self.expand

    @property
    def rank(self) -> int:
        """Rank of the step sizes' projection."""
        return self.step_rank or math.ceil(self.embedding_dim / 16)

    def papers(self) -> list[str]:
        return ["2312.00752"]

    def build(self) -> Mamba1Mixer:
        return Mamba1Mixer(self)

    @property
    def projection_weights(self) -> int:
        """Input, two halves, and output; step, B and C; the step sizes' second factor."""
        return self.inner_dim * (3 * self.embedding_dim + 2 * self.rank + 2 * self.state_dim)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, both halves, the convolution before and after its activation, steps before and after theirs in
        float32, the scan's output, and the gate's product."""
        a, D, E = storage.itemsize, self.embedding_dim, self.inner_dim
        scan, conv = (use.kept(context_length, storage) for use in self.operations(1))
        return {
            PROJECTIONS: a * (D + 2 * E + E + self.rank + 2 * self.state_dim + E),
            CONV.name: a * E + conv,
            SCAN.name: 2 * FLOAT32 * E + 2 * a * E + scan,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Float32 states and the convolution's last inputs."""
        return self.inner_dim * (4 * self.state_dim + bytes_per_activation * (self.conv_width - 1))

    def operations(self, micro_rows: int) -> list[OperationUse]:
        scan = OperationUse(SCAN, {"N": self.state_dim}, backend=self.scan_backend, counted={"E": self.inner_dim})
        return [scan, OperationUse(CONV, {"D": self.inner_dim, "W": self.conv_width})]


class Mamba1Mixer(Mixer):
    """Mamba-1. The state holds the convolution's last inputs and (B, E, N)."""

    no_decay = frozenset({"log_decay"})

    def __init__(self, config: Mamba1Config) -> None:
        super().__init__()
        self.config = config
        inner = config.inner_dim
        self.widths = (config.rank, config.state_dim, config.state_dim)
        self.input = nn.Linear(config.embedding_dim, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.conv_width)
        self.selection = nn.Linear(inner, sum(self.widths), bias=False)
        self.step = StepLinear(config.rank, inner)
        self.log_decay = nn.Parameter(torch.empty(inner, config.state_dim))
        self.skip = nn.Parameter(torch.empty(inner))
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
        x_BTE, gate_BTE = self.input(x_BTD).chunk(2, dim=-1)
        x_BTE, conv_state = self.conv(x_BTE, context, state and state[0], return_state)
        x_BTE = F.silu(x_BTE)
        step_BTR, b_BTN, c_BTN = self.selection(x_BTE).split(self.widths, dim=-1)
        dt_BTE, a_EN = F.softplus(self.step(step_BTR)), negative_decay(self.log_decay)
        before_BEN, backend = state[1] if state else None, self.config.scan_backend
        if self.divided_rows is not None:
            before_BEN = self.divided_rows.scan_state_before(x_BTE, dt_BTE, a_EN, b_BTN, context, backend, before_BEN)
        y_BTE, cell_state = selective_scan(
            x_BTE,
            dt_BTE,
            a_EN,
            b_BTN,
            c_BTN,
            resets=context,
            initial_state=before_BEN,
            return_state=return_state,
            backend=backend,
        )
        y_BTE = (y_BTE + self.skip * x_BTE) * F.silu(gate_BTE)
        return self.out(y_BTE), None if cell_state is None else (conv_state, cell_state)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Published start: decays of 1 to the number of states; torch's own start for the projections, the one back to
        the residual stream smaller with depth."""
        rank, states = self.config.rank, self.config.state_dim
        yield self.input.weight
        self.input.reset_parameters()
        yield self.out.weight
        self.out.reset_parameters()
        self.out.weight /= depth**0.5
        yield from self.conv.initialize_in_turn()
        yield self.skip
        nn.init.ones_(self.skip)
        yield self.selection.weight
        self.selection.reset_parameters()
        yield self.step.weight
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        yield self.log_decay
        self.log_decay.copy_(torch.arange(1, states + 1).to(self.log_decay).log())
        yield self.step.bias
        init_step_bias(self.step.bias)
