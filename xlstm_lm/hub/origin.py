"""The hub's model that an imported run started from, kept in the run's folder for the model cards of its exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import NoneType

from xlstm_lm.base.durable_files import write_durably
from xlstm_lm.base.read_files import read_json
from xlstm_lm.runs.folder import RunFolder

_CACHED = re.compile(r"models--([^/]+)/snapshots/[0-9a-f]{40}")


def write_origin(run_dir: Path, source: str | Path, model_folder: Path) -> None:
    """Write where the weights of a new run come from; `model_folder` is where they were found on disk."""
    inherited = _base_model_of_run(model_folder) or _base_model_of_export(model_folder)
    origin = {"imported_from": str(source), "base_model": hub_id(str(source)) or hub_id(str(model_folder)) or inherited}
    write_durably(RunFolder(run_dir).origin_path, (json.dumps(origin, indent=2) + "\n").encode())


def base_model(run_dir: Path | None) -> str | None:
    """The id on the hub of the model that a run was imported from; None where it started from random weights or from
    files of unknown origin."""
    path = RunFolder(run_dir).origin_path if run_dir else None
    if path is None or not path.is_file():
        return None
    remedy = "Delete it, and name the model with --base-model."
    return read_json(path, {"base_model": (str, NoneType)}, remedy)["base_model"]


def hub_id(source: str) -> str | None:
    """The id of a model on the hub that a text is, or that a folder of the hub's cache belongs to.

    >>> hub_id("NX-AI/xLSTM-7b"), hub_id("/cache/models--NX-AI--xLSTM-7b/snapshots/" + 40 * "0"), hub_id("/tmp/model")
    ('NX-AI/xLSTM-7b', 'NX-AI/xLSTM-7b', None)
    """
    cached = _CACHED.search(Path(source).as_posix())
    if cached:
        return cached[1].replace("--", "/")
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    return source if is_id and not Path(source).exists() else None


def _base_model_of_run(folder: Path) -> str | None:
    """The base model of a checkpoint whose run was itself imported."""
    run = RunFolder.of_checkpoint(folder)
    return base_model(run.path) if run else None


def _base_model_of_export(folder: Path) -> str | None:
    """The base model that the model card of an export of such a run names."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    metadata = (metadata_load(card) if card.is_file() else None) or {}
    named = metadata.get("base_model")
    return named if isinstance(named, str) and "xlstm-lm" in (metadata.get("tags") or []) else None
