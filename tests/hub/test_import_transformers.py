"""transformers' `xlstm` folders in all their variants load with the logits that transformers computes."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers.utils
from transformers.initialization import no_init_weights

from xlstm_lm import hub

transformers.utils.is_xlstm_available = lambda: False  # else transformers would run the xlstm package's kernels

LENGTHS = [1, 9, 64, 130]


def make_model(**options) -> transformers.xLSTMForCausalLM:
    """Every weight away from its initialisation, where whole paths are zero."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 53} | options
    config = transformers.xLSTMConfig(
        **sizes,
        embedding_dim=sizes["hidden_size"],
        num_blocks=sizes["num_hidden_layers"],
        autocast_kernel_dtype="float32",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def assert_equal_logits(path, theirs, tolerance: float = 1e-4) -> None:
    ours = hub.load(path)
    for length in LENGTHS:
        tokens_BT = torch.randint(0, theirs.config.vocab_size, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, rtol=tolerance, atol=tolerance)


def rewrite(folder, edit_config=None, edit_weights=None) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = {
        name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items()
    }
    if edit_config:
        edit_config(config)
    if edit_weights:
        edit_weights(weights)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 128, "num_heads": 8},
        {"vocab_size": 61, "num_hidden_layers": 1, "ffn_proj_factor": 1.4},
        {"qk_dim_factor": 1.0, "v_dim_factor": 2.0, "norm_eps": 1e-3},
        {"gate_soft_cap": 3.0, "output_logit_soft_cap": 2.0},
        {"add_out_norm": False},
    ],
)
def test_logits(tmp_path, options):
    theirs = make_model(**options)
    theirs.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, theirs)


def test_fused_weights_equal_their_single_twin(tmp_path):
    """transformers has the type but cannot run it."""
    theirs = make_model()
    weights = dict(theirs.state_dict())

    def fuse(prefix: str, parts: tuple[str, ...], whole: str, kind: str = "weight") -> None:
        weights[f"{prefix}.{whole}.{kind}"] = torch.cat([weights.pop(f"{prefix}.{part}.{kind}") for part in parts])

    for index in range(2):
        layer = f"backbone.blocks.{index}.mlstm_layer"
        fuse(layer, ("q", "k", "v", "ogate_preact"), "qkv_opreact")
        fuse(layer, ("igate_preact", "fgate_preact"), "ifgate_preact")
        fuse(layer, ("igate_preact", "fgate_preact"), "ifgate_preact", "bias")
        fuse(f"backbone.blocks.{index}.ffn", ("proj_up_gate", "proj_up"), "proj_up_gate_z")
    with no_init_weights():  # there transformers stumbles already
        fused = make_model(weight_mode="fused")
    fused.load_state_dict(weights)
    fused.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, theirs)


def test_a_head_that_the_configuration_calls_tied(tmp_path):
    """transformers ignores it and computes with the head that is there. So do we; one like the embedding is tied."""
    theirs = make_model(tie_word_embeddings=True)
    assert theirs.lm_head.weight is not theirs.backbone.embeddings.weight
    theirs.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, theirs)
    assert not hub.load(tmp_path).model.config.tie_embeddings

    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.backbone.embeddings.weight)
    rewrite(tmp_path, None, lambda weights: weights.update({"lm_head.weight": theirs.lm_head.weight.detach().clone()}))
    assert_equal_logits(tmp_path, theirs)
    tied = hub.load(tmp_path).model
    assert tied.config.tie_embeddings and tied.head.weight is tied.embedding.weight

    rewrite(tmp_path, None, lambda weights: weights.pop("lm_head.weight"))
    assert_equal_logits(tmp_path, theirs)
    rewrite(tmp_path, lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="missing lm_head.weight; left over none"):
        hub.load(tmp_path)


def test_sizes_come_from_the_tensors(tmp_path):
    """Published configurations give two of the four sizes; the others fall back to those of the 7B model."""
    theirs = make_model()
    theirs.save_pretrained(tmp_path)

    def forget(config):
        for key in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size"):
            config.pop(key, None)

    rewrite(tmp_path, forget)
    assert_equal_logits(tmp_path, theirs)
    rewrite(tmp_path, lambda config: config.update(hidden_size=4096, num_hidden_layers=32))
    assert_equal_logits(tmp_path, theirs)


def test_bfloat16_weights_are_computed_with_in_float32(tmp_path):
    theirs = make_model().bfloat16()
    theirs.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, theirs.float())
    assert {parameter.dtype for parameter in hub.load(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_to_transformers_without_the_change_of_a_bit(tmp_path, dtype):
    make_model(hidden_size=128, vocab_size=260).to(dtype).save_pretrained(tmp_path / "theirs")
    hub.import_run(tmp_path / "theirs", tmp_path / "run", tokenizer="bytes")
    hub.save_export(hub.load(tmp_path / "run"), tmp_path / "ours", format_name="transformers")
    before, after = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    hub.import_run(tmp_path / "ours", tmp_path / "again")
    for file in ("model.yaml", "checkpoints/step_00000000/model_rank0000.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
