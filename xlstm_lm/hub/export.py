"""Export a trained model: a folder that transformers loads, complete and compared with the model, or not there at all.

config.json, generation_config.json        what to build, and how to generate
model.safetensors                          the weights in float32; several files with an index above a size
tokenizer.json, tokenizer_config.json      the tokenizer, for AutoTokenizer
*.py                                       the model's source, where transformers does not have it
README.md, learning_curve.png, recipe.yaml the model card
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_lm.base import console
from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.durable_files import write_durably
from xlstm_lm.base.outputs import check_new_folder, whole_or_not_at_all
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.run_layout import step_in_name
from xlstm_lm.base.tensor_files import SHARD_BYTES, TensorWriter
from xlstm_lm.data import Tokenizer
from xlstm_lm.hub.card_metadata import CardOptions
from xlstm_lm.hub.formats.baseline_formats import BASELINE_FORMAT
from xlstm_lm.hub.formats.export_format import ExportFormat, converted_sizes
from xlstm_lm.hub.formats.own_format import OWN_FORMAT
from xlstm_lm.hub.formats.transformers_format import TRANSFORMERS_FORMAT
from xlstm_lm.hub.gate import ask, check
from xlstm_lm.hub.load import TrainedModel, load
from xlstm_lm.hub.model_card import write_model_card
from xlstm_lm.hub.push import check_repository_name, push
from xlstm_lm.hub.tokenizer_files import save_tokenizer_files
from xlstm_lm.runs.folder import RunFolder

FORMATS: dict[str, tuple[ExportFormat, ...]] = {
    "xlstm": (TRANSFORMERS_FORMAT, OWN_FORMAT),
    "hybrid": (OWN_FORMAT,),
    "transformer": (BASELINE_FORMAT,),
    "mamba": (BASELINE_FORMAT,),
}
"""The formats of each family; the first that can hold a model is taken where none is asked for."""


@dataclass(frozen=True)
class Exported:
    """Result of `export`."""

    folder: Path
    export_format: ExportFormat
    difference: float
    """The largest difference between logits of the export in a fresh process and those of the trained model."""
    address: str | None
    """Where it lies on the hub, if it was pushed."""


def export(
    source: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    format_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    repository: str | None = None,
    card: CardOptions | None = None,
) -> Exported:
    """Export a run (at `step`, or its newest checkpoint) or whatever else `load` reads, to a new folder.

    What the trained model says is recorded first. A fresh process then has to get the same from what was written,
    before it is moved to `out`: logits of batches at several lengths, greedy texts and, unless the format ignores
    padding, a batch padded on the left. By then this process has let go of the model. `card` adds to the model card
    what the run does not tell, the license above all.

    Raises:
        ValueError: `out` is not free for a new folder, there is no such model or step, the format cannot hold it, or
            the export differs from the model; nothing is left of it. Or it could not be pushed: then the folder is
            complete.
    """
    source, out = user_path(source), user_path(out)
    check_new_folder(out)
    if repository:
        check_repository_name(repository)
    console.stage(f"loading {source}")
    trained = load(_checkpoint_of(source, step))
    tokenizer = trained.tokenizer
    export_format = choose_format(trained.model.config, format_name)
    run_dir, step = _origin(trained.folder)
    if run_dir:
        RunFolder(run_dir).metrics()  # for the model card; damage shows before any work
    with whole_or_not_at_all(out) as partial, tempfile.TemporaryDirectory() as place:
        question = Path(place) / "question"
        console.stage("computing logits and texts to compare with")
        ask(trained.model, tokenizer, export_format, question)
        console.stage("writing the export")
        _write(trained, tokenizer, export_format, partial, shard_bytes)
        model_config, num_tokens = trained.model.config, tokenizer.vocab_size
        del trained
        console.stage("comparing: a fresh process loads the export with transformers")
        difference = check(partial, question)["difference"]
        if obstacle := export_format.obstacle():
            announce_once(obstacle)
        write_model_card(
            partial,
            name=repository or out.resolve().name,
            model_config=model_config,
            export_format=export_format,
            run_dir=run_dir,
            step=step,
            difference=difference,
            num_tokens=num_tokens,
            options=card or CardOptions(),
        )
    if repository:
        console.stage(f"uploading to {repository}")
    return Exported(out, export_format, difference, push(out, repository) if repository else None)


def save_export(
    trained: TrainedModel,
    out: str | Path,
    format_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: CardOptions | None = None,
) -> Path:
    """Write a model in memory as `export` does, but without the comparison in a fresh process.

    Raises:
        ValueError: as `export`.
    """
    out = user_path(out)
    check_new_folder(out)
    tokenizer = trained.tokenizer
    export_format = choose_format(trained.model.config, format_name)
    with whole_or_not_at_all(out) as partial:
        _write(trained, tokenizer, export_format, partial, shard_bytes)
        run_dir, step = _origin(trained.folder)
        write_model_card(
            partial,
            name=out.resolve().name,
            model_config=trained.model.config,
            export_format=export_format,
            run_dir=run_dir,
            step=step,
            difference=None,
            num_tokens=tokenizer.vocab_size,
            options=card or CardOptions(),
        )
    return out


def choose_format(model_config: Any, name: str | None) -> ExportFormat:
    """The format called `name`, or the first that can hold the model.

    Raises:
        ValueError: there is none of that name for the family, or it cannot hold the model; says why.
    """
    formats = {each.name: each for each in FORMATS.get(model_config.family, ())}
    if not formats:
        raise ValueError(
            f"transformers has no type for models of the family {model_config.family}, so they are not exported; "
            f"xlstm_lm.hub.load reads them from their run. Exported are {', '.join(FORMATS)}."
        )
    if name is not None and name not in formats:
        known = ", ".join(formats)
        raise ValueError(f"--format {name} is not known for the family {model_config.family}; there is {known}.")
    reasons = []
    for each in [formats[name]] if name else formats.values():
        objections = each.objections(model_config)
        if not objections:
            return each
        reasons.append(f"--format {each.name} cannot hold this model: {'; '.join(objections)}.")
    others = [each.name for each in formats.values() if not each.objections(model_config)]
    reasons.append(f"Take --format {others[0]}." if others else f"The family {model_config.family} has no other.")
    raise ValueError(" ".join(reasons))


def parse_size(text: str) -> int:
    """Bytes that a text such as 500MB or 4GiB stands for.

    Raises:
        ValueError: it is no size, or zero.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if not found or found[2] not in units or not float(found[1]):
        raise ValueError(f"{text!r} is no size; give one such as 500MB or 4GiB.")
    return int(float(found[1]) * units[found[2]])


