"""A comparison: what it is told, which runs it makes of that, how it stops and goes on, and what it collects."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval.compare import __main__ as command
from eval.compare import tested
from eval.compare.collect import collect
from eval.compare.config import check_data, load_comparison
from eval.compare.measure import test_file as path_of_test
from eval.compare.measure import to_test
from eval.compare.results import load_results, save_results
from eval.compare.runs import Runs, to_train, train_all
from eval.study.engine import examine
from xlstm_lm.models.accounting import training_flops_per_token
from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import as_recipe

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 257, "embedding_dim": 16, "num_blocks": 1, "num_heads": 2}
TRAINER = """
# Stands in for the trainer: a run's folder, with losses that follow from learning rate and seed.
import json, pathlib, signal, sys, time, yaml
run = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder, steps = pathlib.Path(run["training"]["run_dir"]), run["training"]["steps"]
rate, seed = run["optimizer"]["learning_rate"], run["training"]["seed"]
with open(ORDER, "a") as order:
    order.write(folder.name + "\\n")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print("at work", flush=True)
begin = time.time()
while not stopped and time.time() < begin + SECONDS:
    time.sleep(0.02)
if rate == 0.5:
    sys.exit("this one always fails")
step = 1 if stopped else steps
record = {"step": step, "tokens": 64 * step, "elapsed_seconds": 1.0}
with open(folder / "metrics.jsonl", "a") as metrics:
    if rate == 0.4:
        lines = [{"split": "train", "skipped": True, "tokens_per_second": 1.0, **record}] * 10
    else:
        loss = abs(rate - 0.2) + 0.001 * seed + 1
        done = {"split": "validation", "loss": loss, "bits_per_byte": loss, "perplexity": 3.0, **record}
        lines = [{"split": "train", "tokens_per_second": 64.0, **record}] + [done] * (not stopped)
    metrics.write("".join(json.dumps(line) + "\\n" for line in lines))
if rate == 0.4:
    sys.exit(1)
checkpoint = folder / "checkpoints" / f"step_{step:08}"
checkpoint.mkdir(parents=True)
(checkpoint / "state.json").write_text(json.dumps({"data_fingerprint": {"seed": seed}}))
"""


@pytest.fixture
def write(tmp_path):
    """Writes a comparison of two tiny models on two small files; keywords replace keys of its section compare."""
    for name, lines in (("train", 400), ("held_out", 40)):
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"{line} bottles of beer on the wall.\n" for line in range(lines))
        )

    def write_comparison(sections=None, **compare) -> Path:
        section = {
            "name": "try",
            "title": "A try",
            "question": "Which?",
            "data": "Bottles.",
            "models": {
                "mlstm": {"label": "xLSTM[1:0]", "sizes": {"tiny": {**TINY, "pattern": "mlstm"}}},
                "transformer": {"label": "Llama", "sizes": {"tiny": {**TINY, "family": "transformer"}}},
            },
            "matched": False,
            "learning_rates": [0.1, 0.2, 0.3],
            "seeds": [0, 1],
            "data_root": str(tmp_path),
        }
        source = [{"kind": "text_lines", "paths": ["train.txt"]}]
        held_out = [{"kind": "text_lines", "paths": ["held_out.txt"]}]
        data = {"context_length": 16, "global_batch_size": 4, "validation_tokens": 256, "num_workers": 0}
        recipe = {
            "compare": section | compare,
            "data": data | {"sources": source, "validation": held_out},
            "training": {"steps": 4, "validate_every": 2, "log_every": 1, "gate_statistics_every": 0},
            "schedule": {"warmup_steps": 1},
        }
        path = tmp_path / "try.yaml"
        path.write_text(yaml.safe_dump(recipe | (sections or {})))
        return path

    return write_comparison


@pytest.fixture
def trainer(tmp_path):
    """Command of the trainer's stand-in, which writes a line to `order` for each run that it is started for."""

    def make(seconds: float = 0.0) -> list[str]:
        (tmp_path / "trainer.py").write_text(
            TRAINER.replace("ORDER", repr(str(tmp_path / "order"))).replace("SECONDS", str(seconds))
        )
        return [sys.executable, str(tmp_path / "trainer.py")]

    return make


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def go(runs: Runs, launch: list[str], only=(), at_once: int = 1):
    return train_all(runs, only, at_once=at_once, launch=launch, max_seconds=None)


