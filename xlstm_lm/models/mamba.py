"""The Mamba baselines: Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060), restarted where a document starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, NonNegative, Range, Size, VocabSize, check_fields
from xlstm_lm.models.language_model import LanguageModel, State
from xlstm_lm.models.layers import CausalConv, NumBlocks, SoftCap, make_norm
from xlstm_lm.ops.selective_scan import selective_scan
from xlstm_lm.ops.ssd import ssd

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4  # of dt at the start, as published
# All that there are on any machine: a run that names a GPU's kernel is also read where that cannot run.
SelectiveScanBackend = Literal["auto", "recurrence", "compiled", "mamba_ssm"]
SSDBackend = Literal["auto", "recurrence", "mlstm", "chunkwise", "mamba_ssm"]
ScanBackend = Literal[SelectiveScanBackend, SSDBackend]


@dataclass(kw_only=True)
class MambaConfig:
    """A Mamba language model."""

    family: Literal["mamba"] = "mamba"
    """Model family."""
    version: Literal[1, 2] = 2
    """Mamba-1 (selective scan) or Mamba-2 (SSD)."""
    vocab_size: VocabSize = 50304
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    embedding_dim: Size = 768
    """Model width."""
    num_blocks: NumBlocks = 24
    """Number of residual blocks."""
    expand: Annotated[int, Range(1, 1024)] = 2
    """Inner width over the model width."""
    state_dim: Annotated[int, Range(1, 2**16)] | None = None
    """State units for each inner unit; null for 16 (Mamba-1) or 128 (Mamba-2)."""
    head_dim: Size = 64
    """Inner units that share a decay, in Mamba-2."""
    num_groups: Size = 1
    """Groups of heads that share B and C, in Mamba-2."""
    step_rank: Size | None = None
    """Rank of the step sizes' projection, in Mamba-1; null for a sixteenth of the model width."""
    conv_width: Size = 4
    """Width of the causal convolution."""
    initializer_range: NonNegative = 0.02
    """Standard deviation of embedding and head at the start."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of all norms."""
    logit_soft_cap: SoftCap | None = None
    """Soft cap of the logits; null for none."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    scan_backend: ScanBackend = "auto"
    """Kernel of the selective scan (Mamba-1) or of SSD (Mamba-2)."""

    def __post_init__(self) -> None:
        check_fields(self)
        backends = get_args(SelectiveScanBackend if self.version == 1 else SSDBackend)
        if self.scan_backend not in backends:
            raise ValueError(
                f"scan_backend is {self.scan_backend!r}; for version {self.version} it must be one of "
                f"{', '.join(backends)}."
            )
        if self.version == 2 and (self.inner_dim % self.head_dim or self.num_heads % self.num_groups):
            raise ValueError(
                f"head_dim {self.head_dim} and num_groups {self.num_groups} do not divide the inner width "
                f"embedding_dim * expand = {self.inner_dim} into whole heads and groups; choose divisors of it."
            )

    @property
    def inner_dim(self) -> int:
        """Width between the projections of a block."""
        return self.embedding_dim * self.expand

    @property
    def num_heads(self) -> int:
        """Heads of Mamba-2."""
        return self.inner_dim // self.head_dim

    @property
    def states(self) -> int:
        """State units for each inner unit."""
        return self.state_dim or (16 if self.version == 1 else 128)

    @property
    def rank(self) -> int:
        """Rank of Mamba-1's step sizes."""
        return self.step_rank or math.ceil(self.embedding_dim / 16)


