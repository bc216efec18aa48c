"""Inputs for the mLSTM and the comparison with its definition, for the tests beside."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_lm.ops.mlstm import mlstm

NAMES = ("q", "k", "v", "i", "f", "C", "n")
FAST = ("chunkwise", "compiled")  # the backends that are made for training on a CPU


def make_inputs(
    B: int = 2,
    T: int = 16,
    H: int = 2,
    K: int = 4,
    V: int = 6,
    *,
    state: bool = False,
    input_mean: float = 0.0,
    forget_mean: float = 2.0,
    gate_spread: float = 3.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Leaves that require gradients, by name; with `state` also C and n, and m, which does not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread + mean).to(dtype)

    inputs = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "i": normal(B, T, H, mean=input_mean, spread=gate_spread),
        "f": normal(B, T, H, mean=forget_mean, spread=gate_spread),
    }
    if state:
        inputs |= {"C": normal(B, H, K, V), "n": normal(B, H, K), "m": normal(B, H, mean=input_mean)}
    for name in NAMES:
        if name in inputs:
            inputs[name].requires_grad_()
    return inputs


def make_resets(B: int, T: int, *positions: int) -> Tensor:
    """Resets of the first row at `positions`, of the others shifted by one each."""
    resets_BT = torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        for position in positions:
            if position + row < T:
                resets_BT[row, position + row] = True
    return resets_BT


def in_nan(x: Tensor) -> Tensor:
    """The same values as a view with odd strides, surrounded by NaN: what is read beside it shows."""
    storage = x.new_full([size + 2 for size in x.shape], float("nan"))
    inner = storage[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x.detach())
    return inner.requires_grad_(x.requires_grad)


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and the state after the last step."""
    state = (inputs["C"], inputs["n"], inputs["m"]) if "C" in inputs else None
    h, (C, n, m) = mlstm(*(inputs[name] for name in "qkvif"), initial_state=state, return_state=True, **options)
    return h, C, n, m


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients, by name, of one random linear function of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), weights)))


def assert_equal_to_definition(
    inputs: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10, *, backend: str, **options: object
) -> None:
    """Values, state and all gradients of a backend against the recurrence in float64.

    The tolerance is relative to the largest element of each tensor.
    """
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    definition_options = {name: x for name, x in options.items() if name != "chunk_length"}
    expected = run(exact, backend="recurrence", **definition_options)
    actual = run(inputs, backend=backend, **options)
    expected_gradients, actual_gradients = gradients(expected[:3], exact), gradients(actual[:3], inputs)
    pairs = {name: (a, e) for name, a, e in zip(("h", "C", "n", "m"), actual, expected)}
    pairs |= {f"d{name}": (actual_gradients[name], expected_gradients[name]) for name in actual_gradients}
    for name, (a, e) in pairs.items():
        assert torch.isfinite(a).all(), name
        error = (a.double() - e).abs().max().item()
        assert error <= rtol * e.abs().max().item() + atol, f"{name}: {error} of {e.abs().max().item()}"
