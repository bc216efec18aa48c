"""The baselines compute what transformers' own types compute, and become them and come back exactly."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from xlstm_lm.hub.baseline_formats import BASELINE_READERS, convert, type_of
from xlstm_lm.hub.export import choose_format
from xlstm_lm.models import LSTMConfig, MambaConfig, TransformerConfig, build_model

CONFIGS = {
    "llama": TransformerConfig(vocab_size=61, embedding_dim=48, num_blocks=2, num_heads=4),
    "llama_grouped_tied": TransformerConfig(
        vocab_size=61,
        embedding_dim=48,
        num_blocks=2,
        num_heads=4,
        num_key_value_heads=2,
        tie_embeddings=True,
        rope_theta=500.0,
    ),
    "mamba": MambaConfig(version=1, vocab_size=61, embedding_dim=48, num_blocks=2),
    "mamba_tied": MambaConfig(
        version=1, vocab_size=61, embedding_dim=48, num_blocks=2, state_dim=5, tie_embeddings=True
    ),
    "mamba2": MambaConfig(vocab_size=61, embedding_dim=48, num_blocks=2, head_dim=12, state_dim=16),
    "mamba2_groups": MambaConfig(vocab_size=61, embedding_dim=48, num_blocks=2, head_dim=12, num_groups=2, state_dim=8),
}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """A model of ours, moved away from its initialisation, and the same as transformers' type."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    ours = build_model(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs = AutoModelForCausalLM.from_config(type_of(config).make_config(config)).eval()
    missing, unexpected = theirs.load_state_dict(dict(convert(config, ours.named_parameters())), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return ours.eval(), theirs


@pytest.mark.parametrize("length", [2, 7, 70])
def test_logits_and_gradients_are_those_of_transformers(pair, length):
    ours, theirs = pair
    if getattr(ours.config, "num_groups", 1) > 1 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23 transformers computes Mamba-2 with several groups differently; an export is refused")
    tokens_BT = torch.randint(0, 61, (2, length))
    logits_BTV = ours.logits(ours(tokens_BT))
    expected_BTV = theirs(tokens_BT, use_cache=False).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(logits_BTV)
    logits_BTV.backward(upstream)
    expected_BTV.backward(upstream)
    gradients = dict(convert(ours.config, ((name, each.grad) for name, each in ours.named_parameters())))
    for name, parameter in theirs.named_parameters():
        if name != "lm_head.weight" or not ours.config.tie_embeddings:
            error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(1e-6)
            assert error < 1e-3, name


def test_there_and_back_is_exact(pair, tmp_path):
    ours, theirs = pair
    theirs.config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    config, weights = BASELINE_READERS[values["model_type"]](values, tensors)
    assert type_of(config).make_config(config).to_dict() == type_of(ours.config).make_config(ours.config).to_dict()
    again = build_model(config)
    again.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_what_we_do_not_have_is_refused(pair):
    _, theirs = pair
    values, tensors = theirs.config.to_dict(), dict(theirs.state_dict())
    read = BASELINE_READERS[values["model_type"]]
    with pytest.raises(ValueError, match="config.json says hidden_act 'relu'"):
        read(values | {"hidden_act": "relu"}, tensors)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match=f"missing {name}; left over renamed"):
        read(values, {("renamed" if key == name else key): tensor for key, tensor in tensors.items()})


def test_a_family_without_a_type_says_so():
    with pytest.raises(ValueError, match="no type for models of the family lstm"):
        choose_format(LSTMConfig(), None)
