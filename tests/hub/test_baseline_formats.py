"""The baselines compute what transformers' own types compute, and become them and come back exactly."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from xlstm_lm.hub.export import choose_format
from xlstm_lm.hub.formats.baseline_formats import BASELINE_READERS, convert, type_of
from xlstm_lm.hub.layouts import read_model
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
    """A baseline of xlstm-lm, moved away from its initialization, and the same as transformers' type."""
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


LINEAR = {"factor": 4.0}
ROPES = [
    {"rope_scaling": {"type": "linear", **LINEAR}},
    {"rope_scaling": {"type": "dynamic", "factor": 1.0}},
    {"rope_scaling": {"rope_type": "yarn", **LINEAR}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    {"rope_scaling": {"rope_type": "default", "type": "linear", **LINEAR}},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"attention_factor": 0.5}},
    {"rope_scaling": "linear"},
    {"rope_parameters": {"type": "llama3", **LINEAR}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
]
FOREIGN = {
    "llama": [
        *ROPES,
        {"partial_rotary_factor": 0.25},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 6},
        {"sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
    "mamba": [{"hidden_act": "relu"}, {"use_bias": True}, {"use_conv_bias": False}],
    "mamba2": [
        {"hidden_act": "relu"},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"time_step_limit": [0.01, 0.1]},
        {"time_step_limit": [0.0, 0.1]},
        {"time_step_limit": [0.01, {"__float__": "Infinity"}]},
        {"rms_norm": False},
    ],
}


def theirs_of(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The values of a config.json, with what transformers adds in memory taken away, and the tensors beside it."""
    config = CONFIGS[name]
    model = build_model(config)
    values = json.loads(type_of(config).make_config(config).to_json_string())
    return values, {key: tensor.detach() for key, tensor in convert(config, model.named_parameters())}


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name, many in FOREIGN.items() for each in many])
def test_a_field_that_changes_the_computation_is_refused_by_name(name, changes):
    values, tensors = theirs_of(name)
    (field,) = changes
    with pytest.raises(ValueError, match=f"config.json says {field} "):
        BASELINE_READERS[values["model_type"]](values | changes, tensors)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "default", "type": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 400.0},
        {"sliding_window": None, "head_dim": None, "hidden_act": "swish", "layer_types": ["full_attention"] * 2},
    ],
)
def test_what_changes_nothing_is_read(rope):
    values, tensors = theirs_of("llama")
    del values["rope_parameters"]
    values["rope_theta"] = 300.0
    config, _ = BASELINE_READERS["llama"](values | rope, tensors)
    assert config.rope_theta == 300.0


def test_folders_of_2024_do_not_say_whether_the_head_is_tied():
    """transformers wrote no field that had its default: tied for Mamba, a head of its own for Llama and Mamba-2."""
    for name, tied in {"mamba_tied": True, "mamba": False, "mamba2": False, "llama": False}.items():
        values, tensors = theirs_of(name)
        del values["tie_word_embeddings"]
        config, _ = BASELINE_READERS[values["model_type"]](values, tensors)
        assert config.tie_embeddings is tied
    for name in ("mamba2", "llama"):
        values, tensors = theirs_of(name)
        del values["tie_word_embeddings"], tensors["lm_head.weight"]
        with pytest.raises(ValueError, match="missing lm_head.weight"):
            BASELINE_READERS[values["model_type"]](values, tensors)


def test_quantized_weights_are_refused(tmp_path):
    values, tensors = theirs_of("llama")
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config.json has a quantization_config; quantized weights cannot be read"):
        read_model(tmp_path)


def test_an_adapter_is_not_passed_over(tmp_path):
    """transformers puts it on the model in the same folder, or on the one that it names."""
    values, tensors = theirs_of("llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match="holds a PEFT adapter.* Merge the two with PEFT's merge_and_unload"):
            read_model(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values))
        save_file(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba2", {"time_step_limit": [{"float": "Infinity"}, 1]}),
        ("mamba2", {"time_step_limit": 3}),
        ("llama", {"layer_types": 7}),
        ("llama", {"num_attention_heads": "many"}),
        ("llama", {"num_attention_heads": 5}),
        ("llama", {"model_type": ["llama"]}),
    ],
)
def test_a_value_of_the_wrong_kind_names_the_folder(tmp_path, name, changes):
    values, tensors = theirs_of(name)
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_model(tmp_path)


def test_a_family_without_a_type_says_so():
    with pytest.raises(ValueError, match="no type for models of the family lstm"):
        choose_format(LSTMConfig(), None)
