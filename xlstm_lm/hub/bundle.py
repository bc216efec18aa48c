"""The source files that an export brings along, so that it works where xlstm-lm is not installed.

They are the package's own, as they stand, in one flat folder: only the imports are rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path

import xlstm_lm

PACKAGE = Path(xlstm_lm.__file__).parent
FIRST = ("xlstm_lm.hub.configuration_xlstm_lm", "xlstm_lm.hub.modeling_xlstm_lm")
REPLACED = {
    "xlstm_lm.ops.mlstm": "xlstm_lm.hub.portable_cells",
    "xlstm_lm.ops.slstm": "xlstm_lm.hub.portable_cells",
    "xlstm_lm.ops.selective_scan": "xlstm_lm.hub.portable_cells",
    "xlstm_lm.ops.conv": "xlstm_lm.ops.conv.dispatch",  # the package's __init__ has no place in a flat folder
    "xlstm_lm.ops.native": "xlstm_lm.hub.portable_native",
}
"""What chooses among all kernels, some of which are no Python, or builds them, gives way to what needs none of them."""
_BACKEND = re.compile(r"\"(xlstm_lm[\w.]+):\w+\"")
"""A backend that is imported on first use."""
_IMPORT = re.compile(r"^(\s*from )(xlstm_lm[\w.]*)( import )", re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write everything that the model's classes import of ours, and theirs."""
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
    sources: dict[str, str] = {}
    waiting = list(FIRST)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        path = PACKAGE.parent / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = path.read_text(encoding="utf-8")
        imported = [REPLACED.get(name, name) for _, name, _ in _IMPORT.findall(text)] + _BACKEND.findall(text)
        sources[module] = _IMPORT.sub(_relative, text)
        waiting += imported
    return sources


def _relative(match: re.Match[str]) -> str:
    return f"{match[1]}.{_flat_name(REPLACED.get(match[2], match[2]))}{match[3]}"


def _flat_name(module: str) -> str:
    """`xlstm_lm.ops.mlstm.step` -> `ops_mlstm_step`; what lies in hub keeps its name, by which transformers looks."""
    return module.removeprefix("xlstm_lm.").removeprefix("hub.").replace(".", "_")
