"""Sequence parallelism: rows divided over processes give the values and gradients of whole rows."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models.family_cases import CONFIGS
from tests.parallel import divided_rows
from tests.training.processes import run_ranks
from xlstm_lm.parallel.divided_rows import DividedRows
from xlstm_lm.parallel.process_group import Axis, join_world

FLOAT32, FLOAT64 = 4, 8


def result_of(ranks: int, *arguments: object) -> dict:
    return json.loads(run_ranks(ranks, divided_rows.__name__, *arguments).splitlines()[-1])


def check_errors(ranks: int, *arguments: object) -> None:
    errors = result_of(ranks, "errors", *arguments)
    assert len(errors) == 2 * len(divided_rows.KINDS)
    assert max(errors.values()) < 1e-12, errors


def test_steps_of_zero_leave_gradients_of_mamba_2_finite():
    """The softplus of a very negative number is 0 in float32."""
    join_world()
    x_BTHP, b_BTGN = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 1, 5)
    dt_BTH = torch.tensor([0.1, 0.0, 0.2, 0.0])[None, :, None].repeat(1, 1, 2).requires_grad_()
    rows = DividedRows(Axis(rank=0, size=1))
    rows.ssd_state_before(x_BTHP, dt_BTH, -torch.ones(2), b_BTGN, None).sum().backward()
    assert dt_BTH.grad.isfinite().all()


@pytest.mark.parametrize("exchange", ["gather", "columns"])
def test_three_processes_compute_what_one_does(exchange):
    check_errors(3, exchange, 3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [(), ("checkpointing",)])
@pytest.mark.parametrize("exchange", ["gather", "columns"])
@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_any_layout_computes_what_one_process_does(ranks, sequence, exchange, checkpointing):
    check_errors(ranks, exchange, sequence, *checkpointing)


@pytest.mark.slow
def test_a_layer_exchanges_a_state_once_a_direction():
    found = result_of(3, "exchanges", "gather", 3)
    B, S = divided_rows.ROWS, 3
    for name, kinds in found.items():
        config = CONFIGS[name]
        mixers = config.block_mixers()
        forward = {kind: (calls, size) for kind, calls, size in kinds if kind != "reduce-scatter"}
        backward = {kind: (calls, size) for kind, calls, size in kinds if kind == "reduce-scatter"}
        convolutions = [mixer.operations(B)[1].sizes for mixer in mixers if getattr(mixer, "conv_width", 0)]
        halos = sum(S * B * (sizes["W"] - 1) * sizes["D"] * FLOAT32 for sizes in convolutions)
        states = [mixer for mixer in mixers if mixer.kind not in ("slstm", "attention")]
        if name != "transformer":
            assert forward["all-gather"] == backward["reduce-scatter"]
            assert forward["all-gather"][0] == len(convolutions) + len(states)
            assert forward["all-gather"][1] == halos + S * sum(state_size(mixer) for mixer in states)
        if "slstm" in [mixer.kind for mixer in mixers]:
            # Each row's y, c, n and m, from the first process on; their gradients come back.
            size = 4 * config.embedding_dim * FLOAT32
            assert forward["send"] == forward["receive"] == (B, B * size)


def state_size(mixer) -> int:
    """Bytes of the effect of a slice: C, n, m and the decay; or the state and its decay."""
    B, sizes = divided_rows.ROWS, mixer.operations(divided_rows.ROWS)[0].sizes
    if mixer.kind == "mamba1":
        return FLOAT32 * B * 2 * mixer.inner_dim * sizes["N"]
    heads = mixer.num_heads
    if mixer.kind == "mamba2":
        return FLOAT32 * B * heads * (sizes["N"] * (sizes["P"] + 1) + 2)
    K, V = sizes["K"], sizes["V"]
    return FLOAT32 * B * heads * (K * (V + K) if mixer.kind == "gated_delta" else K * (V + 1) + 2)


@pytest.mark.slow
def test_bytes_of_columns_do_not_grow_with_the_processes():
    sizes = {}
    for ranks in (2, 4):
        kinds = result_of(ranks, "exchanges", "columns", ranks)["mlstm_sigmoid_gate"]
        sizes[ranks] = sum(size for kind, _, size in kinds if kind == "all-to-all")
    # Values of 17 columns are padded to 18 and 20.
    assert sizes[4] / sizes[2] == pytest.approx(20 / 18)


@pytest.mark.slow
def test_perplexity_of_a_long_row_is_the_same():
    found = result_of(4, "perplexity", "gather", 4)
    assert found["divided"] == pytest.approx(found["whole"], rel=1e-6)


@pytest.mark.slow
def test_memory_of_a_process_falls_with_their_number():
    found = result_of(4, "memory", "gather", 4)
    # Weights, their gradients and one state a layer do not fall.
    assert found["divided"] < 0.32 * found["whole"]
