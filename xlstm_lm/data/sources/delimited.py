"""Documents of CSV files: one a row, in a column that the first row names."""

from __future__ import annotations

import csv
import io
import sys
import zlib
from collections.abc import Iterator

from xlstm_lm.data.sources.contents import READ_ERRORS, open_text
from xlstm_lm.data.sources.fields import Fields
from xlstm_lm.data.sources.readers import ALL, Shard, Turns
from xlstm_lm.data.sources.record import Record


def read_csv(shards: list[Shard], fields: Fields, order: int, strict: bool) -> Iterator[Record]:
    """Records of CSV files as spreadsheets and pandas write them: commas, double quotes, line breaks within quotes.

    A file breaks off where it is not UTF-8 or its quotes do not close: the rows behind cannot be told apart.

    Raises:
        ValueError: rows before the first one wanted, which the run has read before, have changed.
    """
    errors = (*READ_ERRORS, csv.Error, UnicodeDecodeError)
    for shard in shards:
        if shard.first.document == ALL:
            continue
        turns = Turns(shard, order, strict)
        number, checksum = 0, 0
        csv.field_size_limit(sys.maxsize)  # the library's own limit is 128 KiB; a document may be longer
        try:
            with io.TextIOWrapper(open_text(shard.file), encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, strict=True)
                names = next(rows, [])
                for row in rows:
                    if number == shard.first.document and shard.first.checksum not in (None, checksum):
                        raise shard.changed("rows")
                    checksum = zlib.crc32("\0".join(row).encode(), checksum)
                    if number >= shard.first.document and row:
                        text, problem = fields.text(dict(zip(names, row, strict=False)))
                        if len(row) > len(names):
                            text, problem = "", f"{len(row)} fields in a file of {len(names)} columns"
                        if record := turns.record(number, text, problem, "row", checksum):
                            yield record
                    number += 1
                if number < shard.first.document or (
                    number == shard.first.document and shard.first.checksum not in (None, checksum)
                ):
                    raise shard.changed("rows")
        except errors as error:
            if record := turns.broken_off(number, error, "row"):
                yield record
