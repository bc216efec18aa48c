"""The made-up tasks: what their sequences are, that a lane's never change, and a study from recipe to picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval.study import engine
from eval.study.jobs import Outcome
from eval.tasks.__main__ import main
from eval.tasks.accuracy import answer_cases
from eval.tasks.formal import LANGUAGES
from eval.tasks.registry import TASKS, build_task
from eval.tasks.rows import BLOCK, TaskData
from eval.tasks.study import load_study
from eval.tasks.summary import as_markdown, summarize
from eval.tasks.task import scaled_accuracy
from xlstm_lm import hub
from xlstm_lm.data import DataConfig
from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import load_run_config

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "tasks").glob("*.yaml"))
STEPS = {"STAY": 0, "+1": 1, "-1": -1}
ORACLES = {
    "parity": lambda symbols: str(symbols.count("1") % 2),
    "even_pairs": lambda symbols: "a" if symbols[0] == symbols[-1] else "b",
    "cycle_navigation": lambda symbols: f"P{sum(STEPS[symbol] for symbol in symbols) % 5}",
    "modular_arithmetic": lambda symbols: str(eval("".join(symbols)) % 5),
    "modular_arithmetic_brackets": lambda symbols: str(eval("".join(symbols)) % 5),
}


def data(task: dict, context_length: int = 64, lanes: int = 4) -> TaskData:
    return TaskData(DataConfig(context_length=context_length, global_batch_size=lanes, task=task, sources=[]))


@pytest.mark.parametrize("name", LANGUAGES)
def test_strings_have_the_answers_of_their_language(name):
    task = build_task({"name": name, "ask": "every"})
    generator = np.random.default_rng(1)
    answers, lengths = [], set()
    for _ in range(300):
        tokens, targets = task.draw(generator)
        symbols = [task.symbols[token] for token in tokens]
        lengths.add(len(symbols))
        for end in range(1, len(symbols) + 1):
            if targets[end - 1] != -100:
                assert task.symbols[targets[end - 1]] == ORACLES[name](symbols[:end])
        answers.append(task.symbols[targets[-1]])
    allowed = range(3, 41, 2) if name == "modular_arithmetic" else range(3, 41)
    assert lengths == set(allowed)
    shares = [answers.count(answer) / 300 for answer in LANGUAGES[name].answers]
    assert sum(shares) == 1 and min(shares) > 0.4 * task.chance
    tokens, targets = task.example((41,), generator)
    assert len(tokens) == 41 and np.flatnonzero(targets != -100).tolist() == [40]
    assert task.symbols[targets[-1]] == ORACLES[name]([task.symbols[token] for token in tokens])


def test_only_the_last_answer_is_a_target_as_published():
    task = build_task({"name": "parity"})
    assert len(task.symbols) == 3 and task.chance == 0.5
    for _ in range(20):
        tokens, targets = task.draw(np.random.default_rng(2))
        assert np.flatnonzero(targets != -100).tolist() == [len(tokens) - 1]


def test_recall_asks_for_each_key_once_and_its_value_follows():
    task = build_task({"name": "associative_recall", "vocab_size": 128})
    generator = np.random.default_rng(0)
    gaps = []
    for context, pairs in [(64, 4), (64, 16), (256, 32)] * 20:
        tokens, targets = task.example((context, pairs), generator)
        value_of = dict(zip(tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(value_of) == pairs and max(value_of) < 64 <= min(value_of.values())
        queries = np.flatnonzero(targets != -100)
        assert sorted(tokens[queries].tolist()) == sorted(value_of) and min(queries) >= 2 * pairs
        assert [value_of[key] for key in tokens[queries].tolist()] == targets[queries].tolist()
        assert targets[queries].tolist() == tokens[queries + 1].tolist()
        gaps += ((queries - 2 * pairs) / (context - 2 * pairs)).tolist() if pairs == 4 else []
    assert np.median(gaps) < 0.35  # most come soon


@pytest.mark.parametrize("name", TASKS)
def test_a_lane_gives_the_same_whoever_reads_it_and_wherever_it_is_taken_up(name):
    task = {"name": name} | ({"cases": [[16, 2], [64, 8]]} if name == "associative_recall" else {"lengths": [3, 20]})
    whole = data(task).stream(range(4), seed=7)
    batches = [whole.next_batch() for _ in range(30)]
    assert whole.state_dict()["1"] > BLOCK / 3
    halves = [data(task).stream(lanes, seed=7) for lanes in (range(2), range(2, 4))]
    for batch in batches[:10]:
        parts = [half.next_batch() for half in halves]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    state = json.loads(json.dumps(halves[0].state_dict() | halves[1].state_dict()))
    later = data(task).stream(range(4), seed=7)
    later.next_batch()
    later.load_state_dict(state)
    for batch in batches[10:]:
        found = later.next_batch()
        for field in ("tokens_BT", "targets_BT", "resets_BT"):
            assert torch.equal(getattr(found, field), getattr(batch, field))
        assert found.document_ids == batch.document_ids
    other = data(task).stream(range(4), seed=8)
    assert not torch.equal(other.next_batch().tokens_BT, batches[0].tokens_BT)
    assert other.fingerprint() != later.fingerprint() == whole.fingerprint()


def test_sequences_are_passed_over_once_also_after_a_restart():
    task = data({"name": "parity", "lengths": [3, 20]})
    stream = task.stream(range(2), seed=7)
    stream.next_batch()
    state = stream.state_dict()
    stream.next_batch()
    places = stream.next_batch().document_places[1]
    stream.load_state_dict(state)
    stream.pass_over({"1": places, "9": [0]})
    again = task.stream(range(2), seed=7)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for each in (stream, again):
        batches = [each.next_batch() for _ in range(4)]
        given = [[place for batch in batches for place in batch.document_places[lane]] for lane in (0, 1)]
        assert given[0] == list(range(state["0"], state["0"] + len(given[0])))
        assert given[1] == [n for n in range(state["1"], state["1"] + 99) if n not in places][: len(given[1])]
        assert places and given[1][0] < places[0] and each.state_dict()["1"] == given[1][-1] + 1 > places[-1]
        undisturbed = task.stream(range(2), seed=7)
        undisturbed.load_state_dict({"0": 0, "1": batches[-1].document_places[1][0]})
        assert torch.equal(undisturbed.next_batch().tokens_BT[1], batches[-1].tokens_BT[1])


def test_rows_hold_whole_sequences_each_with_a_reset_and_lose_none():
    made = data({"name": "cycle_navigation", "lengths": [3, 20]})
    stream = made.stream(range(1), seed=0)
    generator = np.random.default_rng((0, 0, 0, 0))
    expected = [made.task.draw(generator) for _ in range(BLOCK)]
    found = []
    while len(found) < BLOCK:
        batch = stream.next_batch()
        starts = np.flatnonzero(batch.resets_BT[0]).tolist()
        for begin, end in zip(starts, [*starts[1:], 64], strict=True):
            tokens, targets = batch.tokens_BT[0, begin:end].numpy(), batch.targets_BT[0, begin:end].numpy()
            if tokens[0] != made.task.padding:
                found.append((tokens, targets))
            else:
                assert (tokens == made.task.padding).all() and (targets == -100).all()
    for (tokens, targets), (wanted_tokens, wanted_targets) in zip(found, expected):
        assert tokens.tolist() == wanted_tokens.tolist() and targets.tolist() == wanted_targets.tolist()


def test_held_out_rows_are_the_same_for_any_number_of_ranks():
    made = data({"name": "parity"}, context_length=40)
    made.config.validation_tokens = 7 * 40

    def rows(size: int, world: int) -> torch.Tensor:
        ranks = [list(made.validation_batches(rows=size, rank=rank, world_size=world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        in_order = [batch for together in zip(*ranks, strict=True) for batch in together]
        asked = torch.cat([batch.targets_BT for batch in in_order])
        return asked[(asked != -100).any(1)]

    assert len(rows(3, 1)) == 7 and torch.equal(rows(3, 1), rows(2, 2)) and torch.equal(rows(1, 4), rows(7, 1))


def test_scaled_accuracy_is_0_at_chance_and_1_when_perfect():
    assert scaled_accuracy(0.2, 0.2) == 0 and scaled_accuracy(1.0, 0.2) == 1
    assert scaled_accuracy(0.6, 0.2) == pytest.approx(0.5)


class KnowsParity(torch.nn.Module):
    """A model that is right on strings of up to 20 bits, and always says 0 beyond."""

    def forward(self, tokens_BT):
        answers_BT = tokens_BT.cumsum(1) % 2 * (torch.arange(tokens_BT.shape[1]) < 20)
        return torch.nn.functional.one_hot(answers_BT, 3).float()

    def logits(self, hidden):
        return hidden


def test_accuracy_counts_right_answers():
    short, long = answer_cases(KnowsParity(), build_task({"name": "parity"}), [(20,), (100,)], 400)
    assert short == {"case": [20], "answers": 400, "accuracy": 1.0, "scaled": 1.0}
    assert abs(long["scaled"]) < 0.2


STUDY = {
    "title": "Tiny",
    "task": {"name": "parity", "lengths": [3, 8], "ask": "every"},
    "test": [8, 20],
    "test_sequences": 50,
    "run": {
        "model": {"num_blocks": 1, "embedding_dim": 16},
        "data": {"context_length": 16, "global_batch_size": 4, "validation_tokens": 64},
        "training": {
            "steps": 6,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 3,
            "gate_statistics_every": 0,
            "precision": "fp32",
        },
        "schedule": {"warmup_steps": 2},
    },
    "grid": {"optimizer.learning_rate": [0.01, 0.001], "training.seed": [0, 1]},
    "models": {
        "xlstm[0:1]": {"family": "xlstm", "pattern": "slstm", "num_heads": 1, "slstm_backend": "recurrence"},
        "lstm": {"family": "lstm"},
    },
}


def write_study(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return path


def train_here(jobs, at_once, then, max_seconds=None) -> dict[str, Outcome]:
    """Stand-in for `run_jobs`: one job after the other in this process, which has imported everything already."""
    del at_once, max_seconds
    outcomes, waiting = {}, list(jobs)
    while waiting:
        job = waiting.pop(0)
        assert job.command[:3] == [sys.executable, "-m", "eval.tasks"]
        main(job.command[3:])
        outcomes[job.name] = Outcome(name=job.name, code=0, seconds=0.0, asked_to_stop=False, last_lines="")
        waiting = [*then(outcomes[job.name]), *waiting]
    return outcomes


def test_a_study_trains_reuses_tests_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "run_jobs", train_here)
    path = write_study(tmp_path)
    flags = ["--config", str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--only", "lstm"])
    assert ended.value.code == 0
    run_dir = tmp_path / "runs" / "lstm-learning_rate-0.01-seed-0"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["bits_per_byte"] is None for line in lines)
    assert lines[-1]["split"] == "validation" and lines[-1]["loss"] < lines[0]["loss"]
    shown = capsys.readouterr().err
    assert "loss" in shown and "byte" not in shown
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert recipe["data"]["task"]["name"] == "parity" and recipe["data"]["sources"] == []
    symbols = json.loads((run_dir / "checkpoints/step_00000006/tokenizer/symbols.json").read_text())
    assert symbols["symbols"] == ["0", "1", "PAD"]
    loaded = hub.load(run_dir)
    assert loaded(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 3)
    with pytest.raises(ValueError, match="no tokenizer"):
        _ = loaded.tokenizer
    with pytest.raises(ValueError, match=r"python -m eval\.tasks --run"):
        train(load_run_config([run_dir / "config.yaml"]))

    written = (run_dir / "checkpoints/step_00000006/manifest.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        main(flags)
    assert (run_dir / "checkpoints/step_00000006/manifest.json").stat().st_mtime_ns == written
    out = json.loads((tmp_path / "out.json").read_text())
    assert not out["missing"] and out["environment"]["torch"]
    for model in ("xlstm[0:1]", "lstm"):
        tried = {
            (run["settings"]["optimizer.learning_rate"], run["settings"]["training.seed"]): run["validation_loss"]
            for run in out["runs"]
            if run["model"] == model
        }
        best = min((0.01, 0.001), key=lambda rate: tried[rate, 0])
        assert tried.keys() == {(0.01, 0), (0.001, 0), (best, 1)}
    assert [case["case"] for case in out["runs"][0]["cases"]] == [[8], [20]]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| model; length: | 8 | 20 |" in table and "| xlstm[0:1], lr 0.0" in table and "| lstm, lr 0.0" in table
    with pytest.raises(SystemExit) as refused:
        main(["--config", str(write_study(tmp_path, run=STUDY["run"] | {"z": 1})), *flags[2:]])
    assert refused.value.code == 2


def test_a_run_that_was_cut_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """A run that died behind step 4 repeats its last steps to the digit."""
    monkeypatch.setattr(engine, "run_jobs", train_here)
    path = write_study(tmp_path, grid={}, models={"xlstm[0:1]": STUDY["models"]["xlstm[0:1]"]})
    flags = ["--config", str(path), "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit):
        main(flags)
    run_dir = tmp_path / "runs" / "xlstm-0-1"
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (run_dir / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    main(["--run", str(run_dir / "config.yaml")])
    assert [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == losses
    sessions = json.loads((run_dir / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 4]


def test_the_best_learning_rate_is_shown_with_the_range_over_seeds():
    def run(rate: float, seed: int, loss: float, scaled: float) -> dict:
        settings = {"optimizer.learning_rate": rate, "training.seed": seed, "model.embedding_dim": 32}
        return {
            "model": "lstm",
            "settings": settings,
            "validation_loss": loss,
            "cases": [{"case": [40], "scaled": scaled}],
        }

    runs = [run(0.1, 0, 0.3, 0.0), run(0.01, 0, 0.2, 0.5), run(0.01, 1, 0.9, 0.75)]
    (curve,) = summarize(runs)
    assert (curve.panel, curve.learning_rate, curve.seeds) == ("embedding_dim 32", 0.01, 2)
    assert curve.points == [((40,), 0.625, 0.5, 0.75)]
    table = as_markdown([curve], build_task({"name": "parity"}))
    assert "| lstm, embedding_dim 32, lr 0.01 | 0.62 (0.50 to 0.75) |" in table


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_valid_and_short(path, tmp_path):
    assert load_study(path, tmp_path).runs
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "pariti"}}, r"task.name is 'pariti': there is no such task. Did you mean parity\?"),
        (
            {"task": {"name": "parity", "lenghts": [3, 8]}},
            r"task.lenghts = .*: there is no such field. Did you mean task.lengths\?",
        ),
        ({"task": {"name": "modular_arithmetic"}}, r"test names \[8\]; for modular_arithmetic give an odd length"),
        ({"task": {"name": "associative_recall"}, "test": [[64, 32]]}, r"\[64, 32\] is no case of associative_recall"),
        ({"modells": {}}, r"modells = {}: there is no such field. Did you mean models\?"),
        ({"grid": {"training.sed": [0]}}, r"run .*sed-0: training.sed = 0: .* Did you mean training.seed\?"),
        ({"models": {"a": {"family": "lstm", "cell": "lstn"}}}, r"run a-.*model.cell = 'lstn'"),
        ({"test": []}, r"models, test and each list of grid must not be empty"),
        ({"grid": {"training.seed": []}}, "each list of grid must not be empty"),
        ({"grid": {"training.seed": [0, 0]}}, "several runs are called lstm-.*seed-0; give each value of grid once"),
        ({"run": {"model": "xlstm-cpu-1m"}}, "run.model = 'xlstm-cpu-1m': must be a section with fields"),
        ({"task": {"name": []}}, r"task.name is \[\]: there is no such task"),
        ({"task": {"name": "parity", "lengths": [3, 10**25]}}, "task.lengths.1 = .*: must be a whole number from 1"),
    ],
)
def test_a_wrong_study_is_refused_by_name_before_anything_runs(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_wrong_flags_end_with_one_message(tmp_path, capsys):
    path = str(write_study(tmp_path))
    for flags, message in (
        (["--config", path, "--only", "lstn"], "no such model. Did you mean lstm?"),
        (["--config", str(tmp_path / "no.yaml")], "does not exist"),
        (["--config", path, "--at-once", "0"], "must be a whole number from 1"),
        (["--run", path, "--only", "lstm"], "--run takes neither"),
        ([], "one of the arguments --config --run is required"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_sequences_longer_than_a_row_are_refused():
    with pytest.raises(ValueError, match="context_length is 16, but sequences of the task have up to 40 tokens"):
        data({"name": "parity"}, context_length=16)


@pytest.mark.parametrize(
    ("flags", "seconds"), [([], None), (["--max-minutes", "1.5"], 90), (["--max-minutes", "0"], 0)]
)
def test_minutes_are_seconds_for_the_runs(flags, seconds, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("eval.tasks.__main__.train_runs", lambda study, at_once, limit: given.append((at_once, limit)))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(STUDIES[0]), "--runs", str(tmp_path / "runs"), *flags])
    assert given == [(1, seconds)] and ended.value.code == 1, "runs are missing"
