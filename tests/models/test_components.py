"""Parts of a model: nothing is missing, and a step's FLOPs, state and traffic are those of the model as built."""

from __future__ import annotations

import pytest
import torch

from tests.models.family_cases import CONFIGS, make_model
from xlstm_lm.models import TransformerConfig, build_model
from xlstm_lm.models.accounting import count_parameters, state_bytes, totals, training_flops_per_token
from xlstm_lm.models.components import components
from xlstm_lm.models.presets import preset, preset_names


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_sum_to_the_model(name):
    model, config = make_model(name), CONFIGS[name]
    parts = components(config, 20)
    assert sum(part.parameters for part in parts) == sum(each.numel() for each in model.parameters())
    assert sum(part.state_bytes for part in parts) == state_bytes(config, 2, 20)
    names = {part.name for part in parts}
    assert {"embedding", "projections", "head"} <= names
    unnamed = [part for part in parts if part.parameters == part.flops == part.state_bytes == 0]
    assert not unnamed


def test_each_parameter_belongs_to_the_part_that_its_module_names():
    parts = {part.name: part.parameters for part in components(CONFIGS["slstm"], 20) if part.block}
    D, heads, hidden = 32, 2, 64
    recurrent = 4 * D * D // heads
    expected = {
        "projections": recurrent,
        "slstm": recurrent + 4 * D,
        "convolution": 5 * D,
        "norms": 3 * D,
        "feed-forward": 3 * D * hidden,
    }
    assert parts == expected


def test_a_tied_head_costs_products_and_traffic_but_no_parameters():
    tied, own = (
        {part.name: part for part in components(TransformerConfig(tie_embeddings=tie), 8)} for tie in (True, False)
    )
    assert tied["head"].parameters == 0 and own["head"].parameters == 50304 * 768
    assert tied["head"].flops == own["head"].flops and tied["head"].weight_bytes == own["head"].weight_bytes


def test_the_chunk_length_can_be_chosen():
    config = preset("xlstm-400m")
    cells = [
        next(part.flops for part in components(config, 8192, chunk_length=chunk) if part.name == "mlstm")
        for chunk in (None, 64, 128)
    ]
    H, K, V = config.num_heads, 128, 256
    assert cells[0] == cells[1]
    assert cells[2] - cells[1] == config.num_blocks * H * 64 * (K + V + 4)


@pytest.mark.parametrize("kind", ["xlstm-cpu-1m", "transformer-cpu-1m", "mamba2-cpu-1m", "gated-delta-cpu-1m"])
def test_a_step_after_a_longer_text_costs_more_only_with_attention(kind):
    short, long = (totals(components(preset(kind), length), length) for length in (128, 256))
    config = preset(kind)
    if kind.startswith("transformer"):
        extra = config.num_blocks * 128 * 4 * config.embedding_dim
        assert long["step_flops"] - short["step_flops"] == extra
        cache = config.num_blocks * 128 * 2 * config.embedding_dim * 2
        assert long["step_traffic_bytes"] - short["step_traffic_bytes"] == cache
    else:
        assert long["step_flops"] == short["step_flops"]
        assert long["step_traffic_bytes"] == short["step_traffic_bytes"]


def test_a_step_moves_every_weight_but_the_embedding_once_and_reads_and_writes_the_state():
    config = preset("xlstm-cpu-1m")
    model = build_model(config).to(torch.bfloat16)
    weights = sum(each.nbytes for name, each in model.named_parameters() if name != "embedding.weight")
    moved = totals(components(config, 100), 100)["step_traffic_bytes"]
    assert moved == weights + 2 * config.embedding_dim + 2 * state_bytes(config, 2, 100)


def test_every_preset_is_accounted_for():
    for name in preset_names():
        config = preset(name)
        found = totals(components(config, 512), 512)
        assert found["parameters"] == count_parameters(config)
        assert found["training_flops_per_token"] == training_flops_per_token(config, 512)
        assert found["step_flops"] <= found["inference_flops_per_token"] or config.family == "transformer", name
