"""Make a run of any model that can be loaded: a folder from which `xlstm-lm train` starts at step 0 with its weights.

RUN/checkpoints/step_00000000/    weights, tokenizer and the model's section of config.yaml
RUN/model.yaml                    a recipe of that section and the tokenizer, to be given behind one's own
RUN/tokenizer/                    where that recipe finds the tokenizer
RUN/imported.json                 where the weights come from, for the model cards of later exports
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from xlstm_lm.base.durable_files import write_durably
from xlstm_lm.base.outputs import check_new_folder, whole_or_not_at_all
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.recipe import to_yaml
from xlstm_lm.data import Tokenizer, TokenizerConfig, build_tokenizer, load_tokenizer
from xlstm_lm.data.tokenizer import CONFIG_FILE
from xlstm_lm.hub.load import TrainedModel, check_vocabulary, load
from xlstm_lm.hub.origin import write_origin
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_layout import equal_shares
from xlstm_lm.runs.checkpoint_writer import Snapshot, write_checkpoint
from xlstm_lm.runs.folder import RunFolder


def import_run(source: str | Path, out: str | Path, tokenizer: str | None = None) -> Path:
    """Write the model at `source`, and its tokenizer, to the new folder `out`. Returns the recipe in it.

    `source` is a path or an id on the Hugging Face hub, from which the model is then downloaded.
    `tokenizer` names another one than lies with the model: `bytes`, a folder, or an id on the Hugging Face hub.

    Raises:
        ValueError: `out` is not free for a new folder; or at `source` there is no model or no tokenizer, or one of
            them is damaged, or they do not fit each other. Nothing has been written.
        RunError: the disk is full. What had been written is gone.
    """
    source, out = user_path(source), user_path(out)
    check_new_folder(out)
    trained = load(source)
    chosen = _choose_tokenizer(trained, tokenizer)
    with whole_or_not_at_all(out) as partial:
        _write(partial, out, trained, chosen, source)
    return RunFolder(out).model_recipe_path


def _choose_tokenizer(trained: TrainedModel, name: str | None) -> Tokenizer:
    if name is None:
        try:
            return trained.tokenizer
        except ValueError as error:
            raise ValueError(f"{error} Or name one with --tokenizer: bytes, a folder, or an id on the hub.") from error
    if name == "bytes":
        tokenizer = build_tokenizer(TokenizerConfig())
    elif user_path(name).is_dir():
        tokenizer = load_tokenizer(user_path(name))
    else:
        tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", name=name))
    check_vocabulary(tokenizer, trained.model, name)
    return tokenizer


def _write(folder: Path, out: Path, trained: TrainedModel, tokenizer: Tokenizer, source: Path) -> None:
    """Everything, to `folder`, which will be renamed to `out`."""
    parameters = dict(trained.model.named_parameters())
    recipe: dict[str, Any] = {"model": dataclasses.asdict(trained.model.config)}
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    total = sum(parameter.numel() for parameter in parameters.values())
    snapshot = Snapshot(
        state={
            "step": 0,
            "imported_from": str(source.resolve() if source.exists() else source),
            "tokenizer_fingerprint": tokenizer.fingerprint(),
        },
        shapes={"model": shapes},
        shares={"model": equal_shares(parameters.items(), total, rank=0, ranks=1)},
        config_yaml=to_yaml(recipe),
        save_tokenizer=tokenizer.save,
        keep=1,
    )
    write_checkpoint(folder, world, snapshot)
    write_origin(folder, source, trained.folder)
    run = RunFolder(folder)
    tokenizer.save(run.tokenizer_path)
    config = TokenizerConfig(**json.loads((run.tokenizer_path / CONFIG_FILE).read_text(encoding="utf-8")))
    if config.kind == "huggingface":
        config = dataclasses.replace(config, name=str(RunFolder(out.resolve()).tokenizer_path), revision=None)
    recipe["data"] = {"tokenizer": dataclasses.asdict(config)}
    write_durably(run.model_recipe_path, to_yaml(recipe).encode())
