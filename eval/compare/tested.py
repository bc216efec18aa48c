"""Tests one trained run: `python -m eval.compare.tested --run FOLDER --test JSON --out FILE`, for `eval.compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.command import environment
from eval.compare.config import TestConfig
from eval.compare.results import Bucket, Extrapolated, Tested
from eval.scoring.documents import open_documents
from eval.scoring.extrapolation import extrapolate
from eval.scoring.models import load_model, pick_device
from eval.scoring.perplexity import choose_windows, measure
from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.mistakes import explain
from xlstm_lm.base.program import program
from xlstm_lm.base.read_files import read_json

MEASURE_AGAIN = "Delete it to have it measured again."
FIGURES = ("tokens", "loss", "bits_per_byte")
_TEST = TypeAdapter(TestConfig)
_TESTED = TypeAdapter(Tested)


def test_run(folder: Path, test: TestConfig) -> Tested:
    """The newest checkpoint of a run on test documents, by the code of `eval.perplexity`.

    Raises:
        ValueError: there is no checkpoint, or no document that is long enough.
    """
    model = load_model(str(folder))
    assert model.trained_context
    scoring, how = choose_windows(model, test.scoring)
    measured = measure(model, open_documents(test.documents), scoring)
    curve: list[dict[str, Any]] = []
    if test.extrapolate > 1:
        lengths = [model.trained_context << power for power in range(test.extrapolate.bit_length())]
        texts = list(open_documents(test.documents))
        curve = extrapolate(model, texts, lengths, batch_size=scoring.batch_size, max_tokens=test.max_tokens)
    same = (*FIGURES, "bytes", "words", "perplexity", "word_perplexity")
    return Tested(
        how=how,
        **{name: measured[name] for name in same},
        by_position=[
            Bucket(first=row["from"], last=row["to"], **{name: row[name] for name in FIGURES})
            for row in measured["by_position"]
        ],
        extrapolation=[
            Extrapolated(
                context_length=row["context_length"],
                times_trained=row["times_trained"],
                second_half_bits_per_byte=row["second_half"]["bits_per_byte"],
                **{name: row[name] for name in FIGURES},
            )
            for row in curve
        ],
    )


def as_json(test: TestConfig) -> str:
    """The settings as text for the flag --test."""
    return _TEST.dump_json(test).decode()


def read_tested(path: Path) -> Tested:
    """The content of a file that `main` wrote.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(path, {"tested": dict, "environment": dict}, MEASURE_AGAIN)
    try:
        tested = _TESTED.validate_python(content["tested"])
    except ValidationError as error:
        mistakes = explain(error, Tested, content["tested"], {}, section="tested")
        raise ValueError(f"{path} is damaged: {mistakes} {MEASURE_AGAIN}") from None
    return dataclasses.replace(tested, environment=content["environment"])


@program("eval.compare.tested")
def main(arguments: Sequence[str] | None = None) -> None:
    """Test a run and write what was found, with the environment, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare.tested", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="A run.")
    parser.add_argument("--test", required=True, metavar="JSON", help="The section compare.test.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="Where to write.")
    options = parser.parse_args(arguments)
    tested = test_run(options.run, _TEST.validate_json(options.test))
    content = {"environment": environment(pick_device(None), ()), "tested": _TESTED.dump_python(tested)}
    replace_durably(options.out, json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
