"""Which launch parameters a GPU takes."""

from __future__ import annotations

import pytest
import torch

from xlstm_lm.ops import gpu


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_each_gpu_takes_the_launches_of_its_like(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu.architecture.__wrapped__(torch.device("cuda")) == expected


def test_a_gpu_of_amd_takes_its_own(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu.architecture.__wrapped__(torch.device("cuda")) == "gfx942"


def test_tiles_are_powers_of_two():
    assert [gpu.padded(width) for width in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]
