"""The source files that an export brings along to work where xlstm-lm is not installed.

They are the package's own in one flat folder, with relative imports: everything that the model's classes import, and
the backends of its operations in plain PyTorch. All other backends come from xlstm-lm where it is installed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

import xlstm_lm
from xlstm_lm.ops.backend import Backend, make_call
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.operations import OPERATIONS

PACKAGE = Path(xlstm_lm.__file__).parent
FIRST = ("xlstm_lm.hub.configuration_xlstm_lm", "xlstm_lm.hub.modeling_xlstm_lm")
_BACKEND = re.compile(r"\"(xlstm_lm[\w.]+:\w+)\"")
"""A backend that is imported on first use."""
_FOR_TYPES = re.compile(r"^if TYPE_CHECKING:\n(?:    .*\n)+", re.MULTILINE)
"""Imports that only a type checker needs."""
_IMPORT = re.compile(r"^(\s*from )(xlstm_lm[\w.]*)( import )", re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write the source of the model's classes and of everything that they import from xlstm-lm."""
    sources = bundled_sources()
    inner = sorted(_flat_name(module) for module in sources if module not in FIRST)
    # transformers 5.0 to 5.9 copy only the files that the one they look for imports itself.
    all_inner = "".join(f"from .{name} import __name__ as _{name}  # noqa: E402\n" for name in inner)
    for module, source in sources.items():
        header = f"# From xlstm-lm {xlstm_lm.__version__}, {module}. Apache-2.0.\n"
        footer = f"\n{all_inner}" if module in FIRST else ""
        (folder / f"{_flat_name(module)}.py").write_text(header + source + footer, encoding="utf-8")


def bundled_sources() -> dict[str, str]:
    """The source of each module, by its name in the package, with imports relative to one flat folder."""
    plain = {
        backend.function
        for operation in OPERATIONS.values()
        for backend in operation.backends
        if _runs_anywhere(operation, backend)
    }
    sources: dict[str, str] = {}
    waiting = list(FIRST)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        path = PACKAGE.parent / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = _FOR_TYPES.sub("", path.read_text(encoding="utf-8"))
        sources[module] = _IMPORT.sub(lambda match: f"{match[1]}.{_flat_name(match[2])}{match[3]}", text)
        waiting += [name for _, name, _ in _IMPORT.findall(text)]
        waiting += [function.partition(":")[0] for function in _BACKEND.findall(text) if function in plain]
    return sources


def _runs_anywhere(operation: Operation, backend: Backend) -> bool:
    """Whether a backend is plain PyTorch, which torch.export traces where it needs no gradient."""
    call = make_call(torch.device("cpu"), torch.float32, operation.examples[0], operation.options)
    return backend.exports(call._replace(needs_gradient=False))


def _flat_name(module: str) -> str:
    """`xlstm_lm.ops.mlstm.step` -> `ops_mlstm_step`; modules of hub keep their names, by which transformers looks."""
    return module.removeprefix("xlstm_lm.").removeprefix("hub.").replace(".", "_")
