"""Dropout of every family: in training alone, drawn once for a forward pass and its recomputation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.models.family_cases import CONFIGS, make_rows
from xlstm_lm.models import build_model

NAMES = ["mlstm", "mlstm_conv", "mlstm_paper", "slstm", "transformer", "mamba1", "mamba2", "gated_delta", "lstm"]
P = 0.25


def make(name: str, dropout: float = P):
    torch.manual_seed(0)
    return build_model(dataclasses.replace(CONFIGS[name], dropout=dropout))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_changes_training_alone(name):
    tokens_BT, resets_BT, _ = make_rows()
    model, without = make(name), make(name, dropout=0.0)
    assert not torch.equal(model(tokens_BT, resets_BT), model(tokens_BT, resets_BT))
    assert torch.equal(model.eval()(tokens_BT, resets_BT), without(tokens_BT, resets_BT))


@pytest.mark.parametrize("name", NAMES)
def test_activations_that_are_recomputed_drop_the_same_units(name):
    tokens_BT, resets_BT, targets_BT = make_rows()
    gradients = []
    for checkpointing in (False, True):
        model = make(name)
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        model.loss(model(tokens_BT, resets_BT), targets_BT).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["mlstm", "mamba2", "lstm"])
@torch.no_grad()
def test_the_embedding_loses_the_configured_share_and_keeps_its_mean(name):
    model = make(name)
    torch.nn.init.ones_(model.embedding.weight)
    x_BTD = model.embed(torch.zeros(8, 512, dtype=torch.long))
    assert (x_BTD == 0).float().mean() == pytest.approx(P, abs=0.01)
    assert x_BTD.mean() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_what_a_block_adds_loses_units():
    model = make("mlstm", dropout=0.999)
    block, x_BTD = model.blocks[0], torch.randn(1, 64, 32)
    unchanged = (block(x_BTD, None)[0] == x_BTD).float().mean()
    assert unchanged > 0.99
    assert (block.eval()(x_BTD, None)[0] == x_BTD).float().mean() < 0.5
