"""The house rules: imports go one way, and the operations, the models and their benchmark need torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"base"},
    {"ops"},
    {"parallel"},
    {"models", "data"},
    {"runs"},
    {"training"},
    {"hub"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
"""Packages and modules of xlstm_lm, lowest first. Each imports itself and lower floors only: there is no cycle."""


EVAL_ORDER = ["study", "bench", "scoring", "command", "scaling_laws", "compare", "tasks", "gradient_reach"]
"""Rooms of eval, the lowest first: each imports itself and those before it. Files beside them are commands, on top."""


def own_imports(file: Path) -> set[str]:
    """Modules of the package and of the studies that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module):
        # "from xlstm_lm import hub" names the module among what it imports.
        names |= {f"xlstm_lm.{each.name}" for each in node.names} if node.module == "xlstm_lm" else {node.module}
    return {name for name in names if name.split(".")[0] in ("xlstm_lm", "eval")} - {"xlstm_lm.__version__"}


def test_every_package_has_its_floor():
    there = {path.stem for path in (ROOT / "xlstm_lm").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(there - {"__init__"})


@pytest.mark.parametrize("number", range(len(FLOORS)), ids=["-".join(sorted(floor)) for floor in FLOORS])
def test_lower_floors_never_import_higher_ones(number):
    below = set().union(*FLOORS[:number])
    for part in FLOORS[number]:
        folder = ROOT / "xlstm_lm" / part
        for file in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
            parts = {name.split(".")[1] for name in own_imports(file) if name.startswith("xlstm_lm.")}
            assert parts <= below | {part}, file


def test_the_package_never_imports_its_studies():
    assert not [file for file in (ROOT / "xlstm_lm").rglob("*.py") if "eval" in str(own_imports(file))]


def test_rooms_of_eval_import_only_lower_ones():
    for file in (ROOT / "eval").rglob("*.py"):
        place = file.relative_to(ROOT / "eval").with_suffix("").parts[0]
        if place not in EVAL_ORDER:
            assert file.parent in (ROOT / "eval", ROOT / "eval" / "tasks_local"), f"{file} is in no room of EVAL_ORDER"
            continue
        rooms = {name.split(".")[1] for name in own_imports(file) if name.startswith("eval.")}
        assert rooms <= set(EVAL_ORDER[: EVAL_ORDER.index(place) + 1]), file


def test_no_command_imports_another():
    commands = {file.stem for file in (ROOT / "eval").glob("*.py")} - {"__init__", *EVAL_ORDER}
    for file in (ROOT / "eval").glob("*.py"):
        assert not {name.split(".")[1] for name in own_imports(file) if name.startswith("eval.")} & commands, file


def test_no_two_files_import_each_other():
    files = list((ROOT / "xlstm_lm").rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    imports = {name: own_imports(file) - {name} for name, file in names.items()}
    assert not [(a, b) for a, of_a in imports.items() for b in of_a if a in imports.get(b, set())]


def test_operations_and_models_need_torch_alone():
    others = [
        "deepspeed",
        "datasets",
        "transformers",
        "tokenizers",
        "wandb",
        "pydantic",
        "yaml",
        "safetensors",
        "fsspec",
    ]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({others!r}))
import eval.kernels, eval.throughput, xlstm_lm.doctor, xlstm_lm.ops.conv, xlstm_lm.ops.loss, xlstm_lm.models.accounting
assert eval.throughput.parse_model("xlstm-400m").config.embedding_dim == 1024
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
