"""The pages: links lead somewhere, and the files, commands and flags that are named exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from xlstm_lm.cli import COMMANDS, make_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "eval" / "results" / "README.md",
    ROOT / "launch" / "README.md",
]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code_of(path: Path) -> list[str]:
    """The lines of code blocks without their comments, and the inline code of a page."""
    text = path.read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [re.split(r"\s#\s", line)[0] for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors_of(file), f"{target}: no such heading"


@page
def test_files_that_are_named_exist(path):
    for code in code_of(path):
        for name in re.findall(r"(?<![\w/.-])(?:configs|eval|launch|tests|xlstm_lm|docs)/[\w./{},-]*[\w/]", code):
            if "NAME" not in name and "{" not in name:
                assert (ROOT / name).exists(), name


@page
def test_modules_and_targets_that_are_named_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in code_of(path):
        for module in re.findall(r"python -m (eval\.[a-z_]+)", code):
            found = importlib.util.find_spec(module)
            assert found, module
            assert not found.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"), module
        for target in re.findall(r"(?:^|· )make ([a-z-]+)", code):
            assert target in targets, f"make {target}"


@page
def test_commands_and_flags_that_are_named_exist(path):
    for code in code_of(path):
        for command, arguments in re.findall(r"(?:^|/)xlstm-lm ([a-z]+)(.*)", code):
            assert command in COMMANDS, code
            flags = [*make_parser(command).flags_of(command), "help"]
            for flag in re.findall(r"--([\w.-]+)", arguments):
                assert flag in flags or flag == "section.field", f"{command} --{flag}"


def test_the_readme_can_be_scanned():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("![") for line in lines[:20])


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index] == ["README.md"]
