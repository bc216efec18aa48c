"""Packages that slow tests need and the environment lacks: from the package index, kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xlstm-lm-tests"


def source_of(package: str, version: str) -> Path:
    """The unpacked source distribution of a package. Skips the test where it cannot be fetched."""
    folder = CACHE / f"{package}-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as place:
            _pip("download", "--no-deps", f"--no-binary={package}", f"--dest={place}", f"{package}=={version}")
            (archive,) = Path(place).glob("*.tar.gz")
            with tarfile.open(archive) as content:
                content.extractall(place, filter="data")
            shutil.move(Path(place) / folder.name, folder)
    return folder


def installed(*requirements: str) -> Path:
    """A folder with packages and what they need, for the module search path. Skips where they cannot be fetched."""
    folder = CACHE / "-".join(requirements).replace("=", "")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as place:
            _pip("install", f"--target={place}/packages", *requirements)
            shutil.move(Path(place) / "packages", folder)
    return folder


def _cache() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        pytest.skip(f"pip {' '.join(arguments)}: {finished.stderr.strip().splitlines()[-1]}")
