"""The oldest transformers that pyproject.toml allows and the newest there is pass the tests of the hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ENVIRONMENTS = Path.home() / ".cache" / "xlstm-lm" / "test-environments"
TESTS = ["tests/hub", "tests/eval/test_perplexity.py"]


def _published() -> list[str]:
    """Every released version, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        pytest.skip(f"no package index: {finished.stderr.strip()}")
    return re.search(r"Available versions: (.*)", finished.stdout)[1].split(", ")


def _environment(version: str) -> Path:
    """The Python of an environment with that transformers, and for all else the packages of this one."""
    folder = ENVIRONMENTS / f"transformers-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    others = [str(PROJECT), *(place for place in sys.path if place.endswith("site-packages"))]
    (packages / "zz_others.pth").write_text("\n".join(others) + "\n")
    if not complete.exists():
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
        complete.touch()
    return python


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_hub_with_another_transformers(which):
    published = _published()
    allowed = re.search(r'"transformers>=([\d.]+)"', (PROJECT / "pyproject.toml").read_text())[1]
    series = [version for version in published if version.startswith(f"{allowed}.")]
    version = series[-1] if which == "oldest" else published[0]
    python = _environment(version)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    found = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"], capture_output=True, text=True
    )
    assert found.stdout.strip() == version, found.stderr
    finished = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *TESTS],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, f"with transformers {version}:\n{finished.stdout[-10_000:]}"
