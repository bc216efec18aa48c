"""Weights and optimizer state of a DeepSpeed engine by name: the share of a rank, and whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_layout import Share, equal_shares

Read = Callable[[str, int, int], Tensor]
"""Gives elements start to stop of the flattened tensor of a name, (stop - start,), float32, on the host."""


class EngineState:
    """Access to the float32 master weights and the optimizer state, at every ZeRO stage.

    Parameter names name weights, PARAMETER.KEY optimizer state.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        moment_shapes: Mapping[str, torch.Size],
        optimizer: torch.optim.Optimizer,
        zero_optimizer: Any,
        *,
        stage: int,
        world: World,
    ) -> None:
        """Create the optimizer's state, zero, as its first step would.

        Args:
            parameters: Parameters by name.
            shapes: Their shapes; under ZeRO 3 the parameters themselves are empty.
            moment_shapes: Shape of each tensor of optimizer state, by name.
            optimizer: The optimizer that DeepSpeed calls.
            zero_optimizer: DeepSpeed's optimizer around it.
            stage: ZeRO stage.
            world: All processes.
        """
        self.shapes, self.moment_shapes = shapes, moment_shapes
        self.stage, self.world = stage, world
        self._parameters, self._optimizer, self._zero_optimizer = parameters, optimizer, zero_optimizer
        self._create()

    @property
    def stored_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of all that a checkpoint holds, by stem and name."""
        return {
            "model": {name: tuple(shape) for name, shape in self.shapes.items()},
            "optimizer": {name: tuple(shape) for name, shape in self.moment_shapes.items()},
        }

    def shares(self) -> dict[str, Iterator[Share]]:
        """Yield the shares that this rank writes, by stem. Those of all ranks hold each element once; none is sent.

        At stage 0 each rank holds everything and writes an equal part; at the others each writes its partition.
        """
        if self.stage > 0:
            return {
                "model": (share for name in self.shapes if (share := self._held(name))),
                "optimizer": (share for name in self.moment_shapes if (share := self._held_moment(name))),
            }
        rank, ranks = self.world.rank, self.world.size
        totals = {stem: sum(map(math.prod, shapes.values())) for stem, shapes in self.stored_shapes.items()}
        return {
            "model": equal_shares(self.weights(), totals["model"], rank, ranks),
            "optimizer": equal_shares(self.moments(), totals["optimizer"], rank, ranks),
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole float32 master weight of every parameter, on the device. Collective."""
        for name, parameter in self._parameters.items():
            value = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
            yield name, value.detach().float().view(self.shapes[name])

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole float32 value of each tensor of optimizer state, on the device. Collective."""
        for name, shape in self.moment_shapes.items():
            parameter, key = self._moment(name)
            value = (
                self._optimizer.state[parameter][key]
                if self.stage == 0
                else safe_get_full_optimizer_state(parameter, key)
            )
            yield name, value.detach().float().view(shape)

    @torch.no_grad()
    def load(self, weights: Read, moments: Read | None, step: int) -> None:
        """Replace weights and optimizer state. Each rank reads the elements it holds and no others. Collective.

        Args:
            weights: Reader of parameters.
            moments: Reader of optimizer state; None keeps the state.
            step: Updates that the optimizer has made.
        """
        for name in self.shapes:
            self._load(self._parameters[name], None, weights, name)
        for name in self.moment_shapes if moments else ():
            assert moments is not None
            self._load(*self._moment(name), moments, name)
        if self.stage in (1, 2):
            self._zero_optimizer.update_lp_params()
        elif self.stage == 3:  # as after a step: whole weights are gathered again from the shares
            self._zero_optimizer._partition_all_parameters()
            persistent = self._zero_optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def _load(self, parameter: nn.Parameter, key: str | None, read: Read, name: str) -> None:
        if self.stage == 3:
            share, start, length = self._own_range(parameter)
            own = torch.zeros(share)  # shares have the same size on all ranks; the last ones are padded
            if length:
                own[:length] = read(name, start, start + length)
            if key:
                safe_set_local_optimizer_state(parameter, own, key)
            else:
                safe_set_local_fp32_param(parameter, own)
                parameter.ds_tensor.copy_(own.view(parameter.ds_tensor.shape))
        elif self.stage > 0:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                mapping.get_hp_fragment(key).copy_(read(name, start, start + length))
        else:
            target = self._optimizer.state[parameter][key] if key else parameter
            target.copy_(read(name, 0, target.numel()).view(target.shape))

    def _own_range(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Size of a share under ZeRO 3, and first element and length, without padding, of this rank's."""
        share = parameter.ds_tensor.ds_numel
        start = share * self.world.rank
        return share, start, min(max(parameter.ds_numel - start, 0), share)

    def _moment(self, name: str) -> tuple[nn.Parameter, str]:
        parameter_name, _, key = name.rpartition(".")
        return self._parameters[parameter_name], key

    def _held(self, name: str) -> Share | None:
        """Part of a master weight that this rank's partition holds; None for no element."""
        return self._partition(self._parameters[name], None, name)

    def _held_moment(self, name: str) -> Share | None:
        return self._partition(*self._moment(name), name)

    def _partition(self, parameter: nn.Parameter, key: str | None, name: str) -> Share | None:
        if self.stage == 3:
            _, start, length = self._own_range(parameter)
            if not length:
                return None
            local = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
            return Share(name, start, local.detach().reshape(-1)[:length])
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return Share(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach())

    def own_weight(self, name: str) -> Tensor:
        """Values of a weight on this rank as the forward pass uses them; under ZeRO 3 its share without padding."""
        parameter = self._parameters[name]
        if self.stage < 3:
            return parameter.detach()
        _, _, length = self._own_range(parameter)
        return parameter.ds_tensor.detach().flatten()[:length]

    def _create(self) -> None:
        """Create the state that the optimizer would create in its first step.

        By default, ZeRO 1 and 2 link the state to the parameters after the first group's first step, when that of the
        second group does not exist yet: it could never be read by name (DeepSpeed 0.19.8).
        """
        groups = self._optimizer.param_groups
        if self.stage == 3:
            partitions = [
                (partition, groups[self._zero_optimizer.sub_group_to_group_id[index]])
                for index, partition in enumerate(self._zero_optimizer.fp32_partitioned_groups_flat)
            ]
        else:  # at stages 1 and 2 each group holds this rank's flat float32 partition
            partitions = [(partition, group) for group in groups for partition in group["params"]]
        for partition, group in partitions:
            if not self._optimizer.state[partition]:
                self._optimizer.state[partition] = {
                    "step": torch.zeros((), device=partition.device),
                    **{key: torch.zeros_like(partition) for key in group["state_keys"]},
                }
        if self.stage in (1, 2):
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()
