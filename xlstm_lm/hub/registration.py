"""Make transformers' Auto classes know our model type, without importing transformers before somebody else does."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = ("xlstm_lm.hub.configuration_xlstm_lm", "xlstm_lm.hub.modeling_xlstm_lm")
"""The second makes itself known to transformers when it is imported."""


def register() -> None:
    """Now if transformers has been imported, else as soon as it is."""
    if "transformers" in sys.modules:
        importlib.import_module(MODULES[1])
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


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
            if not any(name in sys.modules for name in MODULES):  # else it is one of these that wants transformers
                register()

        spec.loader.exec_module = execute_and_register
        return spec
