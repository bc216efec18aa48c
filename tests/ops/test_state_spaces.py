"""Mamba's recurrences: every form of SSD and of the selective scan against its definition in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from xlstm_lm.ops.selective_scan import selective_scan
from xlstm_lm.ops.selfcheck import compare
from xlstm_lm.ops.ssd import ssd


def flat(result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.flatten() for each in result])


def run_ssd(x, dt, a, b, c, *state, resets=None, backend="auto"):
    options = {"resets": resets, "initial_state": state[0] if state else None, "return_state": True}
    return flat(ssd(x, F.softplus(dt - 2), -a.exp(), b, c, backend=backend, **options))


def run_scan(x, dt, a, b, c, *state, resets=None, backend="auto"):
    options = {"resets": resets, "initial_state": state[0] if state else None, "return_state": True}
    return flat(selective_scan(x, F.softplus(dt - 2), -a.exp(), b, c, backend=backend, **options))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("T", "G", "N", "P"), [(1, 1, 4, 3), (70, 2, 16, 8), (130, 4, 9, 20)])
def test_ssd_by_the_mlstms_kernels(T, G, N, P, with_state):
    torch.manual_seed(0)
    B, H = 2, 4
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, G, N), (B, T, G, N)] + [(B, H, N, P)] * with_state
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    resets = torch.rand(B, T) < 0.05
    ours, definition = (functools.partial(run_ssd, resets=resets, backend=name) for name in ("mlstm", "recurrence"))
    assert compare(ours, definition, inputs) < 1e-9
    assert compare(ours, definition, [each.float() for each in inputs]) < 1e-4


def test_ssd_survives_steps_that_forget_all_and_nothing():
    torch.manual_seed(0)
    shapes = [(1, 90, 2, 4), (1, 90, 2), (2,), (1, 90, 1, 8), (1, 90, 1, 8)]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[1] *= 30
    ours, definition = (functools.partial(run_ssd, backend=name) for name in ("mlstm", "recurrence"))
    assert compare(ours, definition, inputs) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("T", "E", "N"), [(1, 3, 4), (33, 16, 16), (65, 70, 5), (100, 200, 16)])
def test_the_compiled_scan(T, E, N, with_state, dtype):
    torch.manual_seed(0)
    B = 2
    shapes = [(B, T, E), (B, T, E), (E, N), (B, T, N), (B, T, N)] + [(B, E, N)] * with_state
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    resets = torch.rand(B, T) < 0.05
    ours, definition = (functools.partial(run_scan, resets=resets, backend=name) for name in ("compiled", "recurrence"))
    assert compare(ours, definition, inputs) < {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("backend", ["recurrence", "compiled"])
def test_two_halves_of_a_scan_are_one_whole(backend):
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 50, 6), (2, 50, 6), (6, 3), (2, 50, 3), (2, 50, 3))
    ]

    def whole(x, dt, a, b, c):
        return selective_scan(x, F.softplus(dt), -a.exp(), b, c, backend=backend)[0]

    def halves(x, dt, a, b, c):
        dt, a = F.softplus(dt), -a.exp()
        first, state = selective_scan(
            x[:, :23], dt[:, :23], a, b[:, :23], c[:, :23], return_state=True, backend=backend
        )
        second, _ = selective_scan(x[:, 23:], dt[:, 23:], a, b[:, 23:], c[:, 23:], initial_state=state, backend=backend)
        return torch.cat((first, second), dim=1)

    assert compare(halves, whole, inputs) < 1e-11


def test_an_unknown_backend_is_refused():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="unknown selective scan backend 'fast'"):
        selective_scan(x, x, torch.zeros(3, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), backend="fast")
    with pytest.raises(ValueError, match="unknown ssd backend 'fast'"):
        ssd(x[..., None], x, x[0, 0], x[:, :, None], x[:, :, None], backend="fast")
