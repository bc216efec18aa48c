"""One training step through DeepSpeed, and access to weights and optimizer state by name at every ZeRO stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from xlstm_lm.models.mixers.mixer import State
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.build import place_weights
from xlstm_lm.training.deepspeed_config import Precision, deepspeed_json, refusals_explained
from xlstm_lm.training.engine_state import EngineState
from xlstm_lm.training.layer_statistics import activation_norms_observed, gradient_norms
from xlstm_lm.training.optimizer import OptimizerConfig, build_optimizer, state_shapes
from xlstm_lm.training.update_check import UpdateCheck, Veto

# DeepSpeed calls functions under names that newer versions of torch deprecate.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

MicroBatch = tuple[Tensor, Tensor, Tensor]  # tokens_BT, targets_BT, resets_BT
Judge = Callable[[Tensor], Tensor]
"""Maps the loss and the gradient norm of a step, float32 (2,) on the device and the same on all ranks, to whether its
update must not be applied, a scalar of type bool."""


class TrainingModule(nn.Module):
    """A model with its loss in `forward`, because ZeRO-3 gathers weights only there."""

    def __init__(self, model: nn.Module, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None,
        resets_BT: Tensor,
        state: list[State] | None = None,
        return_state: bool = False,
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor, list[State]]:
        """Sum of the target tokens' losses in nats, in training mode with the z-loss.

        With `return_state` also the model's state after the last token, without gradients. Without targets, statistics
        of gates, if the model has any, and of blocks.
        """
        if targets_BT is None:
            return self._statistics(tokens_BT, resets_BT)
        z_loss = self.z_loss if self.training else 0.0
        if not return_state:
            return self.model.loss(self.model(tokens_BT, resets_BT), targets_BT, reduction="sum", z_loss=z_loss)
        hidden_BTD, after = self.model(tokens_BT, resets_BT, state=state, return_state=True)
        loss = self.model.loss(hidden_BTD, targets_BT, reduction="sum", z_loss=z_loss)
        return loss, [tuple(tensor.detach() for tensor in block) for block in after]

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
    vetoed: bool
    """Whether they were not, although loss and gradient were finite."""
    loss_sum: Tensor
    """Sum of the losses of this rank's target tokens, in nats."""
    gradient_norm: Tensor | float
    """Norm of the whole gradient before clipping."""
    layer_gradient_norms: dict[str, Tensor] = field(default_factory=dict)
    """Norms of the gradient by layer, as in `layer_statistics.gradient_norms`; empty unless asked for."""
    states: list[list[State]] = field(default_factory=list)
    """State of every block after each micro batch; empty unless states are given."""


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
        """Shape of each tensor of optimizer state, by name, PARAMETER.KEY."""
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
        self.state = EngineState(
            self._parameters,
            self.shapes,
            self.moment_shapes,
            self._optimizer,
            self._engine.optimizer,
            stage=self.stage,
            world=world,
        )
        """Weights and optimizer state by name."""
        self._update_check = UpdateCheck(self._engine.optimizer, self.stage)
        self.before_update: Callable[[], None] = lambda: None
        """Called before the optimizer changes weights and its state, after forward and backward pass."""
        self._optimizer.register_step_pre_hook(lambda *_: self.before_update())

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        scale: Tensor | float,
        learning_rate: float,
        by_layer: bool = False,
        judge: Judge | None = None,
        states: Sequence[list[State] | None] = (),
    ) -> StepResult:
        """Run forward, backward, reduction and update. Collective.

        The gradient is that of sum(loss sum * scale) / world size over all ranks' micro batches, which is the loss that
        the judge is given. If a loss or gradient is not finite on any rank, or the judge forbids the update, weights,
        optimizer state and its step count stay unchanged on every rank.

        DeepSpeed reads the gradient norm on the host before the update, the only device synchronization of a step.

        Args:
            micro_batches: This rank's rows of the step, accumulation_steps of them.
            scale: Factor of the losses; world size / target tokens of the global batch gives the mean token loss.
            learning_rate: Rate of the schedule; each parameter group multiplies it by its lr_scale.
            by_layer: Whether the norms of the gradient by layer are computed as well.
            judge: Forbids updates; None applies every finite one.
            states: State of every block before each micro batch, None for empty ones; none at all if rows begin with
                empty states.
        """
        assert len(micro_batches) == self._accumulation_steps
        self._engine.train()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        loss_sum = torch.zeros((), device=self.world.device)
        after: list[list[State]] = []
        for index, micro_batch in enumerate(micro_batches):
            if states:
                loss, state = self._engine(*micro_batch, state=states[index], return_state=True)
                after.append(state)
            else:
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
        self._update_check.begin(judge and self._veto(judge, loss_sum * scale / self.world.size))
        if self.stage == 0:
            applied, norm = self._update_stage_0()
        else:
            self._engine.step()
            applied, norm = self._engine.was_step_applied(), self._engine.get_global_grad_norm()
        assert not (judge and applied) or self._update_check.has_judged, "DeepSpeed has computed no norm"
        vetoed_norm = None if applied else self._update_check.vetoed_norm()
        if vetoed_norm is not None:
            norm = vetoed_norm
        return StepResult(applied, vetoed_norm is not None, loss_sum, norm, layers, after)

    def _veto(self, judge: Judge, own_loss: Tensor) -> Veto:
        def veto(norm: Tensor) -> Tensor:
            # All ranks judge rank 0's norm: their own ones may differ in the last bit.
            norm = norm.float().to(self.world.device) if self.world.is_first else torch.zeros_like(own_loss)
            return judge(self.world.sum_(torch.stack((own_loss, norm))))

        return veto

    def _update_stage_0(self) -> tuple[bool, Tensor]:
        """Update the weights. Returns whether they were updated, and the norm of the gradient, or infinity."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = self._update_check.judged(torch.nn.utils.get_total_norm(gradients))
        applied = bool(torch.isfinite(norm))
        if not applied:
            for parameter in self._parameters.values():
                parameter.grad = None  # optimizers leave parameters without a gradient unchanged
        elif self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip, norm)
        self._engine.step()
        return applied, norm

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

    def weights_are_finite(self) -> bool:
        """Whether every weight is finite. Collective: each rank checks the weights, or parts of weights, it holds."""
        own = [self.state.own_weight(name) for name in self.shapes]
        broken = torch.stack([(~torch.isfinite(each).all()).to(self.world.device, torch.int64) for each in own]).sum()
        return not int(self.world.sum_(broken))

    def parameter_norm(self) -> Tensor:
        """Euclidean norm of all weights together, a float32 scalar on the device. Collective."""
        own = [self.state.own_weight(name) for name in self.shapes]
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

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made: the run's steps without the skipped ones."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks."""
        self._engine.destroy()
