"""Whether a function computes what its definition says, values and gradients; and small inputs to ask it with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.compiling import constant_result

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a kernel may be from its definition, of the largest entry of a value or gradient."""

STATE_ENTRIES = 2**17
"""Of all rows and heads together, so that the memory of the definition stays small for the widest heads."""

Function = TypeVar("Function", bound=Callable)
Checked = Callable[..., Tensor | tuple[Tensor, ...]]
"""What is checked: a function of tensors, all of them leaves."""


def asked_once(function: Function) -> Function:
    """`function`, a question about this machine, with its answers kept: asked once a process for each arguments.

    Also where torch.compile traces the caller. (It would follow a function with `functools.cache` around it inside.)
    """
    cached = functools.cache(function)

    @constant_result
    @functools.wraps(function)
    def ask(*arguments: object) -> object:
        return cached(*arguments)

    return ask


def what_is_wrong(
    prepare: Callable[[], tuple[Checked, Checked, list[Tensor]]],
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = True,
) -> tuple[str, str] | None:
    """How kernels fail on a device: "do not run" or "are wrong", and the reason; None if they compute the definition.

    `prepare` gives them, their definition and the inputs to compare them on. Neither the random state nor the mode of
    autograd that the caller is in makes a difference, or changes; nor does activation checkpointing, which counts what
    is saved.
    """
    itself = lambda saved: saved
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(itself, itself),
    ):
        torch.manual_seed(0)
        try:
            error = compare(*prepare(), gradients=gradients)
        except Exception as caught:  # whatever a compiler, an assembler or a driver comes up with
            return "do not run", (str(caught).strip() or type(caught).__name__).splitlines()[0]
    return None if error <= TOLERANCE.get(dtype, 1e-9) else ("are wrong", f"error {error:.1e}")


