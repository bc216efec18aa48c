"""transformers' own tests of a model, on our class. Run by test_transformers_mixins.py.

TRANSFORMERS_TESTS is the folder `tests` of its source distribution. That has no folders below it, and so no tests of
generation and of exporters: classes that are imported from these are replaced by empty ones.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import unittest
from typing import Any

import torch
import transformers.utils

# Not as `tests`, which is a package here, too; they import each other relatively.
sys.modules["theirs"] = types.ModuleType("theirs")
sys.modules["theirs"].__path__ = [os.environ["TRANSFORMERS_TESTS"]]


def _replace_where_missing(module: str, **names: Any) -> None:
    parent = module.rpartition(".")[0]
    if importlib.util.find_spec(parent) is None:
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = []
    if importlib.util.find_spec(module) is None:
        sys.modules[module] = types.ModuleType(module)
        vars(sys.modules[module]).update(names)


_replace_where_missing("theirs.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_replace_where_missing("theirs.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
_replace_where_missing("theirs.utils.test_configuration_utils", config_common_kwargs={})
transformers.utils.direct_transformers_import = lambda path: transformers  # it looks for a checkout's source

from theirs.generation.test_utils import GenerationTesterMixin  # noqa: E402
from theirs.test_configuration_common import ConfigTester  # noqa: E402
from theirs.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from theirs.test_training_mixin import TrainingTesterMixin  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig  # noqa: E402
from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMForCausalLM, XLSTMLMModel  # noqa: E402

# By these tables of names the mixins find which classes compute a loss.
modeling_auto.MODEL_MAPPING_NAMES[XLSTMLMConfig.model_type] = XLSTMLMModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[XLSTMLMConfig.model_type] = XLSTMLMForCausalLM.__name__


class Tester:
    """The small model and the inputs that the mixins work with."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2
    pattern = ("mlstm", "slstm")
    causal_lm_class = XLSTMLMForCausalLM

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> XLSTMLMConfig:
        return XLSTMLMConfig(
            vocab_size=self.vocab_size,
            embedding_dim=self.hidden_size,
            num_blocks=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            pattern=list(self.pattern),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[XLSTMLMConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        return self.get_config(), {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
        }


class XLSTMLMTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """A stack of an mlstm and an slstm block."""

    all_model_classes = (XLSTMLMModel, XLSTMLMForCausalLM)
    has_attentions = False
    pattern = ("mlstm", "slstm")

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.model_tester.pattern = self.pattern
        self.config_tester = ConfigTester(self, config_class=XLSTMLMConfig, embedding_dim=32, num_heads=2)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class XLSTMLMPaperTest(XLSTMLMTest):
    """The same of the first paper's mLSTM block, and an sLSTM."""

    pattern = ("mlstm_paper", "slstm")


del ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin  # pytest would collect them
