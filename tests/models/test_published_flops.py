"""FLOPs of training beside those that the authors of xLSTM publish formulas for (github NX-AI/xlstm_scaling_laws,
arXiv 2510.02228), written out here."""

from __future__ import annotations

import pytest

from tests.models.test_accounting import mlstm_total
from xlstm_lm.models import TransformerConfig, XLSTMConfig
from xlstm_lm.models.accounting import training_flops_per_token

T, L, VOCABULARY = 8192, 64, 50304


def published_mlstm(d: int, blocks: int, heads: int, hidden: int) -> float:
    """FLOPs of a forward pass for one token by the published count: whole chunks of 64 tokens, gates and normalizer
    included, without norms and skips; exp, max, sigmoid, mask and abs count 1."""
    K, V = d // 2 // heads, d // heads
    gates = L * (L + 1) / 2 + 2 * L + 3 + 1 + 1 + L * (3 + 2)
    states = gates + 2 * K * V + 4 * L * K * V + 3 * L * K + 2 * K + 4 * L * K
    within = L * (L + 1) / 2 + L * L * (3 + 3) + 2 * L + 2 * L * L * (K + V) + 4 * L * L
    combined = 2 * L + L * (2 + 3) + 2 * L * V
    cell = heads * (states + within + combined) / L
    projections = 2 * d * heads * (2 * K + V + 2) + 2 * d * d + d + 2 * d * d
    return blocks * (projections + cell + 6 * d * hidden + 2 * hidden) + 2 * d * VOCABULARY


def published_llama(d: int, blocks: int, heads: int, hidden: int) -> float:
    """FLOPs of a forward pass for one token by the published count: half of the scores, and 2.5 for the softmax of
    each pair and head."""
    attention = 2 * T * d + 2.5 * heads * T
    return blocks * (8 * d * d + attention + 6 * d * hidden + 2 * hidden) + 2 * d * VOCABULARY


@pytest.mark.parametrize(
    ("d", "blocks", "heads", "ours_over_theirs"),
    [(768, 12, 4, 0.9960), (1024, 24, 4, 0.9962), (2048, 24, 4, 0.9979), (4096, 32, 8, 0.9989)],
)
def test_an_xlstm_has_the_published_flops(d, blocks, heads, ours_over_theirs):
    config = XLSTMConfig(embedding_dim=d, num_blocks=blocks, num_heads=heads)
    theirs = 3 * published_mlstm(d, blocks, heads, config.blocks()[0].feedforward.hidden)
    assert training_flops_per_token(config, T) / theirs == pytest.approx(ours_over_theirs, abs=1e-4)
    assert abs(ours_over_theirs - 1) < 0.01


@pytest.mark.parametrize(
    ("d", "blocks", "heads", "ours_over_theirs"),
    [(768, 12, 12, 0.9925), (1024, 24, 16, 0.9929), (2048, 24, 16, 0.9976), (4096, 32, 32, 0.9986)],
)
def test_a_llama_has_the_published_flops(d, blocks, heads, ours_over_theirs):
    config = TransformerConfig(embedding_dim=d, num_blocks=blocks, num_heads=heads)
    theirs = 3 * published_llama(d, blocks, heads, config.blocks()[0].feedforward.hidden)
    assert training_flops_per_token(config, T) / theirs == pytest.approx(ours_over_theirs, abs=1e-4)
    assert abs(ours_over_theirs - 1) < 0.01


@pytest.mark.parametrize(
    ("d", "blocks", "heads", "over_6nd"),
    [(768, 12, 6, 0.774), (1024, 24, 4, 0.892), (2048, 24, 4, 0.947), (4096, 32, 8, 0.981)],
)
def test_six_for_each_parameter_would_be_wrong(d, blocks, heads, over_6nd):
    config = XLSTMConfig(embedding_dim=d, num_blocks=blocks, num_heads=heads)
    six = 6 * mlstm_total(d, blocks, heads)
    assert training_flops_per_token(config, T) / six == pytest.approx(over_6nd, abs=6e-4)
