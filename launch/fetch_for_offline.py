"""Fetch the tokenizer and the hub data of recipes into a folder, and write a recipe that reads them there.

    python launch/fetch_for_offline.py OUT RECIPE [RECIPE ...]

launch/wheelhouse.sh runs this. OUT/offline.yaml has the section `data` of the recipes, with local files for everything
from the hub; it is given after them: `--config RECIPE --config OUT/offline.yaml`. Files are fetched whole: limit large
data sets by `data_files` in a recipe first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from xlstm_lm.data.sources.config import SourceConfig
from xlstm_lm.training.run_config import as_dict, load_run_config

KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
"""Kind of source by the ending of its files, without that of a compression."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FROM_THE_HUB = ("dataset", "config_name", "data_files", "revision", "split", "retry_seconds", "cache_gib")
"""Fields of a source on the hub that a local one does not need."""


def local_source(config: SourceConfig, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Fetch one source and return its local settings; a source that is local already keeps its own.

    Raises:
        ValueError: the data set's files are of a kind that cannot be read locally, or of several.
    """
    if config.kind != "hub":
        return settings
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    builder = load_dataset_builder(
        f"hf://datasets/{config.dataset}",
        config.config_name,
        data_files=config.data_files or None,
        revision=config.revision,
    )
    files = [str(file) for file in (builder.config.data_files or {}).get(config.split, ())]
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        endings = ", ".join(sorted({"".join(Path(file).suffixes) or file for file in files})) or "no files"
        raise ValueError(
            f"{config.description} cannot be read from local files ({endings}): set data_files to files of one kind, "
            f"{', '.join(sorted(KINDS))}."
        )
    hub, paths = HfFileSystem(), []
    size = sum(hub.info(file)["size"] for file in files)
    print(f"{config.description}: {len(files)} files, {size / 1e9:.2f} GB")
    for file in files:
        path = out / "data" / str(config.dataset) / hub.resolve_path(file).path_in_repo
        if not (path.is_file() and path.stat().st_size == hub.info(file)["size"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.get_file(file, str(path))
        paths.append(str(path.resolve()))
    kept = {name: value for name, value in settings.items() if name not in FROM_THE_HUB}
    return kept | {"kind": kinds.pop(), "paths": paths}


def kind_of(file: str) -> str | None:
    """Kind of source that reads a file; None if there is none."""
    path = Path(file)
    return KINDS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def main(out: Path, recipes: list[Path]) -> None:
    run = load_run_config(recipes)
    data = as_dict(run)["data"]
    out.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Any] = {}
    if run.data.tokenizer.kind == "huggingface":
        from xlstm_lm.data import build_tokenizer

        folder = out / "tokenizer"
        build_tokenizer(run.data.tokenizer).save(folder)
        wanted["tokenizer"] = data["tokenizer"] | {"name": str(folder.resolve()), "revision": None}
    for part in ("sources", "validation"):
        wanted[part] = [local_source(config, data[part][i], out) for i, config in enumerate(getattr(run.data, part))]
    (out / "offline.yaml").write_text(yaml.safe_dump({"data": wanted}, sort_keys=False))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("fetch_for_offline.py: a folder and a recipe are missing. usage: fetch_for_offline.py OUT RECIPE ...")
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
