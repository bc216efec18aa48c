"""A hybrid from training to an export: every part of the package accepts any mix of mixers."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.training.runs import configure, records, write_text
from xlstm_lm import hub
from xlstm_lm.hub.lora import lora_targets
from xlstm_lm.models.generation import SamplingConfig, generate
from xlstm_lm.training.loop import train

SETTINGS = {
    "model__family": "hybrid",
    "model__num_blocks": 4,
    "model__pattern": ["mlstm", "attention", "mamba2", "slstm"],
    "model__mixers": [{"kind": "attention", "window": 6}, {"kind": "mamba2", "head_dim": 8, "state_dim": 4}],
    "training__steps": 4,
    "training__checkpoint_every": 2,
    "training__gate_statistics_every": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("hybrid")
    write_text(folder)
    run = configure(folder, **SETTINGS)
    train(run)
    return folder, run


def test_a_hybrid_continues_from_its_checkpoint(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "copy")
    again = configure(tmp_path / "copy", **SETTINGS)
    expected = records(tmp_path / "copy" / "run")
    assert any("forget_gate" in str(record) for record in expected)
    shutil.rmtree(tmp_path / "copy" / "run" / "checkpoints" / "step_00000004")
    train(again)
    assert records(tmp_path / "copy" / "run")[-len(expected) :] == expected


def test_a_hybrid_generates_and_exports(run, tmp_path):
    _, config = run
    trained = hub.load(config.training.run_dir)
    tokens_BT = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    prompt = tokens_BT[0, :9].tolist()
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=8)
    ours = list(generate(trained.model, prompt, greedy))
    assert len(ours) == 8

    hub.save_export(trained, tmp_path / "export")
    brought_along = get_class_from_dynamic_module("modeling_xlstm_lm.XLSTMLMForCausalLM", tmp_path / "export")
    assert brought_along.__module__.startswith("transformers_modules")
    loaded = brought_along.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        expected_BTV = trained.model.logits(trained.model(tokens_BT))
        torch.testing.assert_close(loaded(tokens_BT).logits, expected_BTV, rtol=1e-4, atol=1e-4)
    assert hub.load(tmp_path / "export").model.config == trained.model.config
    padded = torch.tensor([[0, 0, *prompt], [*prompt, 5, 6]])
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    written = loaded.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert written[0, -8:].tolist() == ours

    modules = {name.rpartition(".")[2] for name, _ in loaded.named_modules()}
    assert set(lora_targets(trained.model.config, "xlstm_lm")["target_modules"]) <= modules