def proves_right(
    prepare: Callable[[], tuple[Checked, Checked, list[Tensor]]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernel: str,
    sizes: str = "",
    instead: str,
) -> bool:
    """Whether nothing is wrong (`what_is_wrong`, values and gradients); if something is, says what runs instead."""
    found = what_is_wrong(prepare, device, dtype)
    if found is not None:
        verdict, reason = found
        announce_once(f"{kernel} {verdict} on {device}, {dtype}{sizes} ({reason}): {instead}")
    return found is None


def compare(function: Checked, definition: Checked, inputs: list[Tensor], gradients: bool = True) -> float:
    """Largest error of the values and, by default, of every gradient of `function` against `definition` in float64.

    Each is relative to the largest entry of what it should be; infinite where anything is not finite.
    """
    return max(errors(function, definition, inputs, gradients))


def errors(function: Checked, definition: Checked, inputs: list[Tensor], gradients: bool = True) -> tuple[float, float]:
    """As `compare`, apart: the largest error of the values, and of the gradients (0 where none was asked for)."""
    leaves = [each.detach().requires_grad_(gradients) for each in inputs]
    exact_leaves = [each.detach().double().requires_grad_(gradients) for each in inputs]
    values, exact = _several(function(*leaves)), _several(definition(*exact_leaves))
    of_values = _largest_distance(values, exact)
    if not gradients:
        return of_values, 0.0
    upstream = [torch.randn_like(each) for each in exact]
    ours = torch.autograd.grad(values, leaves, [each.to(x.dtype) for each, x in zip(upstream, values, strict=True)])
    right = torch.autograd.grad(exact, exact_leaves, upstream)
    return of_values, _largest_distance(ours, right)


def _several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else values


def _largest_distance(ours: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    return max(_distance(one.detach(), other.detach()) for one, other in zip(ours, right, strict=True))


def _distance(ours: Tensor, right: Tensor) -> float:
    if not (torch.isfinite(ours).all() and torch.isfinite(right).all()):
        return float("inf")
    error = (ours.double() - right).abs().max()
    return float(error / right.abs().max()) if error > 0 else 0.0


def mlstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 100, H: int = 2, K: int = 16, V: int = 24
) -> list[Tensor]:
    """q, k, v, i and f as a model hands them over: views of one projection, gates in float32."""
    projected = torch.randn(B, T, H * (2 * K + V), device=device, dtype=dtype)
    heads = [each.unflatten(-1, (H, -1)) for each in projected.split((H * K, H * K, H * V), dim=-1)]
    gates = torch.randn(B, T, 2 * H, device=device).chunk(2, dim=-1)
    return [*heads, *(gate + shift for gate, shift in zip(gates, (-1.0, 3.0), strict=True))]


def mlstm_inputs_and_state(device: torch.device | str, dtype: torch.dtype, *, H: int, K: int, V: int) -> list[Tensor]:
    """q, k, v, i, f of at most H heads, and C and n of a state, to check kernels for heads of such sizes with: more
    steps than a chunk has, and no multiple of any."""
    H = max(1, min(H, STATE_ENTRIES // (2 * K * V)))
    inputs = mlstm_inputs(device, dtype, T=70, H=H, K=K, V=V)
    return [*inputs, torch.randn(2, H, K, V, device=device), torch.randn(2, H, K, device=device)]


def from_state_to_state(mlstm: Callable[..., tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]) -> Checked:
    """The mLSTM as a function of q, k, v, i, f, C and n (the first state; m is 0): h, and C and n of the last state."""

    def function(*inputs: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, C_BHKV, n_BHK = inputs
        state = (C_BHKV, n_BHK, torch.zeros_like(n_BHK[..., 0]))
        h_BTHV, (C_BHKV, n_BHK, _) = mlstm(*inputs, initial_state=state, return_state=True, **options)
        return h_BTHV, C_BHKV, n_BHK

    return function


def slstm_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 70, H: int = 2, D: int = 24
) -> list[Tensor]:
    """wx, r and bias."""
    shapes = ((B, T, 4, H, D), (4, H, D, D), (4, H, D))
    scales = (1.0, D**-0.5, 1.0)
    return [scale * torch.randn(shape, device=device, dtype=dtype) for shape, scale in zip(shapes, scales, strict=True)]


def scan_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int = 2, T: int = 100, E: int = 24, N: int = 16
) -> list[Tensor]:
    """x, dt, a, b, c and a state for the selective scan; dt, a and the state in float32."""
    x, b, c = (torch.randn(B, T, width, device=device, dtype=dtype) for width in (E, N, N))
    dt, a, state = (torch.randn(shape, device=device) for shape in ((B, T, E), (E, N), (B, E, N)))
    return [x, F.softplus(dt - 2), -a.exp(), b, c, state]


def ssd_inputs(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    B: int = 2,
    T: int = 300,
    H: int = 2,
    P: int = 64,
    G: int = 1,
    N: int = 128,
) -> list[Tensor]:
    """x, dt, a, b, c and a state for SSD, longer than mamba_ssm's chunks; dt, a and the state in float32."""
    x, b, c = (torch.randn(B, T, *sizes, device=device, dtype=dtype) for sizes in ((H, P), (G, N), (G, N)))
    dt, a, state = (torch.randn(shape, device=device) for shape in ((B, T, H), (H,), (B, H, N, P)))
    return [x, F.softplus(dt - 2), -a.exp(), b, c, state]


def with_states(operation: Callable[..., tuple[Tensor, Tensor]]) -> Checked:
    """Such an operation as a function of all these, the state too: its values and its last state."""

    def function(*inputs: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        *inputs, state = inputs
        return operation(*inputs, initial_state=state, return_state=True, **options)

    return function


def some_resets(inputs: list[Tensor]) -> Tensor:
    """(B, T) for such inputs. Documents of the first row start at 0, in the middle of a chunk, at its border, and at
    the last token; those of the others once, so that a first state is seen before and states pass all borders after."""
    B, T = inputs[0].shape[:2]
    resets_BT = torch.zeros(B, T, dtype=torch.bool, device=inputs[0].device)
    resets_BT[0, [0, min(31, T - 1), min(64, T - 1), -1]] = True
    resets_BT[1:, min(5, T - 1)] = True
    return resets_BT
