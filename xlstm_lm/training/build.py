"""Build a model whose weights are drawn one at a time, each straight into its place on the device.

The whole model never stands in float32 beside its place: under ZeRO 3 a rank keeps its share of a parameter and frees
the whole before the next one is drawn. The weights of a seed are those of `build_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_lm.models import FAMILIES, ModelConfig
from xlstm_lm.models.language_model import LanguageModel


class _DrawForNothing(TorchDispatchMode):
    """A context in which a random number drawn into a meta tensor moves the random state as it would for a real one.

    torch's layers draw weights when they are constructed, and the numbers of `initialize_in_turn` follow those.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(args[0], Tensor) and args[0].is_meta:
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu"), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def unbuilt_model(config: ModelConfig) -> LanguageModel:
    """The model that `config` describes, on the meta device, for `place_weights`.

    Moves torch's random state as the constructors of a real model do.
    """
    with torch.device("meta"), _DrawForNothing():
        return FAMILIES[config.family][1](config)


def draw_apart(seed: int, rank: int) -> None:
    """Give every rank but the first random numbers of its own: dropout then differs between the rows of ranks."""
    if rank:
        torch.manual_seed(seed + rank)


def place_weights(model: LanguageModel, config: dict[str, Any], device: torch.device) -> None:
    """Draw the weights of an `unbuilt_model`, parameter by parameter, from torch's random state. Collective.

    Args:
        model: The model; its parameters are replaced.
        config: DeepSpeed's configuration, which says whether weights are in bf16 and shared out over the ranks.
        device: Device of this rank.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    shared: nn.Parameter | None = None

    def place(drawn: nn.Parameter) -> None:
        nonlocal shared
        drawn.data = drawn.data.to(device, dtype)
        if config["zero_optimization"]["stage"] < 3:
            return
        if shared is None:
            deepspeed.zero.Init(nn.ParameterList([drawn]), dtype=dtype, config_dict_or_path=config)
            shared = drawn
        else:
            shared.convert_to_zero_parameters(param_list=[drawn])

    drawn: nn.Parameter | None = None
    for parameter in model.initialize_in_turn():
        if parameter is drawn:
            continue  # tied weights: the model writes them twice
        if drawn is not None:
            place(drawn)
        drawn = nn.Parameter(torch.empty(parameter.shape))
        for module, name in owners.pop(id(parameter)):
            setattr(module, name, drawn)
    assert drawn is not None
    place(drawn)
    without_values = [name for name, each in [*model.named_parameters(), *model.named_buffers()] if each.is_meta]
    assert not without_values, f"initialize_in_turn gives no values to {without_values}"
