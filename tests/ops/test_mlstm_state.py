"""The mLSTM's gradients by finite differences, states handed on, steps, other people's code, and what it refuses."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.mlstm_cases import FAST, assert_halves_equal_the_whole, gradients, make_inputs, make_resets, run
from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops import operation
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.mlstm import MLSTM, mlstm
from xlstm_lm.ops.mlstm.recurrence import Options


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
    """With eps = 0, where m leaves no trace. Every element for the fast forms, random directions for the definition."""
    inputs = make_inputs(B=1, T=T, H=1, K=2, V=3, gate_spread=1.0, forget_mean=1.0, state=state)
    names = [name for name in inputs if name != "m"]
    options = {"eps": 0.0, "input_gate": input_gate, "normalize": normalize}
    if positions:
        options["resets"] = make_resets(1, T, *positions)
    for backend in ("recurrence", *FAST):
        torch.autograd.gradcheck(
            lambda *leaves, backend=backend: in_true_units(
                inputs, names, *leaves, backend=backend, chunk_length=3, **options
            ),
            [inputs[name] for name in names],
            fast_mode=backend == "recurrence",
        )


@pytest.mark.parametrize("backend", ["recurrence", *FAST])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("cut", [1, 16, 30, 49])
def test_two_halves_are_one_whole(backend: str, input_gate: str, cut: int) -> None:
    assert_halves_equal_the_whole(
        make_inputs(T=50, state=True),
        cut,
        resets=make_resets(2, 50, 10, 30),
        backend=backend,
        input_gate=input_gate,
        chunk_length=16,
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("output", ["h", "C", "n"])
def test_a_gradient_of_one_output_only(output: str, backend: str) -> None:
    inputs = make_inputs(T=20, state=True)
    index = "hCn".index(output)
    leaves = [inputs[name] for name in {"h": "qkvifCn", "C": "kvifC", "n": "kifn"}[output]]
    expected = torch.autograd.grad(run(inputs, backend="recurrence")[index].sin().sum(), leaves)
    actual = torch.autograd.grad(run(inputs, backend=backend, chunk_length=8)[index].sin().sum(), leaves)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["recurrence", *FAST])
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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, backend: str) -> None:
    inputs = make_inputs(T=40, dtype=torch.float32)
    leaves = [inputs[name] for name in "qkvif"]
    cell = functools.partial(mlstm, backend=backend)
    expected = torch.autograd.grad(cell(*leaves).sin().sum(), leaves)
    for x in leaves:
        x.grad = None
    checkpoint(cell, *leaves, use_reentrant=use_reentrant).sin().sum().backward()
    for x, e in zip(leaves, expected):
        assert torch.equal(x.grad, e)


def test_the_backend_is_chosen_by_what_is_asked() -> None:
    def chosen(*inputs: Tensor) -> str:
        q = inputs[0]
        sizes = {"K": q.shape[-1], "V": inputs[2].shape[-1]}
        return MLSTM.backend_for(inputs, options=MLSTM.options, one_step=q.shape[1] == 1, **sizes).name

    inputs = make_inputs(T=1)
    leaves = [inputs[name] for name in "qkvif"]
    assert chosen(*leaves) == "compiled"
    with torch.no_grad():
        assert chosen(*leaves) == "step"
    assert chosen(*(x.detach() for x in leaves)) == "step"
    assert chosen(*(x.detach() for x in leaves), torch.zeros(1, requires_grad=True)) == "compiled"
    assert chosen(*(x.detach() for x in make_inputs(T=2).values())) == "compiled"
    assert chosen(*(x.to("meta") for x in leaves)) == "chunkwise"


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("right", [True, False])
def test_a_gpu_takes_the_kernels_that_prove_right(
    right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")
    announce_once.cache_clear()
    for limits in ("why_not", "why_not_step"):  # no GPU is here to be looked at
        monkeypatch.setattr(f"xlstm_lm.ops.mlstm.triton_launch.{limits}", lambda *_: None)
    asked = []
    verdict = lambda operation, name, call: asked.append((name, call.has_resets)) or (None if right else "it is wrong")
    monkeypatch.setattr(operation, "verdict", verdict)
    several = make_call(torch.device("cuda", 0), torch.float32, {"K": 8, "V": 24}, MLSTM.options)
    one = several._replace(one_step=True, needs_gradient=False)
    sigmoid = several._replace(options=Options(input_gate="sigmoid"))
    no_resets = several._replace(has_resets=False)
    chosen = lambda call: operation.choose(MLSTM, call).backend
    assert chosen(one) == ("triton_step" if right else "step")
    for call in (several, several._replace(one_step=True), sigmoid, no_resets):
        assert chosen(call) == ("triton" if right else "chunkwise")
    expected = [("triton_step", True), *[("triton", True)] * 3, ("triton", False)]
    assert asked == expected
    assert chosen(several._replace(dtype=torch.float64)) == "chunkwise", "the kernels have no float64"
    assert chosen(one._replace(dtype=torch.float64)) == "step"
    assert asked == expected
    assert ("`triton`: it is wrong" in caplog.text) == (not right)
    assert "not torch.float64" in caplog.text


@pytest.fixture(scope="module")
def transformers_mlstm() -> ModuleType:
    """transformers' own functions: beside an `xlstm` package it would import that one's, which need mlstm_kernels."""
    with mock.patch("transformers.utils.is_xlstm_available", return_value=False):
        return importlib.import_module("transformers.models.xlstm.modeling_xlstm")


@pytest.mark.parametrize("backend", ["recurrence", *FAST])
@pytest.mark.parametrize("input_mean", [0.0, 10.0])
def test_transformers_computes_the_same(transformers_mlstm: ModuleType, backend: str, input_mean: float) -> None:
    """The recurrent form there starts from m = 0, not -inf, which shows in m itself; elsewhere only in eps."""
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
    for backend in ("recurrence", *FAST):
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
        ValueError, match="unknown mlstm backend 'fast': choose 'auto' or one of .*'chunkwise', 'recurrence'"
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
