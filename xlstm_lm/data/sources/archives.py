"""Documents in tar archives, laid out as by webdataset: the files of a document stand together and share a stem."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from xlstm_lm.data.sources.contents import READ_ERRORS, open_file
from xlstm_lm.data.sources.fields import Fields
from xlstm_lm.data.sources.readers import ALL, Shard, Turns
from xlstm_lm.data.sources.record import Record


def read_archives(shards: list[Shard], fields: Fields, order: int, strict: bool) -> Iterator[Record]:
    """Records of tar archives, compressed or not.

    Files that are called alike up to the first dot are one document. Its fields are the texts of its files by their
    endings, such as txt, and the entries of its json. Files of other endings are not read.
    """
    errors = (*READ_ERRORS, tarfile.TarError)
    for shard in shards:
        if shard.first.document == ALL:
            continue
        turns = Turns(shard, order, strict)
        number = 0
        try:
            with open_file(shard.file) as file, tarfile.open(fileobj=file, mode="r|") as archive:
                files = (member for member in archive if member.isreg())
                for _, members in groupby(files, key=lambda member: _split(member.name)[0]):
                    wanted = number >= shard.first.document
                    values, problem = _values(archive, members, fields) if wanted else ({}, None)
                    if wanted:
                        text, problem = ("", problem) if problem else fields.text(values)
                        if record := turns.record(number, text, problem, "document", None):
                            yield record
                    number += 1
                if number < shard.first.document:
                    raise shard.changed("documents")
        except errors as error:
            if record := turns.broken_off(number, error, "document"):
                yield record


def _split(name: str) -> tuple[str, str]:
    """A file's folder and stem, which it shares with the other files of its document, and its ending."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem or path.name)), ending


def _values(archive: tarfile.TarFile, members: Any, fields: Fields) -> tuple[dict[str, Any], str | None]:
    """The fields of a document, or what is wrong with them."""
    values: dict[str, Any] = {}
    for member in members:
        ending = _split(member.name)[1]
        if ending not in (*fields.names, "json"):
            continue
        file = archive.extractfile(member)
        assert file is not None  # a regular file
        try:
            text = file.read().decode()
            entries = json.loads(text) if ending == "json" else {ending: text}
        except UnicodeDecodeError as error:
            return {}, f"{member.name} is not UTF-8 (byte {error.start}: {error.reason})"
        except (ValueError, RecursionError) as error:
            return {}, f"{member.name} is not JSON ({error})"
        if not isinstance(entries, dict):
            return {}, f"{member.name} holds {type(entries).__name__}, not a JSON object"
        values |= entries
    return values, None
