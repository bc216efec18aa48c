"""Facts about GPUs, and which launch parameters and limits a device gets from them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from xlstm_lm.ops import gpu
from xlstm_lm.ops.mlstm import triton_launch
from xlstm_lm.training.telemetry import peak_flops

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def on(monkeypatch):
    """`on("sm_89")` makes this machine's GPU one of that architecture."""

    def switch(name):
        gpu.architecture.cache_clear()
        triton_launch.why_not.cache_clear()
        triton_launch.why_not_step.cache_clear()
        amd = name.startswith("gfx")
        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        capability = (0, 0) if amd else divmod(int(name.removeprefix("sm_")), 10)
        properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    yield switch
    gpu.architecture.cache_clear()
    triton_launch.why_not.cache_clear()
    triton_launch.why_not_step.cache_clear()


@pytest.mark.parametrize(
    ("name", "expected", "launches"),
    [
        ("sm_80", "sm_80", "sm_80"),
        ("sm_89", "sm_89", "sm_80"),
        ("sm_90", "sm_90", "sm_90"),
        ("sm_100", "sm_100", "sm_100"),
        ("sm_101", "sm_100", "sm_100"),
        ("sm_103", "sm_103", "sm_100"),
        ("sm_120", "sm_120", "sm_80"),
        ("gfx90a", "gfx90a", "gfx942"),
        ("gfx942", "gfx942", "gfx942"),
    ],
)
def test_each_gpu_takes_the_launches_of_its_like(on, name, expected, launches):
    on(name)
    assert gpu.architecture(DEVICE) == expected
    assert gpu.ARCHITECTURES[expected].launches == launches
    assert gpu.why_no_launches(DEVICE) is None


@pytest.mark.parametrize("name", ["sm_75", "gfx1100"])
def test_an_architecture_without_a_row_is_refused_by_name(on, name):
    on(name)
    assert f"no launch parameters for {name}, only for sm_80" in gpu.why_no_launches(DEVICE)
    assert name in triton_launch.why_not(64, 128, torch.bfloat16, DEVICE)
    assert name in triton_launch.why_not_step(torch.bfloat16, DEVICE)


@pytest.mark.parametrize(
    ("name", "width", "fits"),
    [
        ("sm_80", 1024, True),
        ("sm_80", 1025, False),
        ("sm_89", 512, True),
        ("sm_89", 768, False),
        ("sm_90", 1024, True),
        ("sm_120", 768, False),
        ("gfx942", 1024, True),
    ],
)
def test_heads_beyond_the_shared_memory_are_refused_by_name(on, name, width, fits):
    on(name)
    problem = triton_launch.why_not(64, width, torch.bfloat16, DEVICE)
    assert (problem is None) == fits
    assert fits or (name in problem and f"got 64 and {width}" in problem)
    assert triton_launch.why_not(width, 64, torch.bfloat16, DEVICE) is None or not fits
    assert triton_launch.why_not_step(torch.bfloat16, DEVICE) is None


@pytest.mark.parametrize(("name", "D", "fits"), [("sm_80", 128, True), ("sm_89", 64, True), ("sm_89", 65, False)])
def test_slstm_heads_beyond_the_shared_memory_are_refused_by_name(on, name, D, fits):
    triton_loops = pytest.importorskip("xlstm_lm.ops.slstm.triton_loops")
    on(name)
    problem = triton_loops.why_not(DEVICE, D, torch.bfloat16)
    assert (problem is None) == fits
    assert fits or "up to 64 units in torch.bfloat16 where a block has 101376 bytes" in problem


def test_every_product_has_an_architecture_and_plausible_figures():
    for each in gpu.GPUS:
        assert each.architecture in gpu.ARCHITECTURES
        assert each.fp32_flops <= each.bf16_flops < (each.fp8_flops or 1e17)
        assert 1e10 < each.memory_bytes < 1e12 and 1e11 < each.bytes_per_second < 1e13
        assert gpu.gpu_named(each.name) is each, "no row above hides it"
    assert len({each.name for each in gpu.GPUS}) == len(gpu.GPUS)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_products_peak_is_found_by_the_drivers_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(DEVICE, "bf16") == peak


def test_memory_tells_products_of_one_name_apart():
    assert gpu.gpu_named("NVIDIA A100-SXM4-80GB").memory_bytes == 80e9
    assert gpu.gpu_named("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9
    assert gpu.gpu_named("NVIDIA A100 80GB PCIe").bytes_per_second == 1.935e12


def test_tiles_are_powers_of_two():
    assert [gpu.padded(width) for width in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]
