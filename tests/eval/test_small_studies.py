"""The studies of one file: waiting threads, the pace of the data, the stall of a save, kernels at a model's sizes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from eval import data_throughput, spinning
from eval.bench import verify_models
from tests.ops.stand_ins import replace_backend
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise

ROOT = Path(__file__).parents[2]


def rows_of(printed: str) -> list[list[str]]:
    """Cells of the table that is printed, without its rule."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def spin(monkeypatch, capsys, *arguments: str) -> tuple[list[list[str]], dict[str, dict[str, float]]]:
    """The table of eval.spinning, and the rates that are printed after it."""
    monkeypatch.setattr(sys, "argv", ["eval.spinning", *arguments])
    spinning.main()
    printed = capsys.readouterr().out
    return rows_of(printed), json.loads(printed.splitlines()[-1])


def test_ways_of_waiting_are_compared_with_the_librarys_own_alone(monkeypatch, capsys):
    own, passive, bounded = spinning.WAYS
    rates = {"alone": {own: 50.0, passive: 40.0, bounded: 60.0}, "busy loops": {own: 5.0, passive: 20.0, bounded: 10.0}}
    monkeypatch.setattr(spinning, "measure", lambda seconds, rounds, count: rates)
    table, found = spin(monkeypatch, capsys)
    assert found == rates
    assert table == [
        ["beside", own, passive, bounded],
        ["alone", "1.000", "0.800", "1.200"],
        ["busy loops", "0.100", "0.400", "0.200"],
    ]


@pytest.mark.slow
def test_every_way_of_waiting_is_measured_beside_every_neighbor(monkeypatch, capsys):
    _, found = spin(monkeypatch, capsys, "--seconds", "0.1", "--rounds", "1", "--neighbors", "1")
    assert set(found) == set(spinning.NEIGHBORS)
    assert all(set(rates) == set(spinning.WAYS) for rates in found.values())
    assert all(rate > 0 for rates in found.values() for rate in rates.values())


def test_every_way_from_documents_to_rows_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path(asyncio.__file__).parent))
    monkeypatch.setattr(sys, "argv", ["eval.data_throughput", "--tokens", "1", "--vocab-size", "300", "--gpu", "1000"])
    data_throughput.main()
    table = rows_of(capsys.readouterr().out)
    assert table[0][2] == "cores for 8 GPUs at 1,000 tokens/s"
    ways = ["train on documents, bytes", "train on documents, BPE", "xlstm-lm tokenize, BPE", "train on token ids, BPE"]
    assert [way.removesuffix(" 300") for way, *_ in table[1:]] == ways
    for _, rate, cores in table[1:]:
        assert float(cores) == pytest.approx(8 * 1000 / float(rate.replace(",", "")), abs=0.006)


@pytest.mark.slow
def test_a_save_is_timed_from_its_call_to_the_published_checkpoint(tmp_path):
    model = "xlstm:embedding_dim=16,num_blocks=1,num_heads=2,vocab_size=256"
    command = [sys.executable, "-m", "eval.save_stall", "--model", model, "--saves", "2", "--out", "stall.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "stall.json").read_text())
    assert written["bytes"] == 12 * written["parameters"] and written["processes"] == 1
    table = rows_of(done.stdout)
    assert [row[1] for row in table[1:]] == 2 * ["first", "later ones, median"]
    for saves in written["saves"].values():
        assert len(saves) == 2
        for save in saves:
            assert save["blocking_seconds"] > 0 and save["published_seconds"] > 0
            assert save["share"] == pytest.approx(save["blocking_seconds"] / save["published_seconds"])
    first = next(iter(written["saves"].values()))[0]
    assert table[1][2:4] == [f"{1e3 * first['blocking_seconds']:.1f}", f"{first['published_seconds']:.2f}"]
    assert not list(tmp_path.glob("save-stall-*"))


def test_a_kernel_that_is_wrong_at_a_models_sizes_is_named(monkeypatch, capsys):
    model = "xlstm:embedding_dim=16,num_blocks=1,num_heads=2,vocab_size=256"
    assert verify_models.main([model, "--rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("mlstm / compiled" in line for line in lines) and all(line.endswith(": right") for line in lines)

    def wrong(*inputs, **options):
        result = mlstm_chunkwise(*inputs, **options)
        return (1.5 * result[0], *result[1:]) if isinstance(result, tuple) else 1.5 * result

    replace_backend(monkeypatch, MLSTM, "chunkwise", wrong)
    assert verify_models.main([model, "--rows", "1"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": right")]
    assert any("mlstm / chunkwise" in line and "wrong" in line for line in bad), bad
