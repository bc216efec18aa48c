"""Keep the current folder off Python's import path: a stray queue.py or datasets.py there is never executed.

`python -m`, `python -c` and an empty entry of PYTHONPATH put it ahead of the standard library.

Some imports come before any code of this package and cannot be prevented here. `python -m xlstm_lm` finds a folder
called xlstm_lm and the modules that Python's own start needs (collections, contextlib, functools, keyword, operator,
reprlib, types, warnings). `python -m torch.distributed.run` and DeepSpeed's launcher, which puts the current folder on
PYTHONPATH itself, import as they like. With the current folder on PYTHONPATH so do sitecustomize.py, the start of an
editable install and the first lines of any script. The command `xlstm-lm` has no such gap without such a PYTHONPATH.
"""

import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
"""The folder that holds the package. pathlib is not imported here: it could be the current folder's."""


def import_path() -> list[str]:
    """`sys.path` without the current folder, which stays only if it is the project or comes after the standard library.

    What comes after can neither replace a module of Python's nor an installed one.
    """
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    end = sys.path.index(library) if library in sys.path else len(sys.path)
    return _without_current_folder(sys.path[:end]) + [each for each in sys.path[end:] if each]


def keep_current_folder_out() -> None:
    """Remove the current folder from the import path of this program and of every Python that it starts."""
    sys.path[:] = import_path()
    entries = _without_current_folder(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if _is_current_folder(PROJECT) and PROJECT not in entries:
        entries.insert(0, PROJECT)  # children do not look there by themselves any more
    os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    os.environ["PYTHONSAFEPATH"] = "1"


def child_environment() -> dict[str, str]:
    """Variables for a child of the same interpreter: it finds what this process finds, and nothing else."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(import_path()), "PYTHONSAFEPATH": "1"}


def _without_current_folder(entries: list[str]) -> list[str]:
    if _is_current_folder(PROJECT):
        return [each or PROJECT for each in entries]
    return [each for each in entries if each and not _is_current_folder(each)]


def _is_current_folder(entry: str) -> bool:
    try:
        return os.path.samefile(entry or os.curdir, os.curdir)  # noqa: PTH121
    except OSError:  # a folder that is not there, or a current folder that has been deleted
        return False
