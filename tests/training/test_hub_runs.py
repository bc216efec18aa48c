"""Runs on a data set of a hub on loopback: one rank asks for all, and a restart reads the commit of the first start."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import make_documents
from tests.data.loopback_hub import COMMIT, LoopbackHub
from tests.training.processes import run_ranks

LATER = "f" * 40


def lines_of(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


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
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
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