class Mamba2Mixer(nn.Module):
    """Mamba-2: (B, T, D) -> (B, T, D). The state holds the convolution's last inputs and (B, H, N, P)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        inner, shared = config.inner_dim, config.num_groups * config.states
        self.widths = (inner, inner + 2 * shared, config.num_heads)
        self.inner_widths = (inner, shared, shared)
        self.input = nn.Linear(config.embedding_dim, sum(self.widths), bias=False)
        self.conv = CausalConv(inner + 2 * shared, config.conv_width)
        self.step_bias = nn.Parameter(torch.empty(config.num_heads))
        self.log_decay = nn.Parameter(torch.empty(config.num_heads))
        self.skip = nn.Parameter(torch.empty(config.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, config.embedding_dim, bias=False)

    def forward(
        self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        config = self.config
        gate_BTE, inner_BTF, step_BTH = self.input(x_BTD).split(self.widths, dim=-1)
        inner_BTF, conv_state = self.conv(inner_BTF, resets_BT, state and state[0], return_state)
        x_BTE, b_BTF, c_BTF = F.silu(inner_BTF).split(self.inner_widths, dim=-1)
        x_BTHP = x_BTE.unflatten(-1, (config.num_heads, config.head_dim))
        b_BTGN, c_BTGN = (each.unflatten(-1, (config.num_groups, config.states)) for each in (b_BTF, c_BTF))
        step_BTH, decay_H = _steps(step_BTH, self.step_bias), _decay(self.log_decay)
        y_BTHP, cell_state = ssd(
            x_BTHP,
            step_BTH,
            decay_H,
            b_BTGN,
            c_BTGN,
            resets=resets_BT,
            initial_state=state and state[1],
            return_state=return_state,
            backend=config.scan_backend,
        )
        y_BTE = (y_BTHP + self.skip[:, None] * x_BTHP).flatten(2) * F.silu(gate_BTE)
        groups = y_BTE.unflatten(-1, (config.num_groups, -1))
        y_BTE = F.rms_norm(groups, groups.shape[-1:], eps=config.norm_eps).flatten(2) * self.norm_weight
        return self.out(y_BTE), (conv_state, cell_state) if return_state else None


class Mamba1Mixer(nn.Module):
    """Mamba-1: (B, T, D) -> (B, T, D). The state holds the convolution's last inputs and (B, E, N)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, self.scan_backend = config.inner_dim, config.scan_backend
        self.widths = (config.rank, config.states, config.states)
        self.input = nn.Linear(config.embedding_dim, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.conv_width)
        self.selection = nn.Linear(inner, sum(self.widths), bias=False)
        self.step = nn.Linear(config.rank, inner)
        self.log_decay = nn.Parameter(torch.empty(inner, config.states))
        self.skip = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, config.embedding_dim, bias=False)

    def forward(
        self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        x_BTE, gate_BTE = self.input(x_BTD).chunk(2, dim=-1)
        x_BTE, conv_state = self.conv(x_BTE, resets_BT, state and state[0], return_state)
        x_BTE = F.silu(x_BTE)
        step_BTR, b_BTN, c_BTN = self.selection(x_BTE).split(self.widths, dim=-1)
        step_BTE = _steps(F.linear(step_BTR, self.step.weight), self.step.bias)
        y_BTE, cell_state = selective_scan(
            x_BTE,
            step_BTE,
            _decay(self.log_decay),
            b_BTN,
            c_BTN,
            resets=resets_BT,
            initial_state=state and state[1],
            return_state=return_state,
            backend=self.scan_backend,
        )
        y_BTE = (y_BTE + self.skip * x_BTE) * F.silu(gate_BTE)
        return self.out(y_BTE), (conv_state, cell_state) if return_state else None


def _steps(step: Tensor, bias: Tensor) -> Tensor:
    """dt, above 0, in float32 at least: in 16 bits small steps would be lost."""
    dtype = torch.promote_types(step.dtype, torch.float32)
    return F.softplus(step.to(dtype) + bias.to(dtype))


def _decay(log_decay: Tensor) -> Tensor:
    return -torch.exp(log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)))


class Block(nn.Module):
    """Pre-norm residual block; a mixer is all there is to it."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = make_norm("rms", config.embedding_dim, config.norm_eps)
        self.mixer = Mamba1Mixer(config) if config.version == 1 else Mamba2Mixer(config)

    def forward(
        self, x_BTD: Tensor, resets_BT: Tensor | None = None, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        mixed_BTD, state = self.mixer(self.norm(x_BTD), resets_BT, state, return_state)
        return x_BTD + mixed_BTD, state


class Mamba(LanguageModel):
    """A stack of Mamba blocks."""

    def __init__(self, config: MambaConfig) -> None:
        blocks = (Block(config) for _ in range(config.num_blocks))
        final_norm = make_norm("rms", config.embedding_dim, config.norm_eps)
        super().__init__(config, blocks, final_norm, config.embedding_dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: steps between 0.001 and 0.1, evenly in their logarithm, decays of 1 to the number of states
        (Mamba-2: between 1 and 16), N(0, 0.02) for embedding and head, torch's own for the projections, and what leads
        back to the residual stream smaller with depth."""
        std, depth = self.config.initializer_range, len(self.blocks)
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.ones_(self.final_norm.weight)
        for block in self.blocks:
            mixer = block.mixer
            nn.init.ones_(block.norm.weight)
            mixer.input.reset_parameters()
            mixer.out.reset_parameters()
            mixer.out.weight /= depth**0.5
            mixer.conv.init_weights()
            nn.init.ones_(mixer.skip)
            if isinstance(mixer, Mamba1Mixer):
                mixer.selection.reset_parameters()
                nn.init.uniform_(mixer.step.weight, -(self.config.rank**-0.5), self.config.rank**-0.5)
                mixer.log_decay.copy_(torch.arange(1, self.config.states + 1).to(mixer.log_decay).log())
                step_bias = mixer.step.bias
            else:
                nn.init.ones_(mixer.norm_weight)
                mixer.log_decay.uniform_(1, 16).log_()
                step_bias = mixer.step_bias
            step = torch.empty_like(step_bias).uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP))
            step = step.exp().clamp_min(STEP_FLOOR)
            step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step

    def no_decay_parameter_names(self) -> set[str]:
        """As for every family, and the rates of decay."""
        rates = {name for name, _ in self.named_parameters() if name.endswith("log_decay")}
        return super().no_decay_parameter_names() | rates
