"""The protocol of an optimizer: fields of the recipe, parameter groups, and the state that a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from xlstm_lm.base.fields import check_fields


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike."""

    names: tuple[str, ...]
    """Names of the parameters, in the model's order."""
    state_keys: tuple[str, ...]
    """Keys of the tensors, shaped like the parameter, that the optimizer keeps for it and a checkpoint holds."""
    options: dict[str, Any] = field(default_factory=dict)
    """Entries of torch's parameter group, such as weight_decay."""
    lr_scale: float = 1.0
    """The group's learning rate as a multiple of the schedule's."""


class OptimizerConfig(ABC):
    """An optimizer's section of the recipe: a dataclass with at least the fields below, which the trainer reads."""

    kind: str
    """Name of the optimizer in OPTIMIZERS."""
    learning_rate: float
    """Peak learning rate."""
    gradient_clip: float
    """Largest norm of the whole gradient; 0 for no limit."""

    fewest_state_tensors: ClassVar[int]
    """State tensors of the parameter that has the fewest: a bound on memory that needs no model."""
    largest_stage: ClassVar[int] = 3
    """Highest ZeRO stage that the optimizer works at."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")

    @abstractmethod
    def groups(self, shapes: Mapping[str, torch.Size], no_decay: set[str]) -> list[Group]:
        """Divide the parameters into groups, each parameter in one; groups may be empty.

        Args:
            shapes: Shape of each parameter by name, in the model's order.
            no_decay: Names of the parameters that weight decay leaves alone.
        """

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer over torch's parameter groups, with a learning rate of 0 until the loop sets one.

        ZeRO replaces a group's parameters by flat partitions of them. A parameter's state must consist of `step`, a
        float32 scalar that counts updates, and of one tensor for each of the group's state_keys. A parameter without a
        gradient must stay unchanged, together with its state.
        """

    def check_layout(self, stage: int) -> None:
        """Refuse a layout that the optimizer cannot work on.

        Args:
            stage: Effective ZeRO stage.

        Raises:
            ValueError: names the setting and the remedy.
        """
        if stage > self.largest_stage:
            raise ValueError(
                f"optimizer.kind = {self.kind!r} cannot be used at deepspeed.zero_optimization.stage {stage}, which "
                f"divides every matrix over the processes: choose a stage up to {self.largest_stage}, or another "
                f"optimizer.kind."
            )


def parameter_groups(config: OptimizerConfig, shapes: Mapping[str, torch.Size], no_decay: set[str]) -> list[Group]:
    """The groups that have parameters.

    Raises:
        ValueError: `no_decay` names a parameter that the model does not have.
    """
    unknown = no_decay - shapes.keys()
    if unknown:
        raise ValueError(f"no_decay_parameter_names() names {sorted(unknown)}, which the model does not have.")
    groups = [group for group in config.groups(shapes, no_decay) if group.names]
    assert sorted(name for group in groups for name in group.names) == sorted(shapes), "each parameter is in one group"
    return groups


def state_shapes(
    config: OptimizerConfig, shapes: Mapping[str, torch.Size], no_decay: set[str]
) -> dict[str, torch.Size]:
    """Shape of each tensor of optimizer state, named PARAMETER.KEY, in the model's order."""
    groups = parameter_groups(config, shapes, no_decay)
    keys = {name: group.state_keys for group in groups for name in group.names}
    return {f"{name}.{key}": shape for name, shape in shapes.items() for key in keys[name]}


def build_optimizer(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], no_decay: set[str]
) -> torch.optim.Optimizer:
    """The optimizer that `config` describes, over a model's parameters.

    Raises:
        ValueError: `no_decay` names a parameter that the model does not have.
    """
    parameters = dict(named_parameters)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    groups = [
        {"lr_scale": group.lr_scale, "state_keys": group.state_keys}
        | group.options
        | {"params": [parameters[name] for name in group.names]}
        for group in parameter_groups(config, shapes, no_decay)
    ]
    return config.build(groups)
