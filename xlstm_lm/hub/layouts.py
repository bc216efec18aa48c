"""The layouts in which models lie on disk: how each is recognised, and how it is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.base.tensor_files import read_tensors, tensor_files, tensor_names
from xlstm_lm.hub.formats.baseline_formats import BASELINE_READERS
from xlstm_lm.hub.formats.own_format import MODEL_TYPE, from_export
from xlstm_lm.hub.formats.package_layout import from_package
from xlstm_lm.hub.formats.transformers_layout import from_transformers
from xlstm_lm.models import FAMILIES, pinned_backends, with_free_backends
from xlstm_lm.runs.checkpoint import find_checkpoint, looks_like_a_checkpoint, read_checkpoint
from xlstm_lm.runs.folder import RunFolder

PICKLES = (".pt", ".pth", ".bin")
CONFIG_NAMES = ("config.yaml", "config.yml", "config.json")


Reader = Callable[[dict[str, Any], dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]
"""Makes our configuration and weights of the values of a configuration and the tensors beside it."""


@dataclass(frozen=True)
class StoredModel:
    """A model as a layout has read it; the tensors stay in their files until they are used."""

    folder: Path
    """Where the model lies, and its tokenizer if it has one."""
    config: Any
    """The configuration of its family."""
    weights: dict[str, Tensor]
    """Tensors by our names, in any precision."""


@dataclass(frozen=True)
class Layout:
    """One layout."""

    description: str
    """Name in messages."""
    recognises: Callable[[Path], bool]
    """Test of a path by file names and `config.json` alone."""
    read: Callable[[Path], StoredModel]
    """Reader. Raises ValueError where something is missing, damaged or not of this layout."""


def model_config(values: Any, origin: Path) -> Any:
    """The configuration of one of our models, from the mapping that `dataclasses.asdict` once made of it.

    A backend that it pins suited the machine that trained, and may be unknown here: the device at hand decides instead,
    which is announced.

    Raises:
        ValueError: the family or a field is unknown, or a value is not allowed; names `origin`.
    """
    family = values.get("family") if isinstance(values, Mapping) else None
    if family not in FAMILIES:
        raise ValueError(f"{origin} describes a model of family {family!r}; known are {', '.join(FAMILIES)}.")
    pinned = pinned_backends(values)
    if pinned:
        fields = ", ".join(f"model.{name} {value}" for name, value in pinned.items())
        announce_once(f"{origin} pins {fields} for training; here the device decides (auto)")
    try:
        return FAMILIES[family][0](**with_free_backends(values))
    except TypeError as error:
        raise ValueError(f"{origin} does not describe a model that this version of xlstm-lm knows: {error}.") from error


def _read_checkpoint(path: Path) -> StoredModel:
    checkpoint = read_checkpoint(find_checkpoint(path))
    config = model_config(checkpoint.config()["model"], RunFolder(checkpoint.folder).config_path)
    return StoredModel(checkpoint.folder, config, checkpoint.all_weights())


def _from_export(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    fields, weights = from_export(values, tensors)
    return model_config(fields, Path("config.json")), weights


MODEL_TYPES: dict[str, Reader] = {
    MODEL_TYPE: _from_export,
    "xlstm": from_transformers,
    **BASELINE_READERS,
}
"""By the `model_type` in config.json."""


def _read_hub_folder(folder: Path) -> StoredModel:
    path = folder / "config.json"
    values = read_mapping(path)
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ValueError(f"{path} has model_type {model_type!r}; known are {', '.join(MODEL_TYPES)}.")
    if values.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config; quantized weights cannot be read. Give the folder of the model before "
            "quantization."
        )
    tensors = _all_tensors(tensor_files(folder))
    return _convert(folder, folder, MODEL_TYPES[model_type], values, tensors)


def _read_package(path: Path) -> StoredModel:
    folder = path if path.is_dir() else path.parent
    config_path = _package_config(path)
    assert config_path is not None, "recognised by it"
    values = read_mapping(config_path)
    if "model_type" in values:
        raise ValueError(f"{path} is a part of the model in {folder}; give the folder.")
    values = values["model"] if isinstance(values.get("model"), dict) else values  # as in the package's experiments
    return _convert(path, folder, from_package, values, _package_tensors(path))


def _convert(
    path: Path, folder: Path, reader: Reader, values: dict[str, Any], tensors: dict[str, Tensor]
) -> StoredModel:
    try:
        return StoredModel(folder, *reader(values, tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, RuntimeError, LookupError, AttributeError) as error:  # a value or a shape that no such model has
        raise ValueError(f"{path}: its configuration and tensors do not fit together: {error}") from error


def _package_config(path: Path) -> Path | None:
    """The configuration beside a state dict: `config.yaml` and the like, or of the same name as the file."""
    if path.is_dir():
        candidates = [path / name for name in CONFIG_NAMES]
    else:
        candidates = [path.with_suffix(Path(name).suffix) for name in CONFIG_NAMES]
        candidates += [path.parent / name for name in CONFIG_NAMES]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _package_files(path: Path) -> list[Path]:
    """The state dict's files: one pickle or any number of safetensors."""
    if path.is_file():
        return [path] if path.suffix in (*PICKLES, ".safetensors") else []
    return sorted(path.glob("*.safetensors")) or sorted(file for file in path.iterdir() if file.suffix in PICKLES)


