"""Inputs for the mLSTM and the comparison with its definition, for the tests beside."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor

from xlstm_lm.ops.mlstm import MLSTM, mlstm

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
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Leaves that require gradients, by name; with `state` also C and n, and m, which does not. Alike on any device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread + mean).to(device, dtype)

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


def make_resets(B: int, T: int, *positions: int, device: str = "cpu") -> Tensor:
    """Resets of the first row at `positions`, of the others shifted by one each."""
    resets_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
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
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), weights)))


def assert_equal_to_definition(
    inputs: dict[str, Tensor],
    rtol: float = 1e-9,
    atol: float = 1e-10,
    *,
    exponent_error: float = 0.0,
    backend: str,
    **options: object,
) -> None:
    """Values, state and all gradients of a backend against the recurrence in float64.

    The tolerance is relative to the largest element of each tensor. With `exponent_error` three times the errors are
    added that the recurrence makes in the inputs' own type where each of its input gates is off by up to so much: where
    a normalizer nearly vanishes, no form is exact in float32.
    """
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    definition = {name: x for name, x in options.items() if name != "chunk_length"} | {"backend": "recurrence"}
    expected = _everything(run(exact, **definition), exact)
    actual = _everything(run(inputs, backend=backend, **options), inputs)
    rounded = None
    if exponent_error:
        off = torch.rand(inputs["i"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
        gates = inputs["i"].detach().double() + exponent_error * off.to(inputs["i"].device)
        moved = inputs | {"i": gates.to(inputs["i"].dtype).requires_grad_()}
        rounded = _everything(run(moved, **definition), moved)
    _assert_close(actual, expected, inputs, rtol, atol, rounded)


def assert_halves_equal_the_whole(
    inputs: dict[str, Tensor],
    cut: int,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    *,
    resets: Tensor | None = None,
    **options: object,
) -> None:
    """Two calls, the second from the first one's state, against one: values, state and all gradients."""
    whole = run(inputs, resets=resets, **options)
    first_resets, second_resets = (None, None) if resets is None else (resets[:, :cut], resets[:, cut:])
    state = {name: inputs[name] for name in "Cnm" if name in inputs}
    first = run({name: inputs[name][:, :cut] for name in "qkvif"} | state, resets=first_resets, **options)
    handed = dict(zip("Cnm", first[1:]))
    second = run({name: inputs[name][:, cut:] for name in "qkvif"} | handed, resets=second_resets, **options)
    halves = (torch.cat([first[0], second[0]], 1), *second[1:])
    _assert_close(_everything(halves, inputs), _everything(whole, inputs), inputs, rtol, atol)


def assert_equal_under_autocast(**options: object) -> None:
    """Values, state and all gradients, as without it."""
    inputs = make_inputs(B=1, T=20, K=16, V=16, dtype=torch.float32, state=True)
    expected = _everything(run(inputs, **options), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _everything(run(inputs, **options), inputs)
    for name, right in expected.items():
        assert torch.equal(found[name], right), name


def _everything(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """h, the state and all gradients, by name."""
    found = {f"d{name}": x for name, x in gradients(outputs[:3], inputs).items()}
    return dict(zip(("h", "C", "n", "m"), outputs)) | found


def _assert_close(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    inputs: dict[str, Tensor],
    rtol: float,
    atol: float,
    rounded: dict[str, Tensor] | None = None,
) -> None:
    def largest_error(name: str, x: Tensor) -> float:
        return (x.double() - expected[name]).abs().max().item()

    allowed = {name: atol + rtol * x.abs().max().item() for name, x in expected.items()}
    for name in "qk":  # df is a sum of the differences of q . dq and k . dk
        terms_BTH = torch.linalg.vecdot(inputs[name].detach().double(), expected[f"d{name}"].double())
        allowed["df"] = max(allowed["df"], rtol * terms_BTH.abs().max().item())
    if rounded is not None:
        allowed = {name: x + 3.0 * largest_error(name, rounded[name]) for name, x in allowed.items()}
    for name, x in actual.items():
        assert torch.isfinite(x).all(), name
        error = largest_error(name, x)
        assert error <= allowed[name], f"{name}: {error}, allowed {allowed[name]}"


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Allowed error relative to the largest entry, in any of the cases below; in 16 bits, of products in that type."""


def super_chunks_of(chunks: int) -> contextlib.AbstractContextManager:
    """The Triton backend with super-chunks of `chunks` chunks at least: a few steps then make several."""
    return mock.patch.dict(MLSTM["triton"].arguments, {"super_chunk": chunks})


def launched_for(architecture: str | None) -> contextlib.AbstractContextManager:
    """Have the Triton kernels launched as on such a GPU."""
    if architecture is None:
        return contextlib.nullcontext()
    from xlstm_lm.ops.mlstm import triton_op

    return mock.patch.object(triton_op, "architecture", lambda device: architecture)


def check_case(
    backend: str,
    B: int = 2,
    T: int = 40,
    H: int = 2,
    K: int = 16,
    V: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    state: bool = True,
    resets: tuple[int, ...] | None = (0, 16, 21, 39),
    input_mean: float = 0.0,
    forget_mean: float = 2.0,
    gate_spread: float = 2.0,
    seed: int = 0,
    chunks: int = 2,
    architecture: str | None = None,
    cut: int | None = None,
    device: str = "cpu",
    **options: object,
) -> None:
    """One case of a backend against the definition, from inputs that lie in larger tensors full of NaN; with `cut` also
    in two halves. `resets` are steps of the first row, one later in each next one; `chunks` is how many the Triton
    kernels have in a super-chunk, `architecture` for which GPU they are launched. Nothing is returned,
    because it also runs in a process beside."""
    gates = {"input_mean": input_mean, "forget_mean": forget_mean, "gate_spread": gate_spread}
    inputs = make_inputs(B, T, H, K, V, state=state, seed=seed, device=device, **gates)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.detach().to(dtype if name in "qkv" else wide) for name, x in inputs.items()}
    inputs = {name: in_nan(x.requires_grad_(name != "m")) for name, x in inputs.items()}
    options["resets"] = None if resets is None else make_resets(B, T, *resets, device=device)
    options["backend"] = backend
    # The exponents of the weights are differences of sums of log forget gates.
    largest_sum = torch.nn.functional.logsigmoid(inputs["f"].detach()).sum(1).abs().max().item()
    exponent_error = torch.finfo(wide).eps * largest_sum
    rtol = TOLERANCE[dtype] + exponent_error
    with super_chunks_of(chunks), launched_for(architecture):
        assert_equal_to_definition(inputs, rtol, exponent_error=exponent_error, **options)
        if cut is not None:
            assert_halves_equal_the_whole(inputs, cut, rtol, **options)
