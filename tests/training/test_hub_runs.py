"""Runs on a data set of a hub on loopback: what their ranks request and fetch, and what a restart does."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.conftest import make_documents
from tests.data.loopback_hub import COMMIT, LoopbackHub
from tests.training.processes import run_ranks

LATER = "f" * 40


def lines_of(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Blocks of the hub's files that the machine's user may have are not used."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.mark.slow
def test_a_start_on_four_ranks_asks_once_and_a_restart_stays_with_its_commit(tmp_path, monkeypatch):
    files = {f"train/{number}.jsonl": lines_of(make_documents(60, number)) for number in range(4)}
    files["held_out/0.jsonl"] = lines_of(make_documents(20, 9))
    source = {"kind": "hub", "dataset": "org/texts", "split": "train"}
    sources = {name: [source | {"data_files": [f"{name}/*"]}] for name in ("train", "held_out")}
    settings = {"data.sources": sources["train"], "data.validation": sources["held_out"], "training.steps": 6}

    def run(name: str, ranks: int, **changes) -> list[str]:
        """Train on so many ranks and return the requests to the interface of the hub."""
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("HF_HOME", str(tmp_path / f"{name}-{len(hub.requests)}"))
        before = len(hub.requests)
        run_ranks(ranks, "runs", "train", tmp_path / name, json.dumps(settings | changes))
        return [request for request in hub.requests[before:] if "/api/datasets/" in request]

    with LoopbackHub("org/texts", files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        alone = run("one", 1)
        assert 0 < len(run("four", 4, **{"training.steps": 3})) <= len(alone)
        saved = json.loads((tmp_path / "four" / "run" / "hub_commits.json").read_text())
        assert saved == {"commits": [["org/texts", None, COMMIT]]}
        hub.newest = LATER  # someone has changed the README
        requests = run("four", 4)
        assert not any(LATER in request for request in requests)
        states = [
            json.loads((tmp_path / name / "run" / "checkpoints" / "step_00000006" / "state.json").read_text())
            for name in ("one", "four")
        ]
        assert states[0]["data"] == states[1]["data"] and len(states[0]["data"]) == 4


@pytest.mark.slow
def test_ranks_of_a_node_fetch_a_shared_file_once_and_a_restart_fetches_none(tmp_path, monkeypatch):
    """Two compressed files for the four lanes of two ranks; each rank has a data worker."""
    files = {f"{number}.jsonl.gz": gzip.compress(lines_of(make_documents(400, number, 400))) for number in range(2)}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))

    sizes = {name: len(content) for name, content in files.items()}

    def run(folder: Path, steps: int, cache_gib: float) -> tuple[Counter[str], dict]:
        """Train up to a step; returns the bytes that readers fetched of each file, and where the lanes are then."""
        folder.mkdir(exist_ok=True)
        hub.bytes_served.clear()
        source = {"kind": "hub", "dataset": "org/texts", "cache_gib": cache_gib}
        data = {"data.sources": [source], "data.validation": [], "data.num_workers": 1}
        settings = data | {"training.steps": steps, "training.validate_every": 0}
        run_ranks(2, "runs", "train", folder, json.dumps(settings))
        state = folder / "run" / "checkpoints" / f"step_{steps:08}" / "state.json"
        hub.bytes_served["0.jsonl.gz"] -= sizes["0.jsonl.gz"]  # at each start `datasets` looks for the columns there
        return +hub.bytes_served, json.loads(state.read_text())["data"]

    with LoopbackHub("org/texts", files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        fetched, expected = run(tmp_path / "plain", 6, 0)
        assert fetched == {name: 2 * size for name, size in sizes.items()} | {"0.jsonl.gz": 3 * sizes["0.jsonl.gz"]}
        fetched, half = run(tmp_path / "shared", 3, 1)
        assert fetched == sizes
        fetched, states = run(tmp_path / "shared", 6, 1)
    assert half != states == expected
    assert fetched == {}