def _checkpoint_of(source: Path, step: int | None) -> Path:
    if step is None:
        return source
    folders = RunFolder(source).checkpoints()
    if step not in folders:
        there = ", ".join(map(str, sorted(folders))) or "none"
        raise ValueError(f"{source} has no checkpoint of step {step}; it has {there}.")
    return folders[step]


def _origin(folder: Path) -> tuple[Path | None, int | None]:
    """The run that a checkpoint belongs to, and its step; nothing where it is no checkpoint of a run."""
    run, step = RunFolder.of_checkpoint(folder), step_in_name(folder)
    return (None, None) if run is None or step is None else (run.path, step)


def _write(
    trained: TrainedModel, tokenizer: Tokenizer, export_format: ExportFormat, folder: Path, shard_bytes: int
) -> None:
    """Everything but the model card. One file's worth of tensors is held beside the model."""
    from transformers import GenerationConfig

    model, end = trained.model, tokenizer.end_of_document
    config = export_format.make_config(model.config)
    sizes = converted_sizes(export_format, model.config, config, model)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    for name, token in special.items():
        setattr(config, name, token)
    config.save_pretrained(folder)
    # Padded rows of the head are not suppressed: a token that is added to the tokenizer takes one of them.
    GenerationConfig(**special, use_cache=True).save_pretrained(folder)
    writer = TensorWriter("model", sizes, lambda name, content: write_durably(folder / name, content), shard_bytes)
    for name, tensor in export_format.convert(model.config, model.named_parameters()):
        writer.add(name, tensor)
    if export_format.write_code:
        export_format.write_code(folder)
    save_tokenizer_files(tokenizer, folder)
