"""The sLSTM's cluster kernels: their source on an emulated cluster, what they compile to, and who is refused them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eval.bench.compile_calls import CudaCall
from tests.ops.cluster_emulation import BARRIERS, EmulationError, emulated_launch
from xlstm_lm.ops import nvrtc
from xlstm_lm.ops.slstm import cluster
from xlstm_lm.ops.slstm.fused import slstm_fused
from xlstm_lm.ops.slstm.recurrence import slstm_recurrence

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error of a value or gradient, of its largest entry: a few units in the last place of the type."""


def problem(B, T, H, D, dtype, seed=0):
    """wx, r, bias and y, c, n, m of a state in float64, wx and r such that `dtype` holds them; resets; gradients of
    y and of y, c, n of the last state. wx lies in memory as a projection head by head would leave it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    wx = 1.5 * draw(H, B, T, 4, D).permute(1, 2, 3, 0, 4)
    tensors = [wx.to(dtype).double(), (draw(4, H, D, D) / D**0.5).to(dtype).double(), draw(4, H, D)]
    state = [0.5 * draw(B, H, D), draw(B, H, D), 1 + draw(B, H, D).square(), draw(B, H, D)]
    resets = torch.rand(B, T, generator=generator) < 0.1
    return [*tensors, *state], resets, [draw(B, T, H, D), *(draw(B, H, D) for _ in range(3))]


def results(function, tensors, resets, upstream, types, with_state=True):
    """y, the last state, and the gradients of all that has one."""
    *leaves, m = (each.detach().to(dtype) for each, dtype in zip(tensors, types, strict=True))
    leaves = [each.requires_grad_() for each in leaves[: 6 if with_state else 3]]
    state = (*leaves[3:], m) if with_state else None
    y, last = function(*leaves[:3], resets_BT=resets, initial_state=state, return_state=True)
    upstream = [gradient.to(out.dtype) for gradient, out in zip(upstream, (y, *last[:3]), strict=True)]
    return [y, *last, *torch.autograd.grad([y, *last[:3]], leaves, upstream)]


def emulated(wx, r, bias, **options):
    return slstm_fused(wx, r, bias, backend="cluster", **options)


def error_of(monkeypatch, shape, dtype, tiles, *, with_resets=True, with_state=True, **emulation):
    """The largest distance of the emulated kernels from the definition in float64, relative; infinite for NaN."""
    tensors, resets, upstream = problem(*shape, dtype)
    resets = resets if with_resets else None
    monkeypatch.setattr(cluster, "_launch", emulated_launch(tiles, **emulation))
    actual = results(emulated, tensors, resets, upstream, [dtype] * 2 + [torch.float32] * 5, with_state)
    expected = results(slstm_recurrence, tensors, resets, upstream, [torch.float64] * 7, with_state)
    assert actual[0].dtype == dtype
    pairs = zip(actual, expected, strict=True)
    distances = torch.stack([(one.double() - exact).abs().max() / exact.abs().max() for one, exact in pairs])
    return float(distances.detach().nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize(
    ("shape", "dtype", "tiles", "options"),
    [
        ((9, 70, 2, 40), torch.float32, 1, {}),
        ((9, 70, 2, 40), torch.float32, 1, {"with_resets": False, "with_state": False}),
        ((1, 1, 2, 40), torch.float32, 1, {}),
        ((3, 64, 1, 40), torch.float32, 1, {"seed": 7}),
        ((9, 66, 1, 36), torch.bfloat16, 2, {}),
        ((3, 9, 1, 17), torch.float16, 1, {}),
        ((5, 6, 1, 256), torch.bfloat16, 1, {}),
    ],
)
def test_equals_the_definition(monkeypatch, shape, dtype, tiles, options):
    assert error_of(monkeypatch, shape, dtype, tiles, **options) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "tiles"),
    [
        ((17, 150, 2, 64), torch.bfloat16, 2),
        ((8, 130, 1, 128), torch.float16, 1),
        ((3, 130, 2, 160), torch.bfloat16, 1),
        ((9, 20, 1, 192), torch.float32, 2),
        ((17, 70, 2, 256), torch.bfloat16, 2),
        ((5, 70, 1, 256), torch.float32, 1),
        ((2, 9, 1, 264), torch.bfloat16, 1),
        ((2, 9, 1, 320), torch.bfloat16, 2),
        ((9, 6, 1, 512), torch.bfloat16, 1),
    ],
)
def test_equals_the_definition_in_real_sizes(monkeypatch, shape, dtype, tiles):
    assert error_of(monkeypatch, shape, dtype, tiles) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("direction", "barrier"),
    [
        ("forward", "warp"),
        ("forward", "cluster"),
        ("forward", "mail"),
        ("backward", "block"),
        ("backward", "cluster"),
        ("backward", "mail"),
    ],
)
def test_no_barrier_can_be_left_out(monkeypatch, direction, barrier):
    """The emulation notices it, in some order of events at least. Passing above then shows that barriers suffice."""

    def goes_wrong(seed):
        ignored = {direction: BARRIERS[barrier]}
        try:
            return error_of(monkeypatch, (9, 6, 2, 40), torch.float32, 1, seed=seed, ignored=ignored) > 1e-3
        except EmulationError:
            return True

    assert any(goes_wrong(seed) for seed in range(0, 800, 100))


def test_two_halves_equal_one_whole(monkeypatch):
    monkeypatch.setattr(cluster, "_launch", emulated_launch(tiles=1))
    (wx, r, bias, *state), resets, _ = problem(3, 70, 2, 40, torch.float32)
    wx, r, bias, *state = (each.float() for each in (wx, r, bias, *state))
    y, last = emulated(wx, r, bias, resets_BT=resets, initial_state=state, return_state=True)
    parts = []
    for piece in (slice(0, 33), slice(33, None)):
        half, state = emulated(
            wx[:, piece], r, bias, resets_BT=resets[:, piece], initial_state=state, return_state=True
        )
        parts.append(half)
    assert torch.equal(torch.cat(parts, dim=1), y)
    assert all(torch.equal(one, other) for one, other in zip(state, last, strict=True))


def gpu(**properties):
    usual = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    return SimpleNamespace(**(usual | {"shared_memory_per_block_optin": 232448} | properties))


@pytest.mark.parametrize(
    ("properties", "D", "dtype", "reason"),
    [
        ({"name": "A100", "major": 8}, 256, torch.bfloat16, "A100 has 8.0"),
        ({}, 256, torch.float64, "not in torch.float64"),
        ({}, 520, torch.bfloat16, "up to 512 units, not 520"),
        ({}, 512, torch.float32, "needs 574608 bytes"),
        ({"shared_memory_per_block_optin": 101376}, 512, torch.bfloat16, "H100 has 101376"),
        ({}, 256, torch.bfloat16, "cannot be had: no compiler"),
    ],
)
def test_says_why_it_cannot_be_used(monkeypatch, properties, D, dtype, reason):
    def compile_cuda(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu(**properties))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cluster, "compile_cuda", compile_cuda)
    assert reason in cluster.why_not(torch.device("cuda", 0), D, dtype)


def test_needs_a_gpu():
    assert "not on cpu" in cluster.why_not(torch.device("cpu"), 256, torch.bfloat16)


@pytest.mark.parametrize(("B", "tiles"), [(16, 1), (44, 2)])
def test_a_crowded_gpu_gets_wider_tiles(monkeypatch, B, tiles):
    """132 multiprocessors have room for 16 clusters of 8 blocks."""
    launched = []

    def kernel(layout, device):
        return SimpleNamespace(launch=lambda blocks, threads, parameters: launched.append((layout, blocks, threads)))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu())
    monkeypatch.setattr(cluster, "_kernel", kernel)
    monkeypatch.setattr(cluster, "_indexed", lambda device: device)
    cluster._launch(
        "forward", torch.empty(B, 5, 3, 256, dtype=torch.bfloat16), cluster.ForwardParameters(B=B, T=5, H=3)
    )
    [(layout, blocks, threads)] = launched
    assert (layout.tiles, blocks, threads) == (tiles, -(-B // (8 * tiles)) * 3 * 8, 128)
    assert cluster.rows(B, 3, 256, torch.bfloat16, torch.device("cpu")) == 8 * tiles


@pytest.mark.parametrize(("cuda", "first"), [("12.8", "12"), ("13.0", "13"), (None, "13")])
def test_the_compiler_of_pytorchs_own_cuda_is_tried_first(monkeypatch, cuda, first):
    tried = []

    def load(name):
        tried.append(name)
        raise OSError

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    with pytest.raises(RuntimeError, match="is not installed"):
        nvrtc._nvrtc.__wrapped__()
    majors = [name.rpartition("libnvrtc.so")[2].lstrip(".") for name in tried]
    assert tried[0] == f"libnvrtc.so.{first}"
    assert list(dict.fromkeys(majors)) == [first, "12" if first == "13" else "13", ""]


def test_a_mistake_in_the_source_is_told():
    with pytest.raises(RuntimeError, match='"undefined_name" is undefined'):
        cluster.compile_cuda("__global__ void kernel() { undefined_name(); }", "kernel", "sm_90", {})


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("direction", cluster.DIRECTIONS)
def test_compiles_without_spilling(direction, target):
    pytest.importorskip("triton", reason="its cuobjdump reads what was compiled")
    layout = cluster.Layout(direction=direction, D=256, dtype=torch.bfloat16, tiles=1)
    call = CudaCall(kernel="", launch="", binary=layout.binary, dynamic_shared_bytes=layout.shared_bytes)
    compiled = call.compile(target)
    assert compiled["registers"] <= 255
    assert compiled["spilled_bytes"] == 0
    assert compiled["shared_bytes"] <= 227 * 1024
    # 4 gates of 32 units by 256 units in products of 16 x 16, none of them twice, over the warps.
    assert compiled["instructions"]["HMMA"] == 4 * 32 * 256 // 256 // layout.warps
