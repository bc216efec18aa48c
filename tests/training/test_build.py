"""Models that are built in place: the same weights for the same seed, and little memory beside them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.golden.golden_runs import MODELS
from tests.training.processes import run_ranks
from xlstm_lm.models import FAMILIES, LSTMConfig, build_model
from xlstm_lm.training.build import draw_apart, place_weights, unbuilt_model

CONFIGS = {name: FAMILIES[values["family"]][0](**values) for name, values in MODELS.items()} | {
    "lstm with everything": LSTMConfig(
        vocab_size=31, embedding_dim=16, peepholes=True, layer_norm=True, tie_embeddings=True
    )
}
WHOLE = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 0}}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_gives_the_weights_of_build_model_and_leaves_the_same_random_state(name):
    torch.manual_seed(3)
    expected = build_model(CONFIGS[name])
    drawn_next = torch.rand(3)
    torch.manual_seed(3)
    model = unbuilt_model(CONFIGS[name])
    assert all(parameter.is_meta for parameter in model.parameters())
    place_weights(model, WHOLE, torch.device("cpu"))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.rand(3), drawn_next)
    assert (model.head.weight is model.embedding.weight) == CONFIGS[name].tie_embeddings
    assert model.no_decay_parameter_names() == expected.no_decay_parameter_names()


def test_a_parameter_that_the_model_never_writes_is_named():
    model = unbuilt_model(CONFIGS["mlstm"])
    model.extra = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(AssertionError, match="no values to \\['extra'\\]"):
        place_weights(model, WHOLE, torch.device("cpu"))


def test_each_rank_draws_numbers_of_its_own_and_the_first_goes_on():
    drawn = []
    for rank in (0, 0, 1, 2):
        torch.manual_seed(3)
        torch.rand(2)
        draw_apart(3, rank)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    torch.manual_seed(3)
    assert torch.equal(torch.rand(6)[2:], drawn[0])
    assert len({tuple(each.tolist()) for each in drawn}) == 3


@pytest.mark.slow
def test_two_ranks_build_the_same_model_with_one_parameter_beside_their_share():
    report = json.loads(run_ranks(2, "building").splitlines()[-1])
    whole, largest = report.pop("bytes"), report.pop("largest")
    assert largest < 0.15 * whole
    assert len(report) == 5
    for case, found in report.items():
        assert found["wrong"] == [], case
        kept = whole * (0.5 if "bf16" in case else 1) * (0.5 if "stage 3" in case else 1)
        assert found["kept"] <= 1.03 * kept, case
        # The parameter as it is drawn, a copy of part of it (an orthogonal matrix, say), and its place.
        assert found["peak"] <= found["kept"] + 2.5 * largest, case
