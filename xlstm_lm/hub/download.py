"""Models named by their id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.paths import user_path
from xlstm_lm.hub.layouts import MODEL_TYPES, read_mapping

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.yaml"]
DUPLICATES = ["original/*", "consolidated*", "onnx/*"]  # the same weights once more


def local_folder(path: str | Path) -> Path:
    """The path itself or, where nothing is there and it reads like a hub id, the folder it is downloaded to.

    Files that are in the hub's cache already are not downloaded again.

    Raises:
        ValueError: the hub cannot be reached, has no such model, or one of a type that cannot be read; says how to get
            the folder otherwise.
    """
    path = user_path(path)
    name = path.as_posix()
    if path.exists() or not HUB_ID.fullmatch(name) or path.parent.exists():
        return path
    import huggingface_hub

    announce_once(f"{name} is no path here: looking for it on the Hugging Face hub")
    try:
        config = read_mapping(Path(huggingface_hub.hf_hub_download(name, "config.json")))
    except Exception as error:  # the HTTP library that the client uses, and so its errors, changes between versions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} does not exist here, and could not be read from the Hugging Face hub ({reason}). Check the name "
            f"and, for a private model, 'hf auth login'. From a machine with a network:  hf download {name} "
            f"--local-dir {path.name}  makes a folder that can be named here instead."
        ) from None
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{name} on the Hugging Face hub has model_type {config.get('model_type')!r}; known are "
            f"{', '.join(MODEL_TYPES)}."
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=DUPLICATES))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} could not be downloaded from the Hugging Face hub ({reason}); the same command continues the "
            f"download, as does  hf download {name}"
        ) from None
