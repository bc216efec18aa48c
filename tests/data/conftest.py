"""Small data sets on disk for the tests of the data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


def make_documents(count: int, seed: int, longest: int = 120) -> list[str]:
    generator = random.Random(seed)
    alphabet = "abc dé日\n"
    return [
        f"{seed}.{number}:" + "".join(generator.choices(alphabet, k=generator.randint(1, longest)))
        for number in range(count)
    ]


def write_json_lines(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "number": n}) + "\n" for n, text in enumerate(documents)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """text/ and few/: 40 and 2 files of a document; lines/: 3 files of JSON lines; one.jsonl; rows.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, count in (("text", 40), ("few", 2)):
        (tmp_path / name).mkdir()
        for number, text in enumerate(make_documents(count, seed=count, longest=2000 if name == "few" else 120)):
            (tmp_path / name / f"{number:03}.txt").write_bytes(text.encode())
    (tmp_path / "lines").mkdir()
    for number in range(3):
        write_json_lines(tmp_path / "lines" / f"{number}.jsonl", make_documents(50 + number, seed=number))
    write_json_lines(tmp_path / "one.jsonl", make_documents(60, seed=7))
    rows = make_documents(70, seed=9)
    pq.write_table(pa.table({"text": rows, "other": list(range(70))}), tmp_path / "rows.parquet", row_group_size=20)
    return tmp_path
