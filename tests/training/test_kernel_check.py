"""A run begins with kernels that compute their definition, or says which does not and goes on without it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from tests.ops.stand_ins import replace_backend
from tests.training.processes import run_ranks
from tests.training.runs import configure, records, write_text
from xlstm_lm.base.announce import announce_once
from xlstm_lm.models import LSTMConfig, MambaConfig, build_model
from xlstm_lm.models.xlstm_config import HybridConfig, XLSTMConfig
from xlstm_lm.ops.gated_delta import GATED_DELTA
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.compiled import mlstm_compiled
from xlstm_lm.ops.operation import choose
from xlstm_lm.ops.selective_scan import SCAN
from xlstm_lm.ops.selective_scan.compiled import scan_compiled
from xlstm_lm.ops.slstm import SLSTM
from xlstm_lm.ops.slstm.compiled import slstm_compiled
from xlstm_lm.ops.ssd import SSD
from xlstm_lm.parallel.process_group import Axis, World
from xlstm_lm.training.kernel_check import check_kernels
from xlstm_lm.training.loop import train

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
MIXED = XLSTMConfig(vocab_size=32, embedding_dim=32, num_blocks=3, pattern=["mlstm", "mlstm_paper", "slstm"])


@pytest.fixture(autouse=True)
def announcements_start_afresh(fresh_choices):
    announce_once.cache_clear()


def wrong_value(*inputs, **options):
    h, state = mlstm_compiled(*inputs, **options)
    return h * 1.01, state


def wrong_gradient(q, k, v, i, f, **options):
    h, state = mlstm_compiled(q, k, v, i, f.detach(), **options)
    return h + 0 * f.sum(), state


def begins_empty(*inputs, initial_state=None, **options):
    if initial_state is not None:
        C, n, m = initial_state
        initial_state = (0 * C, 0 * n, m)
    return mlstm_compiled(*inputs, initial_state=initial_state, **options)


def no_gradient_of_the_last_state(*inputs, **options):
    h, state = mlstm_compiled(*inputs, **options)
    return h, None if state is None else tuple(x.detach() + 0 * h.sum() for x in state)


def crashes(*inputs, **options):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_stay_and_the_random_state_too(dtype, caplog):
    before = torch.random.get_rng_state()
    taken = check_kernels(MIXED, ALONE, dtype, 4)
    assert taken == {"mlstm": "compiled", "slstm": "compiled", "convolution": "compiled"}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not caplog.records


@pytest.mark.parametrize("kernel", [wrong_value, wrong_gradient, begins_empty, no_gradient_of_the_last_state, crashes])
@pytest.mark.parametrize("configured", ["auto", "compiled"])
def test_a_wrong_mlstm_is_replaced_by_name(kernel, configured, monkeypatch, caplog):
    replace_backend(monkeypatch, MLSTM, "compiled", kernel)
    config = replace(MIXED, mlstm_backend=configured)
    assert check_kernels(config, ALONE, torch.float32, 4)["mlstm"] == "chunkwise"
    for use in config.operations(4):  # the model's own calls take what the check found, in any type
        call = use.call(ALONE.device, torch.bfloat16)
        assert use.operation is not MLSTM or choose(MLSTM, call, configured).backend == "chunkwise"
    records_of_two_sizes = [record for record in caplog.records if "does not compute" in record.getMessage()]
    assert len(records_of_two_sizes) == len(caplog.records) in (1, 2)
    record = caplog.records[0]
    assert "the mlstm kernel 'compiled' does not compute its definition on cpu" in record.getMessage()


def test_a_wrong_slstm_is_replaced_by_name(monkeypatch, caplog):
    replace_backend(monkeypatch, SLSTM, "compiled", lambda wx, *rest, **options: slstm_compiled(-wx, *rest))
    taken = check_kernels(MIXED, ALONE, torch.float32, 4)
    assert taken["mlstm"] == "compiled" and taken["slstm"] == "batched"
    assert "the slstm kernel 'compiled' does not compute" in caplog.text


def test_the_slstm_is_checked_on_as_many_rows_as_the_run_has(monkeypatch):
    def wrong_on_many_rows(wx, *rest, **options):
        return slstm_compiled(-wx if len(wx) > 4 else wx, *rest, **options)

    replace_backend(monkeypatch, SLSTM, "compiled", wrong_on_many_rows)
    assert check_kernels(MIXED, ALONE, torch.float32, 4)["slstm"] == "compiled"
    assert check_kernels(MIXED, ALONE, torch.float32, 5)["slstm"] == "batched"


def test_a_replacement_that_is_wrong_too_is_passed_over(monkeypatch):
    replace_backend(monkeypatch, MLSTM, "compiled", crashes)
    replace_backend(monkeypatch, MLSTM, "chunkwise", wrong_value)
    assert check_kernels(MIXED, ALONE, torch.float32, 4)["mlstm"] == "recurrence"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [1, 2])
def test_right_kernels_of_mamba_stay_and_the_random_state_too(version, dtype, caplog):
    config = MambaConfig(version=version, vocab_size=32, embedding_dim=64, num_groups=2)
    before = torch.random.get_rng_state()
    taken = check_kernels(config, ALONE, dtype, 4)
    expected = {"selective scan": "compiled"} if version == 1 else {"ssd": "mlstm"}
    assert taken == expected | {"convolution": "compiled"}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not caplog.records


def wrong_gradient_of_the_decays(x, dt, a, *others, **options):
    return scan_compiled(x, dt, a.detach() + 0 * a, *others, **options)


def test_a_wrong_scan_of_mamba_is_replaced_by_name(monkeypatch, caplog):
    config = MambaConfig(version=1, vocab_size=32, embedding_dim=32, num_blocks=1)
    replace_backend(monkeypatch, SCAN, "compiled", wrong_gradient_of_the_decays)
    assert check_kernels(config, ALONE, torch.float32, 4)["selective scan"] == "recurrence"
    assert "the selective scan kernel 'compiled' does not compute its definition on cpu" in caplog.text
    monkeypatch.setattr(SCAN["compiled"], "loaded", crashes)
    build_model(config)(torch.zeros(1, 5, dtype=torch.long))


def wrong_without_normalizer(*inputs, options, **others):
    h, state = mlstm_compiled(*inputs, options=options, **others)
    return h if options.normalize else 1.01 * h, state


def test_kernels_of_the_mlstm_that_are_wrong_for_mamba_2_are_replaced_by_name(monkeypatch, caplog):
    config = MambaConfig(vocab_size=32, embedding_dim=32, num_blocks=1)
    replace_backend(monkeypatch, MLSTM, "compiled", wrong_without_normalizer)
    assert check_kernels(MIXED, ALONE, torch.float32, 4)["mlstm"] == "compiled"
    assert check_kernels(config, ALONE, torch.float32, 4)["ssd"] == "chunkwise"
    assert "the ssd kernel 'mlstm' does not compute its definition on cpu" in caplog.text
    monkeypatch.setattr(MLSTM["compiled"], "function", crashes)
    build_model(config)(torch.zeros(1, 5, dtype=torch.long))
    replace_backend(monkeypatch, SSD, "chunkwise", crashes, arguments={})
    assert check_kernels(config, ALONE, torch.float32, 4)["ssd"] == "recurrence"


def test_a_model_on_kernels_of_torch_is_left_alone():
    config = LSTMConfig(vocab_size=32)
    assert check_kernels(config, ALONE, torch.float32, 4) == {}


class AmongTwo(World):
    """One of two ranks; the other finds `elsewhere` (wrong, different) for the first kernel, then nothing."""

    def from_first(self, value):
        return value

    def gather(self, value):
        return [value, "error 0.5"]

    def sum_(self, tensor):
        tensor += torch.tensor(elsewhere.pop(0))
        return tensor


elsewhere: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("seen_there", "expected"),
    [([(0, 0)], "compiled"), ([(1, 0), (0, 0)], "chunkwise"), ([(0, 1)], "compiled")],
    ids=["right everywhere", "wrong there", "another one there"],
)
def test_what_another_rank_finds_counts_here(seen_there, expected, caplog):
    elsewhere[:] = seen_there
    two = AmongTwo(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    config = XLSTMConfig(vocab_size=32, embedding_dim=32, num_blocks=1)
    assert check_kernels(config, two, torch.float32, 4)["mlstm"] == expected
    assert ("on 1 of 2 processes (error 0.5)" in caplog.text) == (expected == "chunkwise")


def test_one_process_of_a_node_compiles_first_and_the_others_launch_as_it_does():
    first, second = json.loads(run_ranks(2, "checking"))
    assert first["taken"] == second["taken"] == "compiled"
    assert first["end"] <= second["begin"]
    assert first["tuned"] == {"walk": [64, 64, 8, 1], "found by 0": [64, 64, 8, 1]}
    assert second["tuned"] == first["tuned"] | {"found by 1": [64, 64, 8, 1]}


def test_a_run_goes_on_with_the_definition(tmp_path, monkeypatch, caplog):
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name)
    train(configure(tmp_path / "right", training__steps=3))
    replace_backend(monkeypatch, MLSTM, "compiled", wrong_gradient)
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        train(configure(tmp_path / "wrong", training__steps=3))
    assert "the mlstm kernel 'compiled' does not compute its definition" in caplog.text
    ours, expected = (records(tmp_path / name / "run") for name in ("wrong", "right"))
    for name, kernel in (("right", "compiled"), ("wrong", "chunkwise")):
        sessions = json.loads((tmp_path / name / "run" / "environment.json").read_text())["sessions"]
        assert [session["kernels"]["mlstm"] for session in sessions] == [kernel]
    for one, other in zip(ours, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-3)


@pytest.mark.parametrize("divided", [False, True])
def test_divided_rows_check_the_gated_delta_rule_on_values_and_keys_too(divided, monkeypatch):
    seen = []
    monkeypatch.setattr("xlstm_lm.training.kernel_check._agree", lambda use, *_: seen.append(use) or "some")
    world = replace(ALONE, sequence=Axis(rank=0, size=2)) if divided else ALONE
    model = HybridConfig(vocab_size=32, embedding_dim=32, num_blocks=1, num_heads=2, pattern=["gated_delta"])
    check_kernels(model, world, torch.float32, 2)
    whole = {(use.sizes["K"], use.sizes["V"]) for use in model.operations(2) if use.operation is GATED_DELTA}
    checked = {(use.sizes["K"], use.sizes["V"]) for use in seen if use.operation is GATED_DELTA}
    assert whole and checked == whole | {(K, V + K) for K, V in whole if divided}
