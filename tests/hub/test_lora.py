"""The targets that a model card gives for LoRA: all are found, all learn, and the adapter merges without a trace."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers
import transformers.utils

from tests.hub.lively import MIXED, STOCK, make_pair, make_trained, random_tokens
from xlstm_lm import hub
from xlstm_lm.hub.export import choose_format
from xlstm_lm.hub.lora import lora_targets
from xlstm_lm.models import MambaConfig, TransformerConfig
from xlstm_lm.models.mixers import MIXERS

transformers.utils.is_xlstm_available = lambda: False  # else transformers would run the xlstm package's kernels

UNTOUCHED = re.compile(r"norm|conv|embedding|lm_head|skip|log_decay|step_bias|\bbias$|gates\.bias")


def trained_once(model, targets):
    """The model with an adapter that one step has moved."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets)).train()
    tokens_BT = random_tokens(2, 24)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    for _ in range(2):  # the first moves but half of each pair of matrices
        optimizer.zero_grad()
        adapted(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
    return adapted.eval()


@pytest.mark.parametrize("pattern", [*([kind] * 3 for kind in MIXERS), MIXED])
def test_every_matrix_of_the_blocks_learns_and_merges(tmp_path, pattern):
    model, ours = make_pair(torch.float64, pattern=pattern)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = trained_once(model, lora_targets(ours.config, "xlstm_lm"))
    tokens_BT = random_tokens(2, 70)
    with torch.no_grad():
        tuned_BTV = adapted(input_ids=tokens_BT).logits
        adapted.save_pretrained(tmp_path)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens_BT).logits, tuned_BTV, atol=1e-6, rtol=1e-6)
        fresh, _ = make_pair(torch.float64, pattern=pattern)
        assert (fresh(tokens_BT).logits - tuned_BTV).abs().max() > 1e-4
        read_BTV = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=tokens_BT).logits
        torch.testing.assert_close(read_BTV, tuned_BTV, atol=1e-4, rtol=1e-4)  # the adapter's file is in float32
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    unmoved = {name for name in before if torch.equal(before[name], after[name]) and not UNTOUCHED.search(name)}
    assert not unmoved


def test_the_card_of_transformers_own_type_names_its_modules(tmp_path):
    hub.save_export(make_trained(tmp_path / "source", **STOCK), tmp_path / "export", "transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = dict(trained_once(model, targets_on_the_card(tmp_path / "export")).merge_and_unload().named_parameters())
    unmoved = {name for name in before if torch.equal(before[name], after[name]) and not UNTOUCHED.search(name)}
    assert not unmoved


def targets_on_the_card(folder):
    """The snippet of a model card, as somebody would paste it."""
    snippet = re.search(r"```python\n(from peft.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(snippet[1], scope)
    names = ("target_modules", "target_parameters", "modules_to_save")
    return {name: getattr(scope["config"], name) for name in names}


def test_the_card_gives_the_targets(tmp_path):
    trained = make_trained(tmp_path / "source")
    hub.save_export(trained, tmp_path / "export")
    given = targets_on_the_card(tmp_path / "export")
    assert {name: sorted(value) for name, value in given.items() if value} == {
        name: sorted(value) for name, value in lora_targets(trained.model.config, "xlstm_lm").items()
    }


def test_other_families_have_none():
    for config in (TransformerConfig(), MambaConfig()):
        assert lora_targets(config, choose_format(config, None).name) == {}
