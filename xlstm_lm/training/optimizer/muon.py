"""Muon for matrices, AdamW for all other parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces each matrix's Nesterov momentum by a
nearby matrix whose singular values are all close to 1. The update is scaled by 0.2 sqrt(max(rows, columns)) (Liu et al.
2025, arXiv 2502.16982, section 2.2), which gives it the root mean square of a typical AdamW update: learning rate and
weight decay then mean the same for both kinds of parameters.

torch.optim.Muon accepts two-dimensional parameters only, which excludes stacked matrices and ZeRO's flat partitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed
from torch import Tensor

from xlstm_lm.base.fields import NonNegative, Positive, PositiveRatio, Range, Share
from xlstm_lm.training.optimizer.config import Group, OptimizerConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of s, s^3 and s^5 in the Newton-Schulz polynomial of a singular value s (Jordan et al. 2024)."""
EPS = 1e-7
"""Smallest norm that a matrix is divided by."""


@dataclass(kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of blocks; AdamW for embedding, head, convolutions and everything that is not decayed."""

    kind: Literal["muon"] = "muon"
    """Optimizer."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    momentum: Share = 0.95
    """Decay of the momentum of matrices."""
    newton_schulz_steps: Annotated[int, Range(1, 20)] = 5
    """Iterations that orthogonalize an update."""
    adamw_lr_scale: Positive = 1.0
    """Learning rate of the parameters that AdamW updates, as a multiple of that of the matrices."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveRatio = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decay of matrices other than embeddings; norms, biases and embeddings are never decayed."""
    gradient_clip: NonNegative = 0.5
    """Largest norm of the whole gradient; 0 for no limit."""

    fewest_state_tensors: ClassVar[int] = 1
    largest_stage: ClassVar[int] = 2

    def groups(self, shapes: Mapping[str, torch.Size], no_decay: set[str]) -> list[Group]:
        """Matrices for Muon, then AdamW's parameters with and without decay.

        Stacked matrices, such as an sLSTM's (gates, heads, D, D) or block-diagonal (blocks, out, in) weights, are
        orthogonalized one by one, because each maps one vector to another. A depthwise convolution's (channels, width)
        weight maps each channel by itself and is left to AdamW, as are embedding and head.
        """

        def is_matrix(name: str) -> bool:
            of_vocabulary = name in ("embedding.weight", "head.weight")
            is_map = len(shapes[name]) >= 2 and min(shapes[name][-2:]) > 1 and not name.endswith("conv.weight")
            return is_map and not of_vocabulary and name not in no_decay

        keys = ("exp_avg", "exp_avg_sq")
        matrices = tuple(name for name in shapes if is_matrix(name))
        decayed = tuple(name for name in shapes if name not in no_decay and not is_matrix(name))
        kept = tuple(name for name in shapes if name in no_decay)
        matrix_options = {
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "newton_schulz_steps": self.newton_schulz_steps,
            "shapes": [shapes[name] for name in matrices],
        }
        return [
            Group(matrices, ("momentum_buffer",), matrix_options),
            Group(decayed, keys, {"weight_decay": self.weight_decay}, self.adamw_lr_scale),
            Group(kept, keys, {"weight_decay": 0.0}, self.adamw_lr_scale),
        ]

    def build(self, groups: list[dict[str, Any]]) -> Muon:
        return Muon(groups, lr=0.0, betas=tuple(self.betas), eps=self.eps, fused=True)


class Muon(torch.optim.AdamW):
    """Muon over the groups that have an entry `shapes`, AdamW over the others.

    The parameters of a Muon group are its matrices or, at ZeRO stages 1 and 2, one flat partition of them: this rank's
    slice of all matrices laid end to end. There a step is collective: a matrix that crosses the boundary between two
    ranks is put together by one all-reduce, and each rank computes the updates of the matrices it holds a part of.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "shapes" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if "shapes" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=torch.zeros((), device=parameter.device), momentum_buffer=torch.zeros_like(parameter))
        state["step"] += 1
        momentum, steps = group["momentum"], group["newton_schulz_steps"]
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp(state["momentum_buffer"], momentum)
        update = matrix_update(update, steps) if update.ndim > 1 else flat_update(update, group["shapes"], steps)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def matrix_update(momentum: Tensor, steps: int) -> Tensor:
    """Orthogonalized and scaled momentum, (..., rows, columns), of matrices; leading dimensions count matrices.

    Products are taken in bfloat16 on a GPU, as published, and in float32 on a CPU.
    """
    dtype = torch.bfloat16 if momentum.is_cuda else torch.float32
    scale = 0.2 * max(momentum.shape[-2:]) ** 0.5
    return orthogonalized(momentum.to(dtype), steps).to(momentum.dtype) * scale


def orthogonalized(matrices: Tensor, steps: int) -> Tensor:
    """Move the singular values of matrices, (..., rows, columns), close to 1, to about 0.7 to 1.2 after 5 steps.

    Each Newton-Schulz step applies an odd polynomial to the singular values and leaves the singular vectors alone.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def flat_update(momentum: Tensor, shapes: Sequence[torch.Size], steps: int) -> Tensor:
    """`matrix_update` for this rank's partition of matrices of these shapes that are laid end to end. Collective.

    Args:
        momentum: (N,), elements rank * N to (rank + 1) * N of the whole; elements behind the last matrix are padding.
        shapes: Shapes of all matrices, on every rank alike.
        steps: Newton-Schulz steps.
    """
    size = momentum.numel()
    first = torch.distributed.get_rank() * size
    update = torch.zeros_like(momentum)
    start = 0
    for shape in shapes:
        end = start + shape.numel()
        low, high = max(start, first), min(end, first + size)
        here, inside = slice(low - first, high - first), slice(low - start, high - start)
        is_held = low < high
        if start // size == (end - 1) // size:
            matrix = momentum[here] if is_held else None
        else:
            matrix = momentum.new_zeros(shape.numel())
            if is_held:
                matrix[inside] = momentum[here]
            torch.distributed.all_reduce(matrix)
        if is_held:
            update[here] = matrix_update(matrix.view(shape), steps).flatten()[inside]
        start = end
    return update