def start(path: Path, out: Path, launch: list[str], *more: str) -> subprocess.Popen:
    arguments = ["--config", str(path), "--out", str(out), "--stage", "train", "--launch", " ".join(launch), *more]
    command = [sys.executable, "-m", "eval.compare", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_until_at_work(out: Path, *rates: float) -> None:
    logs = [out / "runs" / f"mlstm-tiny-lr{rate}-seed0" / "output.log" for rate in rates]
    deadline = time.monotonic() + 120
    while not all(log.is_file() and "at work" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, "the runs do not begin"
        time.sleep(0.05)


def are_running(folder: Path) -> bool:
    """Whether a trainer's stand-in runs."""
    return bool(subprocess.run(["pgrep", "-f", str(folder / "trainer.py")], capture_output=True).stdout)


def test_the_other_seeds_follow_the_grid_at_the_best_learning_rate(write, trainer, tmp_path):
    runs = Runs(load_comparison(write()), tmp_path / "out")
    assert len(to_train(runs, ())) == 6
    outcomes = go(runs, trainer())
    expected = [
        f"{model}-tiny-lr{rate}-seed{seed}"
        for model in ("mlstm", "transformer")
        for rate, seed in ((0.1, 0), (0.2, 0), (0.3, 0), (0.2, 1))
    ]
    assert order(tmp_path) == expected == list(outcomes)
    assert [grid.best for grid in runs.grids.values()] == [0.2, 0.2]
    assert go(runs, trainer()) == {}, "what is finished is reused"
    results = collect(runs)
    assert [[run.name for run in model.runs] for model in results.models] == [
        ["mlstm-tiny-lr0.2-seed0", "mlstm-tiny-lr0.2-seed1"],
        ["transformer-tiny-lr0.2-seed0", "transformer-tiny-lr0.2-seed1"],
    ]
    assert results.missing == [] and "fingerprints" in results.notes[0] and len(results.notes) == 1


def test_divergence_loses_ties_go_to_the_lower_rate_and_an_end_of_the_grid_is_told(write, trainer, tmp_path):
    comparison = load_comparison(write(learning_rates=[0.4, 0.1, 0.3], seeds=[0]))
    runs = Runs(comparison, tmp_path / "out")
    go(runs, trainer(), only=["mlstm-*"])
    assert set(order(tmp_path)) == {f"mlstm-tiny-lr{rate}-seed0" for rate in (0.1, 0.3, 0.4)}
    assert runs.grids[runs.models[0].name].best == 0.1
    assert runs.grids[runs.models[1].name].best is None
    notes, missing = "\n".join(collect(runs).notes), "\n".join(collect(runs).missing)
    assert "mlstm-tiny-lr0.4-seed0 diverged" in notes and "0.1, is the lowest of its grid" in notes
    assert "transformer-tiny-lr0.3-seed0 is missing" in missing and "mlstm" not in missing
    assert go(runs, trainer(), only=["mlstm-*"]) == {}, "it would diverge again"


def test_a_failure_is_told_and_tried_again_while_the_others_go_on(write, trainer, tmp_path, capsys):
    runs = Runs(load_comparison(write(learning_rates=[0.5, 0.2], seeds=[0])), tmp_path / "out")
    outcomes = go(runs, trainer(), at_once=2)
    assert {name: outcome.code for name, outcome in outcomes.items() if outcome.code} == {
        "mlstm-tiny-lr0.5-seed0": 1,
        "transformer-tiny-lr0.5-seed0": 1,
    }
    assert "this one always fails" in capsys.readouterr().out
    failed = runs.grids[runs.models[0].name].tuning[1]
    assert examine(failed).status == "failed" and "always fails" in examine(failed).problem
    assert runs.grids[runs.models[0].name].best is None
    assert "not all of the grid are there" in "\n".join(collect(runs).missing)
    assert list(go(runs, trainer(), only=["mlstm-*"])) == ["mlstm-tiny-lr0.5-seed0"]


def test_other_configurations_are_refused_by_field(write, trainer, tmp_path):
    go(Runs(load_comparison(write(seeds=[0])), tmp_path / "out"), trainer(), only=["mlstm-tiny-lr0.1-*"])
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).rename(moved / name)
    Runs(load_comparison(write(seeds=[0]), data_root=str(moved)), tmp_path / "out").check_folders()
    other = Runs(load_comparison(write({"optimizer": {"weight_decay": 0.3}}, seeds=[0])), tmp_path / "out")
    with pytest.raises(ValueError, match=r"mlstm-tiny-lr0.1-seed0:\n  optimizer.weight_decay: 0.1 there, 0.3 now"):
        other.check_folders()


def test_runs_on_other_tokens_are_not_compared(write, trainer, tmp_path):
    runs = Runs(load_comparison(write(learning_rates=[0.2], seeds=[0])), tmp_path / "out")
    go(runs, trainer())
    state = next(runs.grids[runs.models[1].name].tuning[0].folder.glob("checkpoints/*/state.json"))
    state.write_text(json.dumps({"data_fingerprint": {"seed": 0, "sources": "others"}}))
    with pytest.raises(ValueError, match="have not read the same tokens"):
        collect(runs)


def test_a_comparison_that_is_stopped_saves_and_goes_on(write, trainer, tmp_path):
    path, out = write(seeds=[0]), tmp_path / "out"
    process = start(path, out, trainer(60.0), "--at-once", "2")
    wait_until_at_work(out, 0.1, 0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "Go on with:" in output and "--launch" in output and "mlstm-tiny-lr0.1-seed0" in output
    assert not are_running(tmp_path)
    runs = Runs(load_comparison(path), out)
    assert [examine(run).status for run in runs.grids[runs.models[0].name].tuning] == [
        "unfinished",
        "unfinished",
        "missing",
    ]
    go(runs, trainer())
    assert to_train(runs, ()) == []


def test_a_comparison_stops_when_its_time_is_up(write, trainer, tmp_path, capsys):
    arguments = ["--config", str(write(seeds=[0])), "--out", str(tmp_path / "out"), "--stage", "train"]
    arguments += ["--launch", " ".join(trainer(60.0)), "--max-minutes", "0.03"]
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    output = capsys.readouterr().out
    assert ended.value.code == 3 and "transformer-tiny-lr0.1-seed0" in output and "--max-minutes 0.03" in output
    assert order(tmp_path) == ["mlstm-tiny-lr0.1-seed0"] and not are_running(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_comparison_keeps_others_out_and_its_jobs_do_not_outlive_it(write, trainer, tmp_path, capsys):
    path = write(seeds=[0])
    process = start(path, tmp_path / "out", trainer(60.0))
    wait_until_at_work(tmp_path / "out", 0.1)
    with pytest.raises(SystemExit) as ended:
        command.main(["--config", str(path), "--out", str(tmp_path / "out"), "--stage", "train"])
    assert ended.value.code == 2 and "another process is at work" in capsys.readouterr().err
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while are_running(tmp_path):
        assert time.monotonic() < deadline, "the run goes on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": [0.1]}, "compare.learning_rate = .*Did you mean compare.learning_rates?"),
        ({"learning_rates": [0.1, -1.0]}, r"learning_rates.1 = -1.0: must be a number above 0"),
        ({"learning_rates": ["fast"]}, r"compare.learning_rates.0 = 'fast'"),
        ({"seeds": [True]}, r"compare.seeds.0 = true"),
        ({"models": {}}, "models is empty"),
        ({"models": {"x": {"label": "x"}}}, r"compare.models.x.sizes is missing"),
        ({"models": {"x": {"label": "x", "sizes": {}}}}, r"models.x.sizes is empty"),
        ({"name": ".."}, "name is '..'; give a name for a folder"),
        ({"models": {"x": {"label": "x", "sizes": {"s": "xlstm-cpu-1n"}}}}, "Did you mean xlstm-cpu-"),
        (
            {"models": {"x": {"label": "x", "sizes": {"s": {"preset": "xlstm-cpu-1n"}}}}},
            "try.yaml: compare.models.x.sizes.s: model.preset = 'xlstm-cpu-1n' is no preset. Did you mean xlstm-cpu-",
        ),
        ({"models": {"x": {"label": "x", "sizes": {"s": {"num_blokcs": 2}}}}}, "compare.models.x.sizes.s.*num_blocks"),
        ({"sizes": {"huge": {}}}, "names the size huge, which no model has; there are tiny"),
        ({"sizes": {"tiny": {"recipe": {"training": {"step": 3}}}}}, "training.step = 3.*training.steps"),
        (
            {
                "matched": True,
                "models": {
                    key: {"label": key, "sizes": {"s": {**TINY, "num_blocks": blocks}}}
                    for key, blocks in (("a", 1), ("b", 2), ("c", 1))
                },
            },
            r"size s, b differ by more than 1% in parameters \(a 1",
        ),
        ({"test": {"documents": {"data": []}}}, "data is empty"),
        ({"test": {"documents": {"data": ["held_out.txt"]}, "extrapolate": 3}}, "power of two"),
        ({"published": [{"model": "x", "value": "low"}]}, "compare.published.0.value = 'low'"),
        ({"speed": {"length": [4]}}, "compare.speed.length = .*Did you mean compare.speed.lengths?"),
        ({"speed": {"lengths": [64], "tokens": 32}}, "lengths has 64, more than a batch of tokens 32"),
    ],
)
def test_mistakes_in_a_comparison_are_named(write, changes, message):
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_comparison(path)
    assert str(path) in str(caught.value) or "configs" in str(caught.value) or changes.get("sizes")


