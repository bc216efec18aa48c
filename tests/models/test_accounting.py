"""Exact sizes of published models, and operations and states as torch counts them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xlstm_lm.models import FAMILIES, LSTMConfig, MambaConfig, TransformerConfig, XLSTMConfig, build_model
from xlstm_lm.models.accounting import count_parameters, state_bytes, training_flops_per_token


def up64(value: float) -> int:
    return -(-int(-(-value // 1)) // 64) * 64


def mlstm_total(d: int, blocks: int, heads: int, vocab: int = 50304) -> int:
    """The parameter count of xLSTM-7B style models, written out term by term."""
    d_qk, d_v, d_ff = d // 2 // heads, d // heads, up64(2.667 * d)
    block = d * heads * (2 * d_qk + d_v) + (2 * d * heads + 2 * heads) + 2 * d * d + 2 * d + 3 * d * d_ff + d
    return 2 * vocab * d + blocks * block + d


def paper_total(d: int, blocks: int, num_slstm: int, vocab: int = 50304) -> int:
    """The parameter count of the first paper's models, written out term by term."""
    di, ff, heads = up64(2 * d), up64(1.3 * d), 4
    mlstm = d + 2 * d * di + di * d + 12 * di + 5 * di + di + 2 * (3 * di * heads + heads) + di
    slstm = d + 5 * d + 8 * d * d // heads + 4 * d + d + d + 3 * d * ff
    return 2 * vocab * d + (blocks - num_slstm) * mlstm + num_slstm * slstm + d


@pytest.mark.parametrize(
    ("sizes", "total"),
    [((768, 12, 6), 164_110_224), ((2048, 24, 4), 1_420_839_104), ((4096, 32, 8), 6_865_424_896)],
)
def test_published_totals(sizes, total):
    d, blocks, heads = sizes
    assert count_parameters(XLSTMConfig(embedding_dim=d, num_blocks=blocks, num_heads=heads)) == total
    assert mlstm_total(*sizes) == total


def test_published_baseline_totals():
    llama = TransformerConfig(embedding_dim=4096, num_blocks=32, num_heads=32)
    assert count_parameters(llama) == 6_863_196_160
    assert count_parameters(TransformerConfig(embedding_dim=768, num_blocks=12)) == 162_220_800
    assert count_parameters(MambaConfig(version=1, embedding_dim=768, num_blocks=24)) == 167_787_264


def test_lstm_layers_have_the_textbook_count():
    config = LSTMConfig(vocab_size=10, embedding_dim=6, hidden_dim=8, num_blocks=2)
    layers = 4 * (8 * (6 + 8) + 8) + 4 * (8 * (8 + 8) + 8)
    assert count_parameters(config) == 10 * 6 + layers + 10 * 8


def test_tied_head_counts_once():
    untied = XLSTMConfig(embedding_dim=64, num_blocks=1, vocab_size=100)
    tied = XLSTMConfig(embedding_dim=64, num_blocks=1, vocab_size=100, tie_embeddings=True)
    assert count_parameters(untied) - count_parameters(tied) == 6400


def test_flops_are_those_of_the_projections_plus_the_cell():
    """torch's own counter sees the matrix products outside the cells; the rest must be the documented cell terms."""
    config = XLSTMConfig(
        embedding_dim=64, num_blocks=2, num_heads=2, vocab_size=100, mlstm_backend="recurrence", cell_eps=0.0
    )
    torch.manual_seed(0)
    model = build_model(config)
    tokens_BT = torch.zeros(1, 32, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.logits(model(tokens_BT))
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 32
    if torch.ops.aten.addmm in counter.get_flop_counts()["Global"]:
        linear += counter.get_flop_counts()["Global"][torch.ops.aten.addmm] / 32
    k, v, chunk = 16, 32, 32
    cell = 2 * 2 * (chunk * (k + v) + 4 * k * v + 4 * k + 4 * chunk)
    assert training_flops_per_token(config, 32) == 3 * (linear + cell)


def test_state_bytes_are_those_of_the_state():
    config = XLSTMConfig(
        embedding_dim=64, num_blocks=3, num_heads=2, vocab_size=100, pattern=["mlstm", "slstm", "mlstm_paper"]
    )
    torch.manual_seed(0)
    _, state = build_model(config)(torch.zeros(1, 5, dtype=torch.long), return_state=True)
    assert state_bytes(config, bytes_per_activation=4) == sum(tensor.nbytes for each in state for tensor in each)


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(vocab_size=100, embedding_dim=64, num_blocks=3, num_heads=4, num_key_value_heads=2),
        MambaConfig(version=1, vocab_size=100, embedding_dim=64, num_blocks=2),
        MambaConfig(version=2, vocab_size=100, embedding_dim=64, num_blocks=2, num_groups=2),
        LSTMConfig(vocab_size=100, embedding_dim=64),
    ],
)
def test_a_baselines_state_has_the_bytes_that_are_counted(config):
    torch.manual_seed(0)
    _, state = build_model(config)(torch.zeros(1, 5, dtype=torch.long), return_state=True)
    counted = sum(tensor.nbytes for each in state for tensor in (each[:2]))
    assert state_bytes(config, bytes_per_activation=4, context_length=5) == counted


def test_flops_of_a_transformer_are_those_that_torch_counts():
    config = TransformerConfig(vocab_size=100, embedding_dim=64, num_blocks=2, num_heads=4)
    torch.manual_seed(0)
    model = build_model(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.logits(model(torch.zeros(1, 32, dtype=torch.long)))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 32
    assert training_flops_per_token(config, 32) == 3 * (products + 2 * 2 * 32 * 64)


def test_a_recipe_without_a_model_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("training: {steps: 3}\n")
    with pytest.raises(ValueError, match="has no section 'model'; it has training"):
        count_parameters(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "config",
    [
        XLSTMConfig(pattern=["mlstm", "slstm", "mlstm", "mlstm_paper", "slstm"], num_blocks=5, tie_embeddings=True),
        XLSTMConfig(pattern="xlstm[3:1]", num_blocks=8),
        MambaConfig(version=1, num_blocks=3),
        MambaConfig(version=2, num_blocks=1),
        TransformerConfig(num_blocks=4, num_key_value_heads=3),
        LSTMConfig(num_blocks=4, hidden_dim=100, layer_norm=True, peepholes=True),
    ],
)
def test_parameters_are_those_of_the_model_as_built(config):
    with torch.device("meta"):
        model = FAMILIES[config.family][1](config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
