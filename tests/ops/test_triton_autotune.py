"""Which launch the autotuning takes, with a clock of the test's own, and what becomes of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")

from xlstm_lm.ops.mlstm import triton_autotune
from xlstm_lm.ops.mlstm.triton_launch import Launch

TABLE = Launch(64, 64, 8, 2)
FAST, WRONG, BROKEN = Launch(64, 64, 8, 3), Launch(64, 64, 8, 1), Launch(128, 64, 8, 2)


class Kernel:
    """Runs like one: `FAST` in half the time of the others, `WRONG` in none but wrongly, `BROKEN` not at all."""

    def __init__(self) -> None:
        self.runs: list[Launch] = []

    def run(self, launch: Launch) -> Tensor:
        self.runs.append(launch)
        if launch == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((3,), float("nan") if launch == WRONG else 1.001 if launch == FAST else 1.0)

    def time(self, run_once: object) -> float:
        run_once()
        return {FAST: 0.5, WRONG: 0.0}.get(self.runs[-1], 1.0)


def test_the_fastest_that_runs_and_agrees_is_taken() -> None:
    kernel = Kernel()
    tried = triton_autotune.candidates(TABLE)
    assert tried[0] == TABLE
    assert {FAST, WRONG, BROKEN} <= set(tried)
    assert triton_autotune.choose(tried, kernel.run, kernel.time) == FAST
    assert triton_autotune.choose([TABLE, WRONG, BROKEN], kernel.run, kernel.time) == TABLE


def test_no_candidate_is_smaller_than_a_product_can_be() -> None:
    tried = triton_autotune.candidates(Launch(16, 16, 4, 2))
    assert all(launch.block_k >= 16 and launch.block_v >= 16 and 4 <= launch.warps <= 16 for launch in tried)
    assert len(set(tried)) == len(tried)


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Pretend that this is a GPU with autotuning switched on; the launches found are kept in `tmp_path`."""
    kernel = Kernel()
    monkeypatch.setattr(triton_autotune, "ENABLED", True)
    monkeypatch.setattr(triton_autotune, "PATH", tmp_path / "cache" / "launches.json")
    monkeypatch.setattr(triton_autotune, "TUNED", {})
    monkeypatch.setattr(triton_autotune.torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(triton_autotune.triton.testing, "do_bench", kernel.time)
    return kernel


def best(kernel: Kernel, sizes: tuple[int, ...] = (32, 64, 128)) -> Launch:
    class Like:
        device, dtype = torch.device("cuda"), torch.bfloat16

    return triton_autotune.best_launch("walk", TABLE, sizes, Like(), kernel.run)


def test_what_was_found_is_kept_for_the_next_process(on_a_gpu: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(triton_autotune, "announce_once", said.append)
    assert best(on_a_gpu) == FAST
    assert len(said) == 1
    assert "XLSTM_LM_AUTOTUNE=1" in said[0]
    (key,) = json.loads(triton_autotune.PATH.read_text())
    assert all(part in key for part in ("walk", "32x64x128", "bfloat16", "A GPU", triton_autotune.triton.__version__))
    tried = len(on_a_gpu.runs)
    assert best(on_a_gpu) == FAST
    monkeypatch.setattr(triton_autotune, "TUNED", {})
    assert best(on_a_gpu) == FAST
    assert len(on_a_gpu.runs) == tried, "a process, and the next one, seek each size once"
    best(on_a_gpu, (32, 256, 512))
    assert len(on_a_gpu.runs) > tried
    assert len(json.loads(triton_autotune.PATH.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"walk": 3}', '{"walk": [1, 2]}', "\x00"])
def test_a_spoilt_file_is_named_and_sought_again(
    on_a_gpu: Kernel, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(triton_autotune, "announce_once", said.append)
    triton_autotune.PATH.parent.mkdir()
    triton_autotune.PATH.write_text(content)
    assert best(on_a_gpu) == FAST
    assert any("cannot be read" in each for each in said)
    assert list(json.loads(triton_autotune.PATH.read_text()).values()) == [list(FAST)]


def test_a_place_that_cannot_be_written_is_named(on_a_gpu: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(triton_autotune, "announce_once", said.append)
    triton_autotune.PATH.parent.write_text("a file where the folder should be")
    assert best(on_a_gpu) == FAST
    assert any("cannot be kept" in each for each in said)


def test_nothing_is_tried_unless_asked_for(on_a_gpu: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_autotune, "ENABLED", False)
    assert best(on_a_gpu) == TABLE
    assert not on_a_gpu.runs


def test_ranks_that_share_launches_launch_alike(on_a_gpu: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    best(on_a_gpu)
    (key,) = triton_autotune.TUNED
    monkeypatch.setattr(triton_autotune, "TUNED", {key: BROKEN})  # as `kernel_check` has it from rank 0
    tried = len(on_a_gpu.runs)
    assert best(on_a_gpu) == BROKEN
    assert len(on_a_gpu.runs) == tried
    best(on_a_gpu, (32, 256, 512))  # reads what this node found at the other size
    assert best(on_a_gpu) == BROKEN
