"""Norms of gradients and activations by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

from xlstm_lm.parallel.process_group import World


def layer_of(parameter_name: str) -> str:
    """Name of the layer of a parameter: the number of a block, or the name of a module outside of the blocks."""
    first, *rest = parameter_name.split(".")
    return rest[0] if first == "blocks" else first


def gradient_norms(parameters: Mapping[str, nn.Parameter], stage: int, world: World) -> dict[str, Tensor]:
    """Euclidean norm of the gradient of each layer, before clipping. Collective; between backward pass and update.

    Args:
        parameters: All parameters by name.
        stage: ZeRO stage.
        world: All processes.

    Returns:
        Float32 scalars on the device, by names such as layers/3/gradient_norm.
    """
    squares: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        gradient = safe_get_local_grad(parameter) if stage == 3 else safe_get_full_grad(parameter)
        square = torch.zeros((), device=world.device)
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            square = norm.square().to(world.device)
        layer = layer_of(name)
        squares[layer] = squares[layer] + square if layer in squares else square
    together = torch.stack(list(squares.values()))
    if stage == 3:  # each rank has the norms of its shares
        world.sum_(together)
    return {f"layers/{layer}/gradient_norm": norm for layer, norm in zip(squares, together.sqrt(), strict=True)}


@contextlib.contextmanager
def activation_norms_observed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect, in a forward pass inside, the mean Euclidean norm of the vectors that each block passes on.

    Yields:
        Float32 scalars on the device by names such as layers/3/activation_norm; empty for a model without `blocks`.
    """
    found: dict[str, Tensor] = {}

    def observe(index: int, output: Any) -> None:
        x_BTD = output[0] if isinstance(output, tuple) else output
        found[f"layers/{index}/activation_norm"] = torch.linalg.vector_norm(x_BTD.float(), dim=-1).mean()

    blocks = getattr(model, "blocks", ())
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, index=index: observe(index, output))
        for index, block in enumerate(blocks)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
