"""Loading what is on disk, and what is said when it is not what it should be."""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch
import torch
import transformers.utils
import yaml

from xlstm_lm import hub
from xlstm_lm.base.announce import announce_once
from xlstm_lm.data import TokenizerConfig, build_tokenizer
from xlstm_lm.models import MambaConfig, XLSTMConfig, build_model
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_layout import Share
from xlstm_lm.runs.checkpoint_writer import Snapshot, write_checkpoint

transformers.utils.is_xlstm_available = lambda: False  # else transformers would run the xlstm package's kernels


def make_trained(tmp_path, **changes) -> hub.TrainedModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 257, "embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "pattern": ["mlstm", "slstm"]}
    folder = tmp_path / "source"
    build_tokenizer(TokenizerConfig()).save(folder / "tokenizer")
    return hub.TrainedModel(build_model(XLSTMConfig(**(settings | changes))).eval(), folder)


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_loads_back_equal(tmp_path, tied):
    trained = make_trained(tmp_path, tie_embeddings=tied)
    hub.save_export(trained, tmp_path / "export")
    loaded = hub.load(str(tmp_path / "export"))
    tokens_BT = torch.randint(0, 257, (2, 19))
    assert torch.equal(loaded(tokens_BT), trained(tokens_BT))
    assert loaded(tokens_BT).shape == (2, 19, 257)
    assert loaded.tokenizer.encode("xLSTM é") == trained.tokenizer.encode("xLSTM é")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="export exists and is not empty; choose another folder"):
        hub.save_export(make_trained(tmp_path), tmp_path / "export")


def edit_weights(folder, edit) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    edit(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def test_all_tensors_that_do_not_fit_are_named(tmp_path):
    hub.save_export(make_trained(tmp_path), tmp_path / "export")

    def edit(weights):
        weights["model.blocks.0.extra"] = weights.pop("model.final_norm.weight")
        weights["lm_head.weight"] = torch.zeros(3, 3)

    edit_weights(tmp_path / "export", edit)
    with pytest.raises(
        ValueError, match=r"blocks.0.extra is not part.* final_norm.weight is missing; head.weight is \(3, 3\)"
    ):
        hub.load(tmp_path / "export")


def test_a_truncated_file_is_named(tmp_path):
    hub.save_export(make_trained(tmp_path), tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged: it cannot be read as safetensors"):
        hub.load(tmp_path / "export")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist. Give a run of xlstm-lm"):
        hub.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model. Give a run of xlstm-lm or one of its checkpoints; or"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has model_type 'gpt2'; known are xlstm_lm, xlstm, llama"):
        hub.load(tmp_path)


def make_transformers_folder(tmp_path, **options):
    config = transformers.xLSTMConfig(
        hidden_size=64, embedding_dim=64, num_hidden_layers=2, num_blocks=2, num_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.xLSTMForCausalLM(config).save_pretrained(tmp_path, **options)


def test_sizes_of_a_transformers_folder_come_from_its_tensors(tmp_path):
    make_transformers_folder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers"):
        del values[key]  # as in the published configurations
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert hub.load(tmp_path)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50)


def test_a_sharded_transformers_folder_loads(tmp_path):
    make_transformers_folder(tmp_path / "whole")
    make_transformers_folder(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    tokens_BT = torch.randint(0, 50, (1, 9))
    assert torch.equal(hub.load(tmp_path / "sharded")(tokens_BT), hub.load(tmp_path / "whole")(tokens_BT))


def test_a_transformers_folder_with_renamed_tensors_or_biases_is_refused(tmp_path):
    make_transformers_folder(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update(odd=weights.pop("backbone.out_norm.weight")))
    with pytest.raises(ValueError, match="missing backbone.out_norm.weight; left over odd"):
        hub.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"use_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="use_bias: true"):
        hub.load(tmp_path)


def test_a_folder_without_tokenizer_says_so_when_it_is_needed(tmp_path):
    make_transformers_folder(tmp_path)
    with pytest.raises(ValueError, match="holds a model but no tokenizer"):
        _ = hub.load(tmp_path).tokenizer


def test_a_file_of_a_folder_and_nonsense_in_its_configuration_are_refused(tmp_path):
    make_transformers_folder(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors is a part of the model in .*; give the folder"):
        hub.load(tmp_path / "model.safetensors")
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 3, 3)}))
    with pytest.raises(ValueError, match=r"head.weight is \(3, 3, 3\) instead of \(50, 64\)"):
        hub.load(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"backbone.embeddings.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=tmp_path.name):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json is damaged: it holds \[1\], which is no object"):
        hub.load(tmp_path)


TINY = {"vocab_size": 257, "embedding_dim": 32, "num_blocks": 2}
PINNED = [
    (
        XLSTMConfig(**TINY, num_heads=2, pattern=["mlstm", "slstm"]),
        {"mlstm_backend": "triton", "slstm_backend": "cluster"},
    ),
    (
        XLSTMConfig(**TINY, num_heads=2, pattern=["mlstm_paper", "slstm"], chunk_length=7),
        {"slstm_backend": "of 2031"},
    ),
    (MambaConfig(**TINY, version=1), {"scan_backend": "mamba_ssm"}),
    (MambaConfig(**TINY, version=2, head_dim=16), {"scan_backend": "mamba_ssm"}),
]


@pytest.mark.parametrize(("config", "pinned"), PINNED)
def test_a_model_trained_with_kernels_that_are_not_here_is_computed_by_those_that_are(config, pinned, tmp_path, caplog):
    announce_once.cache_clear()
    torch.manual_seed(0)
    parameters = dict(build_model(config).named_parameters())
    snapshot = Snapshot(
        state={"step": 0, "imported_from": "", "tokenizer_fingerprint": ""},
        shapes={"model": {name: tuple(parameter.shape) for name, parameter in parameters.items()}},
        shares={"model": [Share(name, 0, parameter.detach().flatten()) for name, parameter in parameters.items()]},
        config_yaml=yaml.safe_dump({"model": dataclasses.asdict(config) | pinned}),
        save_tokenizer=build_tokenizer(TokenizerConfig()).save,
        keep=1,
    )
    write_checkpoint(tmp_path, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")), snapshot)
    trained = hub.load(tmp_path)
    tokens_BT = torch.randint(257, (2, 9))
    with torch.no_grad():
        assert trained(tokens_BT).isfinite().all()
        _, state = trained.model(tokens_BT, return_state=True)
        trained.model.decode_step(tokens_BT[:, :1], state)
    (record,) = caplog.records
    assert all(f"model.{name} {value}" in record.getMessage() for name, value in pinned.items())


def test_a_model_that_is_not_finite_is_not_exported(tmp_path):
    trained = make_trained(tmp_path)
    with torch.no_grad():
        trained.model.final_norm.weight[3] = torch.nan
    hub.save_export(trained, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"logits are not finite: its weights are not finite \(final_norm.weight\)"):
        hub.export(tmp_path / "saved", tmp_path / "export")
    assert not (tmp_path / "export").exists()