def test_a_section_that_holds_no_fields_is_not_dropped(write):
    with pytest.raises(ValueError, match=r"try.yaml: training = 3: must be a section with fields"):
        load_comparison(write({"training": 3}))


def test_data_that_are_not_there_are_named_with_the_way_out(write):
    with pytest.raises(ValueError, match=r"nowhere/train.txt is missing.*--data-root FOLDER\. They are: Bottles\."):
        check_data(load_comparison(write(), data_root="nowhere"))


def test_the_section_model_holds_for_all_over_their_presets(write):
    models = {
        key: {"label": key, "sizes": {"s": preset}}
        for key, preset in (("xlstm", "xlstm-cpu-1m"), ("transformer", "transformer-cpu-1m"))
    }
    comparison = load_comparison(write({"model": {"logit_soft_cap": 7.0}}, models=models))
    caps = [comparison.run_config(each, 0.1, 0, Path("run")).model.logit_soft_cap for each in comparison.models]
    assert caps == [7.0, 7.0]
    with pytest.raises(ValueError, match=r"try.yaml: model.num_bloks = 3: .* Did you mean model.num_blocks\?"):
        load_comparison(write({"model": {"num_bloks": 3}}, models=models))


def test_an_architecture_may_have_a_grid_of_its_own_at_a_size(write):
    models = {
        "mlstm": {"label": "x", "sizes": {"a": TINY, "b": TINY}, "learning_rates": {"b": [3.0]}},
        "other": {"label": "o", "sizes": {"a": TINY, "b": TINY}},
    }
    sizes = {"b": {"learning_rates": [2.0, 1.0], "recipe": {"training": {"steps": 7}}}}
    comparison = load_comparison(write(models=models, sizes=sizes))
    grids = {model.name: model.learning_rates for model in comparison.models}
    common = [0.1, 0.2, 0.3]
    assert grids == {"mlstm-a": common, "other-a": common, "mlstm-b": [3.0], "other-b": [1.0, 2.0]}
    steps = {model.name: comparison.run_config(model, 1.0, 0, Path("x")).training.steps for model in comparison.models}
    assert steps == {"mlstm-a": 4, "other-a": 4, "mlstm-b": 7, "other-b": 7}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*-1m.yaml")), ids=lambda path: path.stem)
