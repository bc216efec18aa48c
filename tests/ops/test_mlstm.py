"""The mLSTM's forms held to its definition, and the definition to transformers', in values and gradients."""

from __future__ import annotations

import importlib
from types import ModuleType
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xlstm_lm.ops.mlstm import BACKENDS, choose_backend, mlstm

NAMES = ("q", "k", "v", "i", "f", "C", "n")


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
    inputs: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10, **options: object
) -> None:
    """Values, state and all gradients of the chunkwise form against the recurrence in float64.

    The tolerance is relative to the largest element of each tensor.
    """
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    definition_options = {name: x for name, x in options.items() if name != "chunk_length"}
    expected = run(exact, backend="recurrence", **definition_options)
    actual = run(inputs, backend="chunkwise", **options)
    expected_gradients, actual_gradients = gradients(expected[:3], exact), gradients(actual[:3], inputs)
    pairs = {name: (a, e) for name, a, e in zip(("h", "C", "n", "m"), actual, expected)}
    pairs |= {f"d{name}": (actual_gradients[name], expected_gradients[name]) for name in actual_gradients}
    for name, (a, e) in pairs.items():
        assert torch.isfinite(a).all(), name
        error = (a.double() - e).abs().max().item()
        assert error <= rtol * e.abs().max().item() + atol, f"{name}: {error} of {e.abs().max().item()}"


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 100, 257])
def test_chunkwise_equals_definition_at_every_length(T: int, input_gate: str) -> None:
    inputs = make_inputs(T=T, K=3, V=5, state=True)
    assert_equal_to_definition(inputs, input_gate=input_gate)
    assert_equal_to_definition(inputs, input_gate=input_gate, resets=make_resets(2, T, 0, 63, 70, 71, 128))


@pytest.mark.parametrize("chunk_length", [1, 2, 5, 16, 64, 100, 1000])
@pytest.mark.parametrize("normalize", [True, False])
def test_chunkwise_equals_definition_at_every_chunk_length(chunk_length: int, normalize: bool) -> None:
    inputs = make_inputs(T=83, H=3, K=7, V=1)
    resets = make_resets(2, 83, 5, 9, 16, 64)
    assert_equal_to_definition(inputs, chunk_length=chunk_length, normalize=normalize)
    assert_equal_to_definition(inputs, chunk_length=chunk_length, normalize=normalize, resets=resets)


