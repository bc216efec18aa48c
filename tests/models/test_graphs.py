"""torch.compile sees every model and its loss as one graph, and activation checkpointing finds all that it keeps."""

from __future__ import annotations

import pytest
import torch

from tests.models.family_cases import CONFIGS, make_model, make_rows


@pytest.mark.parametrize("with_resets", [False, True], ids=["whole_rows", "resets"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_with_the_loss_and_the_gradients(name, with_resets):
    model = make_model(name)
    tokens_BT, resets_BT, targets_BT = make_rows()
    resets_BT = resets_BT if with_resets else None

    def loss(tokens_BT, resets_BT, targets_BT):
        return model.loss(model(tokens_BT, resets_BT), targets_BT)

    expected = loss(tokens_BT, resets_BT, targets_BT)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = compiled(tokens_BT, resets_BT, targets_BT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = torch.autograd.grad(found, list(model.parameters()))
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_changes_no_gradient(name):
    model = make_model(name)
    tokens_BT, resets_BT, targets_BT = make_rows()
    gradients = []
    for model.activation_checkpointing in (False, True):
        loss = model.loss(model(tokens_BT, resets_BT), targets_BT)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