def test_comparisons_for_a_cpu_are_valid_and_short(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = load_comparison(path)
    assert len(comparison.models) == {"peps-1m": 14, "wikitext2-1m": 15}[path.stem]
    assert comparison.config.test and comparison.config.speed
    assert len(path.read_text().splitlines()) <= 40


def test_results_of_real_runs(write, tmp_path):
    """Two runs by the trainer itself, tested and collected, with figures that follow from them."""
    test = {"documents": {"data": ["held_out.txt"]}, "extrapolate": 4, "scoring": {"batch_size": 2}}
    runs = Runs(load_comparison(write(learning_rates=[0.01], seeds=[0], test=test)), tmp_path / "out")
    for run in to_train(runs, ()):
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(as_recipe(run.config))
        train(run.config)
    runs.check_folders()
    assert to_train(runs, ()) == [] and len(to_test(runs, ())) == 2
    located = runs.comparison.test_documents()
    settings = tested.as_json(runs.comparison.config.test).replace('"held_out.txt"', json.dumps(located.data[0]))
    for run in to_test(runs, ()):
        tested.main(["--run", str(run.folder), "--test", settings, "--out", str(path_of_test(runs, run))])
    assert to_test(runs, ()) == []

    save_results(collect(runs), tmp_path / "results.json")
    results = load_results(tmp_path / "results.json")
    assert results.missing == [] and "the 2 runs" in results.notes[0] and "in different ways" in results.notes[1]
    assert "run_dir" not in results.recipe and "learning_rate" not in results.recipe
    recurrent, attending = (model.runs[0] for model in results.models)
    assert recurrent.tested.how == "state carried through each document"
    assert attending.tested.how == "windows of 16 tokens, stride 8"
    size = len((tmp_path / "held_out.txt").read_bytes())
    for model in results.models:
        run = model.runs[0]
        assert (run.status, run.steps, run.tokens) == ("finished", 4, 4 * 4 * 16)
        assert [point.step for point in run.curve] == [2, 4]
        section = runs.grids[next(each.name for each in runs.models if each.label == model.label)].runs[0].config.model
        assert run.curve[0].flops == pytest.approx(128 * training_flops_per_token(section, 16))
        assert run.tested.bytes == run.tested.tokens == size
        assert run.tested.bits_per_byte == pytest.approx(run.tested.loss / math.log(2))
        assert sum(bucket.tokens for bucket in run.tested.by_position) == size
        assert [point.context_length for point in run.tested.extrapolation] == [16, 32, 64]
        assert run.environment["versions"]["torch"] and model.tried[0].tested is None
    cache = dict(results.models[1].state_bytes)
    assert cache[32] == 2 * cache[16] > 0
    assert len({size for _, size in results.models[0].state_bytes}) == 1


@pytest.mark.slow
def test_the_whole_of_the_smallest_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["--config", "configs/compare/smoke.yaml", "--out", str(tmp_path)]
    for expected in ("begins", "Nothing is left to do"):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        output = capsys.readouterr().out
        assert ended.value.code == 0 and expected in output, output
    assert "begins" not in output, "the second time there is nothing to do"
    results = load_results(tmp_path / "results.json")
    assert results.missing == []
    assert all(run.tested and run.status == "finished" for model in results.models for run in model.runs)
    assert {row["name"] for row in results.training_speed} == {model.speed_name for model in results.models}
    assert results.generation_speed and (tmp_path / "report.html").stat().st_size > 10_000
