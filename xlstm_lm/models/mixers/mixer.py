"""The description that every mixer gives, and the module that it builds: a mixer is what a block does along time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from xlstm_lm.base.fields import Size, check_fields
from xlstm_lm.models.layers import NormKind, round_up
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.backend import Call, make_call
from xlstm_lm.ops.operation import Operation

if TYPE_CHECKING:
    from xlstm_lm.parallel.divided_rows import DividedRows

State = tuple[Tensor, ...]
"""Everything that a mixer keeps after the last token, each tensor with the batch first."""
Observer = Callable[[Tensor, Tensor, float | None], None]
"""Receives a cell's input and forget gate pre-activations, soft cap included, and the cap (None for none)."""


PROJECTIONS, NORMS = "projections", "norms"
"""Parts of a block in the accounting, beside the names of its operations."""


class OperationUse(NamedTuple):
    """One operation of a mixer at one set of sizes."""

    operation: Operation
    sizes: dict[str, int]
    """Sizes by the letters in the operation's tensor names, those that its choice of a backend depends on."""
    options: Hashable = ()
    backend: str = "auto"
    """Configured backend, or "auto"."""
    counted: Mapping[str, int] = MappingProxyType({})
    """Further sizes, on which its cost depends; L is the chunk length."""

    def call(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The call in training: with gradient, over rows of several documents."""
        return make_call(device, dtype, self.sizes, self.options)

    def flops(self, tokens: int, chunk_length: int | None = None) -> float:
        """FLOPs of the forward pass over one row; `chunk_length` replaces the configured one, None keeps it."""
        counted = {**self.counted, "L": chunk_length} if chunk_length and "L" in self.counted else self.counted
        return self.operation.cost(**{**self.sizes, **counted, "B": 1, "T": tokens}).flops

    def kept(self, tokens: int, storage: Storage, **others: int | None) -> float:
        """Bytes that the operation keeps for each token of a row, beside inputs and output.

        `others` replace sizes.
        """
        sizes: dict[str, Any] = {**self.sizes, **self.counted, "B": 1, "T": tokens, **others}
        return self.operation.kept(**sizes, device=storage.device, itemsize=storage.itemsize)


class FeedForwardConfig(NamedTuple):
    """Gated feed-forward behind a mixer."""

    hidden: int
    """Units between the projections."""
    activation: str
    """Name of the gate's activation: silu or gelu."""


def silu_feedforward(hidden: int | None, about: float) -> FeedForwardConfig:
    """Feed-forward of `hidden` units; None for the least multiple of 64 that is not below `about`."""
    return FeedForwardConfig(hidden or round_up(about, 64), "silu")


@dataclass(kw_only=True)
class MixerConfig:
    """Settings of a mixer. Each mixer adds `kind`, its own fields, and answers to the methods below."""

    kind: str
    """Kind of mixer."""
    embedding_dim: Size
    """Model width."""

    def __post_init__(self) -> None:
        check_fields(self)

    def papers(self) -> list[str]:
        """arXiv identifiers of the papers that describe the mixer with these settings."""
        raise NotImplementedError

    def build(self) -> Mixer:
        """Module with these settings; its weights have no values before `init_weights`."""
        raise NotImplementedError

    @property
    def projection_weights(self) -> int:
        """Weights of all projections: each token is multiplied by each of them once."""
        raise NotImplementedError

    def flops_by_part(self, context_length: int, chunk_length: int | None = None) -> dict[str, float]:
        """FLOPs of the forward pass for one token in a row of `context_length` tokens: projections, each operation.

        `chunk_length` replaces the configured one; None keeps it.
        """
        of_row = {use.operation.name: use.flops(context_length, chunk_length) for use in self.operations(1)}
        return {PROJECTIONS: 2.0 * self.projection_weights} | {
            name: flops / context_length for name, flops in of_row.items()
        }

    def step_flops_by_part(self, context_length: int) -> dict[str, float]:
        """FLOPs of the step that reads one more token after `context_length` tokens; a recurrence does not depend on
        their number."""
        del context_length
        return self.flops_by_part(1)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """Bytes that the forward pass keeps for the backward pass, for each token of a row of `context_length`.

        A tensor counts once, with the part that reads it first; the norm before the mixer is the block's.
        """
        raise NotImplementedError

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Bytes of one sequence's state after `context_length` tokens."""
        raise NotImplementedError

    def state_traffic(self, bytes_per_activation: int, context_length: int) -> int:
        """Bytes of the state that the step after `context_length` tokens reads and writes: once each for a
        recurrence."""
        return 2 * self.state_bytes(bytes_per_activation, context_length)

    def operations(self, micro_rows: int) -> list[OperationUse]:
        """Operations that a forward pass over `micro_rows` rows calls."""
        raise NotImplementedError

    def feedforward(self) -> FeedForwardConfig | None:
        """Feed-forward of the mixer's block; None for a block without one."""
        return None


class Mixer(nn.Module):
    """Maps (B, T, D) to (B, T, D) along time."""

    no_decay: frozenset[str] = frozenset()
    """Parameters with two dimensions or more that are no matrices: weight decay leaves them alone."""
    has_gates: ClassVar[bool] = False
    """Whether `forward` calls `observe`."""
    parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Part of the accounting to which each of the mixer's own parameters belongs, if it is not the cell."""
    divided_rows: DividedRows | None = None
    """Processes that divide the rows; None for whole rows."""
    context_key: Hashable = None
    """Mixers of a model with equal keys share one context."""

    def make_context(self, x_BTD: Tensor, resets_BT: Tensor | None, state: State | None) -> Any:
        """Everything that mixers with this key derive from the rows once a forward pass: by default, the resets."""
        del state
        return None if resets_BT is None else resets_BT.to(x_BTD.device, non_blocking=True)

    def forward(
        self,
        x_BTD: Tensor,
        context: Any,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """Mixed tokens (B, T, D) and, where `return_state` is set, the state after the last one.

        Args:
            x_BTD: normalized input (B, T, D).
            context: result of `make_context`.
            state: state after the previous call; None where every row begins.
            return_state: whether to return the state.
            observe: called with the gates; None for no call.
            overwrite_state: whether the memory of `state` may be reused for the state returned.
        """
        raise NotImplementedError

    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Initialize every parameter as the mixer's authors do, in block `index` from 0 of `depth`.

        Yields each parameter right before its values are written, and writes none of it later: only one parameter at a
        time needs memory for its values.
        """
        raise NotImplementedError


def head_norm_kept(storage: Storage, kind: NormKind, num_heads: int, width: int) -> float:
    """Bytes that the norm of each head keeps for each token, its input not among them: the normalized values, which an
    RMS norm on a CPU has in float32, and numbers of each head."""
    if storage.device == "cpu" and kind == "rms":
        return FLOAT32 * width
    return storage.itemsize * (width + 2 * num_heads)


def small_std(width: int) -> float:
    """Standard deviation of a projection from `width` units at the start (arXiv 1910.05895)."""
    return (2 / (5 * width)) ** 0.5


def residual_std(width: int, depth: int) -> float:
    """Standard deviation at the start of a projection back to the residual stream of `depth` blocks."""
    return 2 / (depth * width**0.5)


def check_heads(num_heads: int, name: str, width: int) -> None:
    """Check that heads divide a width.

    Raises:
        ValueError: they do not; names the nearest smaller number that does.
    """
    if width < 1 or width % num_heads:
        divisor = next(each for each in range(min(num_heads, max(width, 1)), 0, -1) if width % each == 0)
        raise ValueError(
            f"num_heads {num_heads} does not divide the {name} = {width}; "
            f"choose a num_heads that does, for example {divisor}."
        )
