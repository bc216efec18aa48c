"""Documents that `xlstm-lm tokenize` has turned into token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlstm_lm.base.read_files import read_json
from xlstm_lm.data.sources.contents import READ_ERRORS
from xlstm_lm.data.sources.local import FileSource
from xlstm_lm.data.sources.places import is_remote
from xlstm_lm.data.sources.readers import ALL, Shard, Turns
from xlstm_lm.data.sources.record import Record
from xlstm_lm.data.token_files import TokenFile

DESCRIPTION = "tokens.json"
"""A file beside files of ids: the tokenizer's fingerprint, the source, and the sizes by which shards are dealt."""


def read_tokens(shards: list[Shard], fields: None, order: int, strict: bool) -> Iterator[Record]:
    """Records of files of ids. The file is mapped into memory, and documents before the first one are not touched."""
    del fields
    errors = READ_ERRORS
    for shard in shards:
        if shard.first.document == ALL:
            continue
        turns = Turns(shard, order, strict)
        done = shard.first.document
        try:
            file = TokenFile(shard.path)
            for number in range(done, len(file.lengths)):
                done = number + 1
                if not file.lengths[number]:
                    continue  # was blank or bad
                mine = turns.is_mine(number)
                turns.turn += 1
                if mine:
                    name = f"{shard.name}:{number + 1}"
                    ids = file.document(number)
                    yield Record(shard.index, number, "", name, None, turns.turn, None, tokens=ids)
        except errors as error:
            if record := turns.broken_off(done, error, "document"):
                yield record


def describe(source: FileSource) -> None:
    """Read which tokenizer made the ids, and deal the shards as those of the documents' own source would be.

    Raises:
        ValueError: a path that names no file of ids, or a file that is not complete.
    """
    sizes, fingerprints, count = [], {}, 0
    for path in source.paths:
        if is_remote(path):
            raise ValueError(
                f"{path}: token ids are mapped into memory, from files of this machine; copy them to a disk"
            )
        if Path(path).suffix != ".bin":
            raise ValueError(
                f"{path} holds no token ids: name the .bin files that xlstm-lm tokenize wrote, FOLDER/*.bin"
            )
        described: dict[str, Any] = read_json(
            Path(path).parent / DESCRIPTION,
            {"tokenizer": str, "shard_sizes": dict},
            "It is written by xlstm-lm tokenize: give that command again, or copy the whole folder.",
        )
        fingerprints[described["tokenizer"]] = path
        sizes.append(described["shard_sizes"].get(Path(path).name, 0))
        try:
            lengths = TokenFile(path).lengths
            count += int(lengths.sum()) + int((lengths > 0).sum())
        except OSError as error:
            if source.config.on_bad_document == "error":
                raise ValueError(
                    f"file of token ids {path} cannot be read ({error}): give the command xlstm-lm tokenize again"
                ) from error
    if len(fingerprints) > 1:
        raise ValueError(
            f"{source.config.description}: {' and '.join(fingerprints.values())} were made by different tokenizers; "
            "use files of one"
        )
    source.tokenizer_fingerprint, source.num_tokens = next(iter(fingerprints)), count
    if all(sizes):
        source.shard_sizes = sizes