def test_many_blocks_of_chunks_equal_the_definition() -> None:
    inputs = make_inputs(T=300, K=2, V=3, state=True)
    assert_equal_to_definition(inputs, chunk_length=4)
    assert_equal_to_definition(inputs, chunk_length=4, resets=make_resets(2, 300, 3, 64, 128, 129, 200))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("input_mean", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_input_gates_far_from_zero(input_mean: float, eps: float, input_gate: str) -> None:
    inputs = make_inputs(T=70, input_mean=input_mean, state=True)
    assert_equal_to_definition(inputs, eps=eps, chunk_length=16, input_gate=input_gate)


@pytest.mark.parametrize("forget_mean", [-30.0, 0.0, 30.0])
def test_saturated_forget_gates(forget_mean: float) -> None:
    inputs = make_inputs(T=130, forget_mean=forget_mean, gate_spread=5.0, state=True)
    assert_equal_to_definition(inputs)
    assert_equal_to_definition(inputs, input_gate="sigmoid")


def test_alternating_forget_gates_do_not_wash_each_other_out() -> None:
    inputs = make_inputs(T=130, state=True)
    with torch.no_grad():
        inputs["f"][:, ::7] = -40.0
        inputs["f"][:, 1::7] = 40.0
    assert_equal_to_definition(inputs)


def test_padding_steps_change_nothing() -> None:
    """An input gate of -1e30 beside a forget gate of 1e30 is a step that did not happen."""
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(T=75, dtype=dtype)
        with torch.no_grad():
            inputs["i"][:, :70] = -1e30
            inputs["f"][:, :70] = 1e30
        h = run(inputs, chunk_length=16)[0]
        alone = run({name: x[:, 70:] for name, x in inputs.items()}, chunk_length=16)[0]
        assert torch.equal(h[:, :70], torch.zeros_like(h[:, :70]))
        torch.testing.assert_close(h[:, 70:], alone)
        assert all(torch.isfinite(g).all() for g in gradients((h,), inputs).values())


def test_an_input_gate_of_minus_infinity_lets_nothing_in() -> None:
    inputs = make_inputs(T=20)
    with torch.no_grad():
        inputs["i"][:, :3] = float("-inf")
        inputs["i"][0, 10] = float("-inf")
    assert_equal_to_definition(inputs, chunk_length=8)
    with torch.no_grad():
        step = [mlstm(*(inputs[name][:, :1] for name in "qkvif"), backend=name) for name in BACKENDS]
    assert all(torch.equal(h, torch.zeros_like(h)) for h in step)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_float32_is_close_to_the_exact_definition(input_gate: str) -> None:
    for resets in (None, make_resets(2, 257, 0, 64, 100)):
        inputs = make_inputs(T=257, K=16, V=24, dtype=torch.float32, gate_spread=1.0, state=True)
        assert_equal_to_definition(inputs, rtol=2e-5, atol=1e-6, input_gate=input_gate, resets=resets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_only_the_rounding_of_outputs(dtype: torch.dtype) -> None:
    inputs = make_inputs(T=100, K=16, V=24, dtype=torch.float32, gate_spread=1.0)
    for name in "qkv":
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    h, C, n, m = run(inputs)
    assert h.dtype == dtype
    assert C.dtype == n.dtype == m.dtype == torch.float32
    found = gradients((h,), inputs)
    assert all(found[name].dtype == inputs[name].dtype for name in found)
    assert_equal_to_definition(inputs, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_autocast_does_not_reach_the_products() -> None:
    inputs = make_inputs(T=70, K=16, V=16, dtype=torch.float32)
    expected = run(inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = run(inputs)[0]
        found = gradients((h,), inputs)
    assert torch.equal(h, expected)
    for name, gradient in gradients((expected,), inputs).items():
        assert torch.equal(found[name], gradient), name


def test_views_of_any_strides() -> None:
    B, T, H, K, V = 2, 130, 2, 4, 6
    inputs = make_inputs(B, T, H, K, V)
    views = {
        "q": inputs["q"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([inputs["k"], inputs["v"]], -1).detach()[..., :K],
        "v": torch.cat([inputs["k"], inputs["v"]], -1).detach()[..., K:],
        "i": torch.stack([inputs["i"], inputs["f"]], -1).detach()[..., 0],
        "f": torch.stack([inputs["i"], inputs["f"]], -1).detach()[..., 1],
    }
    assert not any(x.is_contiguous() for x in views.values())
    for x in views.values():
        x.requires_grad_()
    h, h_views = run(inputs)[0], run(views)[0]
    torch.testing.assert_close(h_views, h)
    weight = torch.randn(B, H, V, T, dtype=torch.float64).permute(0, 3, 1, 2)  # so is dh no contiguous tensor either
    for expected, actual in zip(
        torch.autograd.grad(h, inputs.values(), weight), torch.autograd.grad(h_views, views.values(), weight)
    ):
        torch.testing.assert_close(actual, expected)
    one = torch.autograd.grad(run(views)[0].sum(), views.values())  # dh is an expanded scalar
    two = torch.autograd.grad(run(inputs)[0], inputs.values(), torch.ones_like(h))
    for expected, actual in zip(two, one):
        torch.testing.assert_close(actual, expected)


def test_more_rows_than_a_part_holds() -> None:
    """Rows and heads are taken in parts: their number must not show."""
    inputs = make_inputs(B=40, T=64, H=3, K=2, V=2)
    h = run(inputs)
    found = gradients(h[:3], inputs)
    for row in (0, 31, 32, 39):
        alone = {name: x[row : row + 1].detach().requires_grad_() for name, x in inputs.items()}
        h_alone = run(alone)
        for a, e in zip(h_alone, h):
            torch.testing.assert_close(a[0], e[row])
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64)[row : row + 1] for x in h[:3]]
        for name, gradient in zip(alone, torch.autograd.grad(h_alone[:3], alone.values(), weights)):
            torch.testing.assert_close(gradient[0], found[name][row])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_any_resets_any_options(data: st.DataObject) -> None:
    B, T, H = (data.draw(st.integers(1, upper), label=name) for name, upper in (("B", 3), ("T", 40), ("H", 3)))
    K, V = data.draw(st.integers(1, 9), label="K"), data.draw(st.integers(1, 9), label="V")
    inputs = make_inputs(
        B,
        T,
        H,
        K,
        V,
        state=data.draw(st.booleans(), label="state"),
        input_mean=data.draw(st.sampled_from([-10.0, 0.0, 10.0]), label="input_mean"),
        forget_mean=data.draw(st.sampled_from([-10.0, 0.0, 10.0]), label="forget_mean"),
        seed=data.draw(st.integers(0, 2**31), label="seed"),
    )
    flags = data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T) | st.none(), label="resets")
    assert_equal_to_definition(
        inputs,
        rtol=1e-8,
        resets=None if flags is None else torch.tensor(flags).view(B, T),
        chunk_length=data.draw(st.integers(1, 45), label="chunk_length"),
        input_gate=data.draw(st.sampled_from(["exp", "sigmoid"]), label="input_gate"),
        normalize=data.draw(st.booleans(), label="normalize"),
        eps=data.draw(st.sampled_from([0.0, 1e-6]), label="eps"),
    )


def in_true_units(
    inputs: dict[str, Tensor], names: list[str], *leaves: Tensor, **options: object
) -> tuple[Tensor, ...]:
    """h, C e^m, n e^m as functions of the named leaves: what finite differences can tell the derivatives of."""
    h, C, n, m = run(inputs | dict(zip(names, leaves)), **options)
    return h, C * m.exp()[..., None, None], n * m.exp()[..., None]


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize(("T", "positions"), [(1, ()), (5, ()), (7, (0, 2, 4))])
def test_gradients_by_finite_differences(
    T: int, positions: tuple[int, ...], state: bool, normalize: bool, input_gate: str
) -> None:
    """With eps = 0, where m leaves no trace. Every element for the chunkwise form, random directions for the other."""
    inputs = make_inputs(B=1, T=T, H=1, K=2, V=3, gate_spread=1.0, forget_mean=1.0, state=state)
    names = [name for name in inputs if name != "m"]
    options = {"eps": 0.0, "input_gate": input_gate, "normalize": normalize}
    if positions:
        options["resets"] = make_resets(1, T, *positions)
    for backend in ("chunkwise", "recurrence"):
        torch.autograd.gradcheck(
            lambda *leaves, backend=backend: in_true_units(
                inputs, names, *leaves, backend=backend, chunk_length=3, **options
            ),
            [inputs[name] for name in names],
            fast_mode=backend == "recurrence",
        )


@pytest.mark.parametrize("backend", ["recurrence", "chunkwise"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("cut", [1, 16, 30, 49])
def test_two_halves_are_one_whole(backend: str, input_gate: str, cut: int) -> None:
    inputs = make_inputs(T=50, state=True)
    resets = make_resets(2, 50, 10, 30)
    options = {"backend": backend, "input_gate": input_gate, "chunk_length": 16}
    whole = run(inputs, resets=resets, **options)
    first = run(
        {name: x[:, :cut] if name in "qkvif" else x for name, x in inputs.items()}, resets=resets[:, :cut], **options
    )
    handed = dict(zip("Cnm", first[1:]))
    second = run({name: inputs[name][:, cut:] for name in "qkvif"} | handed, resets=resets[:, cut:], **options)
    halves = (torch.cat([first[0], second[0]], 1), *second[1:])
    for a, e in zip(halves, whole):
        torch.testing.assert_close(a, e)
    expected, actual = gradients(whole[:3], inputs), gradients(halves[:3], inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("output", ["h", "C", "n"])
def test_a_gradient_of_one_output_only(output: str) -> None:
    inputs = make_inputs(T=20, state=True)
    index = "hCn".index(output)
    leaves = [inputs[name] for name in {"h": "qkvifCn", "C": "kvifC", "n": "kifn"}[output]]
    expected = torch.autograd.grad(run(inputs, backend="recurrence")[index].sin().sum(), leaves)
    actual = torch.autograd.grad(run(inputs, backend="chunkwise", chunk_length=8)[index].sin().sum(), leaves)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["recurrence", "chunkwise"])
def test_packed_documents_are_the_documents_alone(backend: str) -> None:
    lengths = [1, 30, 64, 5, 28, 2]
    T = sum(lengths)
    inputs = make_inputs(B=1, T=T, state=True, gate_spread=5.0)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    packed = run(inputs, resets=make_resets(1, T, *starts), backend=backend)
    documents = [
        run({name: inputs[name][:, start : start + length] for name in "qkvif"}, backend=backend)
        for start, length in zip(starts, lengths)
    ]
    alone = (torch.cat([h for h, *_ in documents], 1), *documents[-1][1:])
    for a, e in zip(packed, alone):
        torch.testing.assert_close(a, e)
    del inputs["m"]
    found = gradients(packed[:3], inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in alone[:3]]
    expected = torch.autograd.grad(alone[:3], [inputs[name] for name in "qkvif"], weights)
    for name, e in zip("qkvif", expected):
        torch.testing.assert_close(found[name], e)
    assert not found["C"].any()  # the first document begins with a reset: the initial state is not seen
    assert not found["n"].any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = make_inputs(T=40, dtype=torch.float32)
    leaves = [inputs[name] for name in "qkvif"]
    expected = torch.autograd.grad(mlstm(*leaves).sin().sum(), leaves)
    for x in leaves:
        x.grad = None
    checkpoint(mlstm, *leaves, use_reentrant=use_reentrant).sin().sum().backward()
    for x, e in zip(leaves, expected):
        assert torch.equal(x.grad, e)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_equal_the_whole_sequence(input_gate: str, normalize: bool) -> None:
    inputs = make_inputs(T=20)
    resets = make_resets(2, 20, 0, 7, 8)
    options = {"input_gate": input_gate, "normalize": normalize}
    expected = run(inputs, resets=resets, backend="recurrence", **options)
    state = None
    with torch.no_grad():
        for t in range(20):
            step = [inputs[name][:, t : t + 1] for name in "qkvif"]
            before = None if state is None else [x.clone() for x in state]
            h, next_state = mlstm(
                *step, resets=resets[:, t : t + 1], initial_state=state, return_state=True, backend="step", **options
            )
            torch.testing.assert_close(h[:, 0], expected[0][:, t])
            if before is not None:
                assert all(torch.equal(x, y) for x, y in zip(state, before)), "the caller's state was written to"
            state = next_state
    for a, e in zip(state, expected[1:]):
        torch.testing.assert_close(a, e)


def test_the_backend_is_chosen_by_what_is_asked() -> None:
    inputs = make_inputs(T=1)
    leaves = [inputs[name] for name in "qkvif"]
    assert choose_backend(*leaves) == "chunkwise"
    with torch.no_grad():
        assert choose_backend(*leaves) == "step"
    assert choose_backend(*(x.detach() for x in leaves)) == "step"
    assert choose_backend(*(x.detach() for x in leaves), torch.zeros(1, requires_grad=True)) == "chunkwise"
    assert choose_backend(*(x.detach() for x in make_inputs(T=2).values())) == "chunkwise"


@pytest.fixture(scope="module")
def transformers_mlstm() -> ModuleType:
    """transformers' own functions: beside an `xlstm` package it would import that one's, which need mlstm_kernels."""
    with mock.patch("transformers.utils.is_xlstm_available", return_value=False):
        return importlib.import_module("transformers.models.xlstm.modeling_xlstm")


@pytest.mark.parametrize("backend", ["recurrence", "chunkwise"])
@pytest.mark.parametrize("input_mean", [0.0, 10.0])
def test_transformers_computes_the_same(transformers_mlstm: ModuleType, backend: str, input_mean: float) -> None:
    """Its recurrent form starts from m = 0, not -inf, which shows in m itself; elsewhere only eps would tell."""
    B, T, H, K, V = 2, 37, 3, 8, 12
    inputs = make_inputs(B, T, H, K, V, input_mean=input_mean)
    with torch.no_grad():
        heads_first = [inputs[name].transpose(1, 2) for name in "qkvif"]
        expected, (C, n, m) = transformers_mlstm.mlstm_recurrent_sequence_native(
            *heads_first, return_last_states=True, eps=1e-6, dtype_state=torch.float64
        )
        h, *state = run(inputs, backend=backend)
        m = m.view(B, H)
        torch.testing.assert_close(h, expected.transpose(1, 2), rtol=1e-5, atol=1e-8)
        in_units = [(x * y.exp().view(B, H, *(1,) * (x.dim() - 2))) for x, y in ((C, m), (n, m))]
        ours = [(x * state[2].exp().view(B, H, *(1,) * (x.dim() - 2))) for x in state[:2]]
        for a, e in zip(ours, in_units):
            torch.testing.assert_close(a, e)


def test_m_is_the_recurrent_stabilizer() -> None:
    inputs = make_inputs(T=30)
    log_forget = torch.nn.functional.logsigmoid(inputs["f"].detach())
    m = torch.full((2, 2), float("-inf"), dtype=torch.float64)
    for t in range(30):
        m = torch.maximum(log_forget[:, t] + m, inputs["i"][:, t].detach())
    for backend in ("recurrence", "chunkwise"):
        torch.testing.assert_close(run(inputs, backend=backend)[3], m)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 6)}, r"q and v must be \(B, T, H, K\)"),
        ({"v": (2, 4, 3)}, r"q and v must be \(B, T, H, K\)"),
        ({"k": (2, 4, 3, 5)}, r"k must be \(2, 4, 3, 6\).*got \(2, 4, 3, 5\)"),
        ({"v": (2, 4, 2, 5)}, r"v must be \(2, 4, 3, 5\).*got \(2, 4, 2, 5\)"),
        ({"i": (2, 3, 4)}, r"i must be \(2, 4, 3\).*got \(2, 3, 4\)"),
        ({"f": (2, 4, 3, 1)}, r"f must be \(2, 4, 3\)"),
        ({"resets": (4,)}, r"resets must be \(2, 4\)"),
        ({"C": (2, 3, 5, 6)}, r"initial_state C must be \(2, 3, 6, 5\)"),
        ({"n": (2, 3, 5)}, r"initial_state n must be \(2, 3, 6\)"),
        ({"m": (2, 3, 1)}, r"initial_state m must be \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (2, 4, 3, 6), "k": (2, 4, 3, 6), "v": (2, 4, 3, 5), "i": (2, 4, 3), "f": (2, 4, 3)}
    shapes |= {"resets": (2, 4), "C": (2, 3, 6, 5), "n": (2, 3, 6), "m": (2, 3)}
    x = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        mlstm(*(x[name] for name in "qkvif"), resets=x["resets"].bool(), initial_state=(x["C"], x["n"], x["m"]))


def test_other_arguments_that_do_not_fit_are_named() -> None:
    inputs = [x.detach() for x in make_inputs(T=4).values()]
    with pytest.raises(ValueError, match="Unknown input_gate 'relu': choose one of 'exp', 'sigmoid'"):
        mlstm(*inputs, input_gate="relu")
    with pytest.raises(
        ValueError, match="Unknown mLSTM backend 'fast': choose 'auto' or one of 'recurrence', 'chunkwise'"
    ):
        mlstm(*inputs, backend="fast")
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        mlstm(*inputs, chunk_length=0)
    with pytest.raises(ValueError, match="empty"):
        mlstm(*(x[:, :0] for x in inputs))
    with pytest.raises(ValueError, match="resets must be bool"):
        mlstm(*inputs, resets=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        mlstm(inputs[0].long(), *inputs[1:])
    with pytest.raises(ValueError, match=r"initial_state must be \(C, n, m\), got 2"):
        mlstm(*inputs, initial_state=(torch.zeros(2, 2, 4, 6), torch.zeros(2, 2, 4)))
    with pytest.raises(ValueError, match="one token"):
        mlstm(*inputs, backend="step")
