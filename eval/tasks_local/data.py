"""The documents of the local tasks: JSON lines beside this file, no network needed."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(name: str, **_: object) -> DatasetDict:
    """The documents of `name`.jsonl as the split test; whatever else lm_eval passes (a task's metadata) is not used."""
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))