def _package_tensors(path: Path) -> dict[str, Tensor]:
    files = _package_files(path)
    if files[0].suffix == ".safetensors":
        return _all_tensors(tensor_names(files) if path.is_file() else _folder_tensors(path, files))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several state dicts ({names}); give the path of one of them.")
    try:
        content = torch.load(files[0], map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{files[0]} cannot be read as a state dict ({reason}); it must be what torch.save writes of "
            "model.state_dict(), and whole."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{files[0]} holds no state dict; save model.state_dict() with torch.save.")
    for wrapper in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(wrapper) for name in content):
            content = {name.removeprefix(wrapper): tensor for name, tensor in content.items()}
    return dict(content)


def _folder_tensors(folder: Path, files: list[Path]) -> dict[str, Path]:
    whole = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return tensor_files(folder) if any(path.is_file() for path in whole) else tensor_names(files)


def _all_tensors(files: dict[str, Path]) -> dict[str, Tensor]:
    return dict(read_tensors(files, files))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a JSON or YAML file holds.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    return read_json(path, repeated_keys=True) if path.suffix == ".json" else read_recipe(path)[0]


def _is_hub_folder(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and "model_type" in read_mapping(config)


def _is_package(path: Path) -> bool:
    return path.exists() and bool(_package_files(path)) and _package_config(path) is not None


LAYOUTS = {
    "checkpoint": Layout("a run of xlstm-lm or one of its checkpoints", looks_like_a_checkpoint, _read_checkpoint),
    "hub": Layout(
        f"a folder whose config.json has one of the model_types {', '.join(MODEL_TYPES)}",
        _is_hub_folder,
        _read_hub_folder,
    ),
    "package": Layout(
        "a state dict of the xlstm package (.safetensors, .pt, .pth, .bin) with config.yaml or config.json beside it",
        _is_package,
        _read_package,
    ),
}


def read_model(path: Path) -> StoredModel:
    """The model at a path, in the first layout that recognises it.

    Raises:
        ValueError: nothing is there, no layout recognises it, or something is missing or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist. {_known()} Or name a model on the hub, such as NX-AI/xLSTM-7b.")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds a PEFT adapter, which changes the model that it belongs to. Merge the two with PEFT's "
            "merge_and_unload, and give the folder that save_pretrained makes of the result."
        )
    for layout in LAYOUTS.values():
        if layout.recognises(path):
            return layout.read(path)
    raise ValueError(f"{path} holds no model. {_known()}")


def _known() -> str:
    return f"Give {'; or '.join(layout.description for layout in LAYOUTS.values())}."
