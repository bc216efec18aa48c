"""One training step through DeepSpeed, and access to weights and optimizer state by name at every ZeRO stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.build import place_weights
from xlstm_lm.training.deepspeed_config import Precision, deepspeed_json, refusals_explained
from xlstm_lm.training.layer_statistics import activation_norms_observed, gradient_norms
from xlstm_lm.training.optimizer import OptimizerConfig, build_optimizer, state_shapes

# DeepSpeed calls functions under names that newer versions of torch deprecate.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

MicroBatch = tuple[Tensor, Tensor, Tensor]  # tokens_BT, targets_BT, resets_BT


class TrainingModule(nn.Module):
    """A model with its loss in `forward`, because ZeRO-3 gathers weights only there."""

    def __init__(self, model: nn.Module, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None, resets_BT: Tensor) -> Tensor | dict[str, Tensor]:
        """Sum of the target tokens' losses in nats, in training mode with the z-loss.

        Without targets, statistics of gates, if the model has any, and of blocks.
        """
        if targets_BT is None:
            return self._statistics(tokens_BT, resets_BT)
        z_loss = self.z_loss if self.training else 0.0
        return self.model.loss(self.model(tokens_BT, resets_BT), targets_BT, reduction="sum", z_loss=z_loss)

    def _statistics(self, tokens_BT: Tensor, resets_BT: Tensor) -> dict[str, Tensor]:
        gates: dict[str, Tensor] = {}
        with activation_norms_observed(self.model) as layers:
            if hasattr(self.model, "gate_statistics"):
                gates = self.model.gate_statistics(tokens_BT, resets_BT)
            if not gates:
                self.model(tokens_BT, resets_BT)
        return {**{f"gates/{name}": value for name, value in gates.items()}, **layers}


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step."""

    applied: bool
    """Whether the weights were updated; the same on all ranks."""
    loss_sum: Tensor
    """Sum of the losses of this rank's target tokens, in nats."""
    gradient_norm: Tensor | float
    """Norm of the whole gradient before clipping."""
    layer_gradient_norms: dict[str, Tensor] = field(default_factory=dict)
    """Norms of the gradient by layer, as in `layer_statistics.gradient_norms`; empty unless asked for."""


