"""Make transformers' Auto classes know our model type, without importing transformers before somebody else does."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Now if transformers has been imported, else as soon as it is."""
    if "transformers" in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register_now() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
    from xlstm_lm.hub.modeling_xlstm_lm import XLSTMLMForCausalLM, XLSTMLMModel

    AutoConfig.register(XLSTMLMConfig.model_type, XLSTMLMConfig, exist_ok=True)
    AutoModel.register(XLSTMLMConfig, XLSTMLMModel, exist_ok=True)
    AutoModelForCausalLM.register(XLSTMLMConfig, XLSTMLMForCausalLM, exist_ok=True)


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Finds transformers once, where everybody else would, and registers when its module has been executed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_now()

        spec.loader.exec_module = execute_and_register
        return spec
