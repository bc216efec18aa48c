"""FLOPs of every family and mixer beside the matrix products that torch counts when the plain definitions run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_mixers import KINDS, T, configure
from xlstm_lm.models import LSTMConfig, build_model
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.models.components import HEAD, components
from xlstm_lm.ops import operation
from xlstm_lm.ops.backend import Choice, linear_attention_flops

PRODUCTS = {
    "mlstm": 0,  # the cell's definition has no matrix products, step by step
    "mlstm_conv": 0,
    "mlstm_paper": 0,
    "mamba2": 0,
    "gated_delta": 0,
    "slstm": 8 * 2 * 12**2,
    "mamba1": 2 * 48 * 5,  # the states' output
    "attention": 2 * (4 * 24 * T / 2),  # all pairs, of which the causal half is counted
    "attention window 1": 2 * (4 * 24 * T / 2),
    "attention window 5": 2 * (4 * 24 * T / 2),
}
"""Products for each token that the definition of the cell takes in a block."""
LAYERS = {
    "lstm": LSTMConfig(vocab_size=29, embedding_dim=24, hidden_dim=20, peepholes=True),  # torch's kernel is not counted
    "gru": LSTMConfig(vocab_size=29, embedding_dim=24, hidden_dim=20, cell="gru"),
    "rnn": LSTMConfig(vocab_size=29, embedding_dim=24, hidden_dim=20, cell="rnn"),
}


@pytest.fixture
def definitions(monkeypatch):
    """Every operation runs by its reference."""
    monkeypatch.setattr(operation, "choose", lambda chosen, call, backend="auto": Choice(chosen.reference))


def count(model) -> tuple[float, float]:
    """Products for each token of one row that torch counts, in the forward and in the backward pass."""
    tokens_BT = torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits_BTV = model.logits(model(tokens_BT))
    with FlopCounterMode(display=False) as backward:
        logits_BTV.sum().backward()
    return forward.get_total_flops() / T, backward.get_total_flops() / T


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_products_are_those_that_torch_counts(kind, definitions):
    config = configure(kind)
    forward, backward = count(build_model(config))
    products = {"projections", "feed-forward", HEAD}
    outside_cells = sum(part.flops for part in components(config, T) if part.name in products)
    assert forward == outside_cells + config.num_blocks * PRODUCTS[kind]
    assert backward == pytest.approx(2 * forward, rel=0.005)  # the first step's recurrent product needs no gradient


@pytest.mark.parametrize("cell", LAYERS)
def test_a_layers_products_are_those_that_torch_counts(cell, definitions):
    config = LAYERS[cell]
    forward, backward = count(build_model(config))
    of_gates = 20 * config.width * config.num_blocks
    assert training_flops_per_token(config, T) == 3 * (forward + of_gates)
    assert backward == pytest.approx(2 * forward, rel=0.01)


@pytest.mark.parametrize("length", [1, 64])
def test_linear_attention_is_counted_as_its_products(length):
    H, K, V, chunks = 2, 8, 16, 3
    q_NHLK, k_NHLK = torch.randn(2, chunks, H, length, K)
    v_NHLV, C_NHKV = torch.randn(chunks, H, length, V), torch.randn(chunks, H, K, V)
    with FlopCounterMode(display=False) as within:
        (q_NHLK @ k_NHLK.mT) @ v_NHLV
    with FlopCounterMode(display=False) as states:
        q_NHLK @ C_NHKV, k_NHLK.mT @ v_NHLV
    tokens = chunks * length
    products = (within.get_total_flops() / 2 + states.get_total_flops()) / tokens
    assert linear_attention_flops(length, H, K, V) == products + H * 4 * length