class TrainingEngine:
    """A DeepSpeed engine around a model and one of OPTIMIZERS."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_config: OptimizerConfig,
        deepspeed_section: dict[str, Any],
        *,
        world: World,
        precision: Precision,
        micro_batch_size: int,
        accumulation_steps: int,
        z_loss: float = 0.0,
    ) -> None:
        """Set up DeepSpeed. Collective.

        Args:
            model: An `unbuilt_model`, or a model with the same weights on every rank.
            optimizer_config: Section optimizer of the recipe, checked against the layout.
            deepspeed_section: Section deepspeed of the recipe, checked.
            world: All processes; ZeRO divides state over them.
            precision: Type of weights and activations; master weights are float32 in both.
            micro_batch_size: Rows of one forward and backward pass on one rank.
            accumulation_steps: Micro batches of a step on one rank.
            z_loss: Weight of the z-loss; 0 for none.
        """
        persistent = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert not persistent, f"checkpoints hold parameters only, but the model has persistent buffers {persistent}"
        self.world = world
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        no_decay = model.no_decay_parameter_names()
        self.moment_shapes = state_shapes(optimizer_config, self.shapes, no_decay)
        """Shape of each tensor that `moments` yields, by name, in order."""
        self._clip = optimizer_config.gradient_clip
        self._accumulation_steps = accumulation_steps
        config = deepspeed_json(
            deepspeed_section,
            precision=precision,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            world_size=world.size,
            gradient_clip=self._clip,
        )
        self.stage = config["zero_optimization"]["stage"]
        # DeepSpeed reads this list only for its shared-memory all-reduce on CPUs, which gloo makes unnecessary. Left
        # to DeepSpeed, the list costs a probe of all its operations and a minute of compiling that one.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
        if any(parameter.is_meta for parameter in model.parameters()):
            place_weights(model, config, world.device)
        self._parameters = dict(model.named_parameters())
        # The module moves first, because torch chooses its fused optimizer kernel by the parameters' device.
        module = TrainingModule(model, z_loss).to(world.device)
        self._optimizer = build_optimizer(optimizer_config, model.named_parameters(), no_decay)
        with refusals_explained():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        self._create_optimizer_state()

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        scale: Tensor | float,
        learning_rate: float,
        by_layer: bool = False,
    ) -> StepResult:
        """Run forward, backward, reduction and update. Collective.

        The gradient is that of sum(loss sum * scale) / world size over all ranks' micro batches. If a loss or gradient
        is not finite on any rank, weights, optimizer state and its step count stay unchanged on every rank.

        DeepSpeed reads the gradient norm on the host before the update, the only device synchronization of a step.

        Args:
            micro_batches: This rank's rows of the step, accumulation_steps of them.
            scale: Factor of the losses; world size / target tokens of the global batch gives the mean token loss.
            learning_rate: Rate of the schedule; each parameter group multiplies it by its lr_scale.
            by_layer: Whether the norms of the gradient by layer are computed as well.
        """
        assert len(micro_batches) == self._accumulation_steps
        self._engine.train()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        loss_sum = torch.zeros((), device=self.world.device)
        for index, micro_batch in enumerate(micro_batches):
            loss = self._engine(*micro_batch)
            loss_sum = loss_sum + loss.detach().float()
            # An infinite loss can have a finite gradient. A scale of NaN then makes the gradient NaN on every rank.
            finite_scale = torch.where(
                torch.isfinite(loss.detach()), torch.as_tensor(scale, device=loss.device), torch.nan
            )
            self._engine.backward(loss * finite_scale.to(loss.dtype), scale_wrt_gas=False)
            if index < len(micro_batches) - 1:
                self._engine.step()
        layers = gradient_norms(self._parameters, self.stage, self.world) if by_layer else {}
        if self.stage == 0:
            return self._update_stage_0(loss_sum, layers)
        self._engine.step()
        return StepResult(self._engine.was_step_applied(), loss_sum, self._engine.get_global_grad_norm(), layers)

    def _update_stage_0(self, loss_sum: Tensor, layers: dict[str, Tensor]) -> StepResult:
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = bool(torch.isfinite(norm))
        if not applied:
            for parameter in self._parameters.values():
                parameter.grad = None  # optimizers leave parameters without a gradient unchanged
        elif self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip, norm)
        self._engine.step()
        return StepResult(applied, loss_sum, norm, layers)

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Tensor:
        """Loss sum of one micro batch in nats. Under ZeRO-3, every rank must call it equally often."""
        self._engine.eval()
        return self._engine(*micro_batch)

    @torch.no_grad()
    def statistics(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Statistics of gates and blocks on one micro batch: gates/NAME and layers/BLOCK/activation_norm.

        Under ZeRO-3, every rank must call it.
        """
        self._engine.eval()
        tokens_BT, _, resets_BT = micro_batch
        return self._engine(tokens_BT, None, resets_BT)

    # Weights and optimizer state. Reading is collective: every rank must read the same names in the same order.

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and float32 master weight of every parameter, on the device."""
        for name, parameter in self._parameters.items():
            value = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
            yield name, value.detach().float().view(self.shapes[name])

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name, PARAMETER.KEY, and float32 value of each tensor of optimizer state, which starts at zero."""
        for name, shape in self.moment_shapes.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = self._parameters[parameter_name]
            if self.stage == 0:
                value = self._optimizer.state[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            yield name, value.detach().float().view(shape)

    def load(self, weights: Iterator[tuple[str, Tensor]], moments: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Replace weights and optimizer state by full float32 tensors, the same on every rank. Collective.

        Args:
            weights: Name and value of parameters, as `weights` yields them.
            moments: Name and value of optimizer state, as `moments` yields it; without any, the state stays.
            step: Updates that the optimizer has made.
        """
        for name, value in weights:
            self._write(self._parameters[name], value)
        for name, value in moments:
            name, _, key = name.rpartition(".")
            self._write(self._parameters[name], value, key)
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def weights_are_finite(self) -> bool:
        """Whether every weight is finite. Collective: each rank checks the weights, or parts of weights, it holds."""
        own = [self._own_part(parameter) for parameter in self._parameters.values()]
        broken = torch.stack([(~torch.isfinite(each).all()).to(self.world.device, torch.int64) for each in own]).sum()
        return not int(self.world.sum_(broken))

    def parameter_norm(self) -> Tensor:
        """Euclidean norm of all weights together, a float32 scalar on the device. Collective."""
        own = [self._own_part(parameter) for parameter in self._parameters.values()]
        square = torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32) for each in own]).square().sum()
        return (self.world.sum_(square) if self.stage == 3 else square).sqrt()

    def held_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps from step to step: weights, master weights and optimizer state."""
        parameters = self._parameters.values()
        weights = [parameter.ds_tensor if self.stage == 3 else parameter for parameter in parameters]
        if self.stage == 3:
            masters = self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            masters = [each for group in self._optimizer.param_groups for each in group["params"]] if self.stage else []
        state = [each for of_one in self._optimizer.state.values() for each in of_one.values()]
        held = {"weights": weights, "master weights": masters, "optimizer state": state}
        return {name: sum(each.nbytes for each in tensors) for name, tensors in held.items()}

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        """Values of a parameter on this rank; under ZeRO-3 its share without padding."""
        if self.stage < 3:
            return parameter.detach()
        share = parameter.ds_tensor.ds_numel
        own = min(max(parameter.ds_numel - share * self.world.rank, 0), share)
        return parameter.ds_tensor.detach().flatten()[:own]

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made: the run's steps without the skipped ones."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        value = value.to(self.world.device)
        if self.stage == 0:
            (self._optimizer.state[parameter][moment] if moment else parameter).copy_(value)
        elif self.stage < 3:
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
        else:
            if not moment:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(value)
            # Shares have the same size on all ranks; the last one is padded.
            share = parameter.ds_tensor.ds_numel
            filled = torch.zeros(share * self.world.size, device=value.device)
            filled[: value.numel()] = value.flatten()
            own = filled[share * self.world.rank :][:share]
            if moment:
                safe_set_local_optimizer_state(parameter, own, moment)
            else:
                safe_set_local_fp32_param(parameter, own)

    def _create_optimizer_state(self) -> None:
        """Create the state that the optimizer would create in its first step.

        By default, ZeRO 1 and 2 link the state to the parameters after the first group's first step, when that of the
        second group does not exist yet: it could never be read by name (DeepSpeed 0.19.8).
        """
        zero_optimizer, groups = self._engine.optimizer, self._optimizer.param_groups
        if self.stage == 3:
            partitions = [
                (partition, groups[zero_optimizer.sub_group_to_group_id[index]])
                for index, partition in enumerate(zero_optimizer.fp32_partitioned_groups_flat)
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
            zero_optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks."""
        self._engine.destroy()
