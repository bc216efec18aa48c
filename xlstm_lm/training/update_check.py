"""The decision whether a step's update is applied: the one place for all ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from torch import Tensor

Veto = Callable[[Tensor], Tensor]
"""Maps the norm of the whole gradient, a scalar on the device, to whether the update is vetoed, a scalar of type bool.

Collective. It must give the same answer on all ranks.
"""


class UpdateCheck:
    """Vetoes updates in the way in which DeepSpeed skips a gradient that has overflowed.

    DeepSpeed reads on the host whether the norm of the gradient is finite, before it changes weights or optimizer
    state. The norm of a vetoed update reads as infinite: the veto needs no other synchronization with the device.
    """

    def __init__(self, zero_optimizer: Any, stage: int) -> None:
        """Observe the gradient norms of an optimizer.

        Args:
            zero_optimizer: DeepSpeed's optimizer; at ZeRO stage 0, which has none, the engine calls `judged` itself.
            stage: ZeRO stage.
        """
        self._veto: Veto | None = None
        self._norm: Tensor | None = None
        self._vetoed: Tensor | None = None
        if isinstance(zero_optimizer, BF16_Optimizer):
            self._gradients_for_norm = zero_optimizer.get_grads_for_norm
            zero_optimizer.get_grads_for_norm = self._judged_gradients
        elif stage in (1, 2):
            whole_norm = zero_optimizer.scaled_global_norm
            zero_optimizer.scaled_global_norm = lambda: self.judged(whole_norm())
        elif stage == 3:
            group_norms = zero_optimizer._get_norm_groups
            zero_optimizer._get_norm_groups = lambda: self._judged_groups(group_norms())

    def begin(self, veto: Veto | None) -> None:
        """Prepare for the next update; None for one that is applied whenever it is finite."""
        self._veto, self._norm, self._vetoed = veto, None, None

    @property
    def has_judged(self) -> bool:
        """Whether the veto of the last update was called. DeepSpeed skips it for a gradient that has overflowed."""
        return self._vetoed is not None

    def vetoed_norm(self) -> Tensor | None:
        """Norm of a finite gradient whose update was vetoed; None for any other update.

        Waits for the device: call it only for an update that was not applied.
        """
        if not self.has_judged:
            return None
        assert self._norm is not None
        return self._norm if self._vetoed and self._norm.isfinite() else None

    def judged(self, norm: Tensor) -> Tensor:
        """Return the norm of the whole gradient, or infinity for a vetoed update. Collective."""
        return norm if self._veto is None else self._infinite_if_vetoed(norm, norm)

    def _judged_groups(self, norms: list[Tensor]) -> list[Tensor]:
        """`judged`, for the norms of parameter groups, which DeepSpeed combines."""
        if self._veto is None:
            return norms
        return [self._infinite_if_vetoed(combine_grad_norm_groups(norms), norms[0]), *norms[1:]]

    def _judged_gradients(self, for_clipping: bool = False) -> Any:
        """`judged`, for gradients of which DeepSpeed computes the norm: the smallest one is replaced for a veto."""
        found = self._gradients_for_norm(for_clipping)
        if for_clipping or self._veto is None:
            return found
        gradients, of_experts = found
        smallest = min(range(len(gradients)), key=lambda index: gradients[index].numel())
        replaced = self._infinite_if_vetoed(get_global_norm_of_tensors(gradients), gradients[smallest])
        return [*gradients[:smallest], replaced, *gradients[smallest + 1 :]], of_experts

    def _infinite_if_vetoed(self, norm: Tensor, values: Tensor) -> Tensor:
        assert self._veto is not None
        self._norm, self._vetoed = norm, self._veto(norm)
        return torch.where(self._vetoed.to(values.device), torch.inf, values)
