"""Totals of a model: parameters, floating-point operations, and bytes of recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from xlstm_lm.models import FAMILIES, ModelConfig
from xlstm_lm.models.components import EMBEDDING, HEAD, Component, components


def model_config(yaml_path_or_config: str | Path | ModelConfig) -> ModelConfig:
    """The model configuration itself, or that of a recipe's `model` section.

    Raises:
        ValueError: the recipe cannot be read, has no model section, or names an unknown family or key.
    """
    if not isinstance(yaml_path_or_config, (str, Path)):
        return yaml_path_or_config
    from xlstm_lm.base.recipe import read_recipe  # here, for the models need torch alone
    from xlstm_lm.models.presets import with_preset_fields

    values, _ = read_recipe(yaml_path_or_config)
    if "model" not in values:
        raise ValueError(f"{yaml_path_or_config} has no section 'model'; it has {', '.join(values) or 'none'}.")
    if not isinstance(values["model"], dict):
        raise ValueError(f"{yaml_path_or_config}: model is {values['model']!r}; it must be a section with fields.")
    try:
        section = with_preset_fields(values["model"])
    except ValueError as error:
        raise ValueError(f"{yaml_path_or_config}: {error}") from None
    family = section.get("family", "xlstm")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{yaml_path_or_config}: model.family is {family!r}; the families are {', '.join(FAMILIES)}.")
    config_class = FAMILIES[family][0]
    unknown = set(section) - set(config_class.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{yaml_path_or_config}: model has no field {', '.join(sorted(unknown))}.")
    return config_class(**section)


def count_parameters(yaml_path_or_config: str | Path | ModelConfig) -> int:
    """Exact number of parameters, a tied head counted once. Allocates no memory for them, and builds each kind of block
    once."""
    return sum(component.parameters for component in components(model_config(yaml_path_or_config), 1))


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of each parameter by its name, a tied head once. Allocates no memory for them."""
    with torch.device("meta"):
        model = FAMILIES[config.family][1](config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def training_flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Floating-point operations of forward and backward for one token of a row of `context_length` tokens.

    A product of (m, k) and (k, n) counts 2 m k n, the backward twice the forward. Counted are all projections,
    convolutions and the logits, and the mixers' own terms (the cost of each operation says which); not embedding
    look-ups, norms, activations, skips and soft caps. An approximation such as 6 for each parameter is never used.
    """
    return 3.0 * sum(component.flops for component in components(config, context_length))


def totals(parts: Sequence[Component], context: int) -> dict[str, float]:
    """Sums over the parts of a model.

    Args:
        parts: The model's `components`.
        context: Tokens of a row.
    """
    forward, step = sum(part.flops for part in parts), sum(part.step_flops for part in parts)
    outside = {name: sum(part.parameters for part in parts if part.name == name) for name in (EMBEDDING, HEAD)}
    parameters = sum(part.parameters for part in parts)
    return {
        "parameters": parameters,
        "parameters_without_embedding": parameters - outside[EMBEDDING],
        "parameters_without_embedding_and_head": parameters - sum(outside.values()),
        "training_flops_per_token": 3 * forward,
        "training_flops_per_row": 3 * forward * context,
        "inference_flops_per_token": forward,
        "inference_flops_per_row": forward * context,
        "step_flops": step,
        "kept_bytes_per_token": sum(part.kept_bytes for part in parts),
        "state_bytes": sum(part.state_bytes for part in parts),
        "step_traffic_bytes": sum(part.weight_bytes + part.state_traffic for part in parts),
    }


def state_bytes(config: ModelConfig, bytes_per_activation: int = 2, context_length: int = 0) -> int:
    """Bytes of what one sequence of `context_length` tokens leaves behind for the next.

    Cell states count in float32; the inputs that convolutions remember, an LSTM's state, and keys and values in
    `bytes_per_activation`. Only attention's part depends on the length.
    """
    return config.state_bytes(bytes_per_activation, context_length)
