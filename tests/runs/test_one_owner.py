"""Names inside a run's folder stand in two files of the package; every other file asks those."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from xlstm_lm.base import run_layout
from xlstm_lm.base.run_layout import checkpoint_folder, step_in_name

ROOT = Path(__file__).parents[2]
OWNERS = {"xlstm_lm/base/run_layout.py", "xlstm_lm/base/lease.py"}
SAYS_SOMETHING_ELSE = {run_layout.TOKENIZER, run_layout.WANDB, run_layout.LATEST}
"""Names that are keys and packages as well."""
NAMES = {value for name, value in vars(run_layout).items() if name.isupper() and isinstance(value, str)} | {
    "lease.json"
}
OTHERS_OWN = {
    ("xlstm_lm/hub/layouts.py", "config.yaml"),  # of the xlstm package
    ("xlstm_lm/hub/model_card.py", "learning_curve.png"),  # of an export
    ("eval/scoring/models.py", "config.yaml"),
}


def names_in(source: str) -> set[str]:
    """Parts of paths, in texts of a program without blanks, that are names in a run's folder."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\S+", node.value):
            found |= {part for part in node.value.split("/") if part in NAMES - SAYS_SOMETHING_ELSE}
            found |= set(re.findall(r"^(?:.*/)?(step_)(?=$|\*|\(|0|\[)", node.value))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('path / "metrics.jsonl"', {"metrics.jsonl"}),
        ('f"{run_dir}/checkpoints/step_{step:08}"', {"checkpoints", "step_"}),
        ('glob("checkpoints/step_*")', {"checkpoints", "step_"}),
        ('"metrics are in metrics.jsonl"', set()),
        ('recipe["tokenizer"]', set()),
    ],
)
def test_names_are_found_in_programs(source, found):
    assert names_in(source) == found


def test_no_other_file_has_a_name_in_a_runs_folder():
    there = set()
    for folder in ("xlstm_lm", "eval"):
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            there |= {(path, name) for name in names_in(file.read_text()) if path not in OWNERS}
    assert there == OTHERS_OWN


def test_a_checkpoints_name_gives_its_step_back(tmp_path):
    for step in (0, 7, 123_456_789):
        assert step_in_name(checkpoint_folder(tmp_path, step)) == step
    for name in ("step_7", ".tmp-step_00000007", "step_00000007.old", "latest"):
        assert step_in_name(tmp_path / name) is None
