"""Nothing is written over, or into, what is there already: one guard for every command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from xlstm_lm import cli
from xlstm_lm.base.outputs import (
    check_folder_of_runs,
    check_new_folder,
    check_output_file,
    check_run_folder,
    whole_or_not_at_all,
)
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.run_layout import RUN_SECTIONS
from xlstm_lm.training.run_config import load_run_config


@pytest.fixture
def place(tmp_path):
    """A folder with a run, an export, a tokenizer and others, made of empty files."""
    run_config = "".join(f"{section}: {{}}\n" for section in RUN_SECTIONS)
    files = {
        "run/config.yaml": run_config,
        "run/metrics.jsonl": '{"step": 1}\n',
        "run/wandb/latest-run": "",
        "run/checkpoints/latest": "",
        "run/checkpoints/step_00000004/config.yaml": run_config,
        "run/checkpoints/step_00000004/model.safetensors": "",
        "run/checkpoints/step_00000004/state.json": "{}",
        "run/checkpoints/step_00000004/manifest.json": "{}",
        "run/checkpoints/step_00000004/tokenizer/tokenizer.json": "",
        "run/checkpoints/step_00000002/state.json": "damaged: its manifest is missing",
        "begun/config.yaml": run_config,
        "begun/notes/today": "",
        "export/config.json": "{}",
        "export/model.safetensors.index.json": "",
        "tokenizer/tokenizer.json": "",
        "tokenizer/tokenizer_config.json": "",
        "data/1.txt": "",
        "recipes/config.yaml": "model: {}  # mine\n",
        "project/src/main.py": "",
        "logs/slurm-1.out": "",
        "logs/.gitkeep": "",
        "logs/Notes.txt": "",
        "file": "",
        "results.json": '{"environment": {}}',
        "picture.png": "",
        "settings.json": '{"model": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "launched" / "logs" / "job_7_attempt_0").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run/checkpoints/step_00000004")
    (tmp_path / "nowhere").symlink_to("unmounted")
    (tmp_path / "loop").symlink_to("loop")
    shutil.copytree(tmp_path / "link", tmp_path / "kept")
    return tmp_path


INSIDE = [
    ("run/checkpoints", "of a run|keeps its own checkpoints"),
    ("run/checkpoints/step_00000009", "the checkpoints folder of a run"),
    ("run/checkpoints/step_00000004/a/b", "lies in .*step_00000004, which is a checkpoint"),
    ("run/checkpoints/step_00000002/a", "which is a checkpoint"),
    ("link/a", "which is a checkpoint"),
    ("project/../run/checkpoints/a", "the checkpoints folder of a run"),
    ("run/wandb/a", "the wandb folder of a run"),
    ("run/tokenizer", "keeps its own tokenizer"),
    ("export/a/b/c", "which is a model"),
    ("tokenizer/a", "which is a tokenizer"),
]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *INSIDE,
        ("run/checkpoints/step_00000004", "is a checkpoint, which a run in it would destroy.*--training.resume"),
        ("run/checkpoints/step_00000002", "is a checkpoint"),
        ("link", "is a checkpoint"),
        ("kept", "is a checkpoint"),
        ("nowhere", "symbolic link to unmounted, which is not there"),
        ("export", "is a model"),
        ("tokenizer", "is a tokenizer"),
        ("data", r"no run's folder and is not empty \(1.txt\)"),
        ("project", r"not empty \(src\)"),
        ("recipes", "a config.yaml that no run has written"),
        ("file", "is a file"),
        ("file/run", "a part of this path is a file"),
        ("x" * 300, "no place to write to .File name too long"),
        ("loop/run", "no place to write to .Too many levels of symbolic links"),
    ],
)
def test_a_run_is_refused_where_something_else_lies(place, name, message):
    with pytest.raises(ValueError, match=message):
        check_run_folder(place / name)


FREE = ["run", "run/../run", "begun", "logs", "launched", "empty", "new", "new/er", "run/branch"]


@pytest.mark.parametrize("name", FREE)
def test_a_run_may_go_where_a_run_is_or_nothing_that_matters(place, name):
    check_run_folder(place / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *INSIDE,
        ("run", "is not empty: it holds a run; choose another folder"),
        ("begun", "is not empty: it holds a run"),
        ("kept", "is not empty: it holds a checkpoint"),
        ("link", "the checkpoints folder of a run"),
        ("nowhere", "symbolic link"),
        ("export", "holds a model"),
        ("tokenizer", "holds a tokenizer"),
        ("logs", "is not empty"),
        ("file", "is a file"),
        ("file/new", "a part of this path is a file"),
        ("/dev/null", "is a file"),
        ("x" * 300, "no place to write to .File name too long"),
    ],
)
def test_a_new_folder_is_new(place, name, message):
    with pytest.raises(ValueError, match=message):
        check_new_folder(place / name)
    for free in ("empty", "a/new", "run/export"):
        check_new_folder(place / free)


def test_a_place_without_permission_is_refused_before_any_work(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != place / "data")  # tests may run as root
    for check in (check_run_folder, check_new_folder, check_output_file, check_folder_of_runs):
        with pytest.raises(ValueError, match=f"no permission to write in {place}/data"):
            check(place / "data" / "a" / "new")


def test_the_current_folder_is_not_replaced(place, monkeypatch):
    monkeypatch.chdir(place / "empty")
    for name in (".", "../empty"):
        with pytest.raises(ValueError, match="is the current folder"):
            check_new_folder(Path(name))
    check_run_folder(Path())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run", "is a folder"),
        ("run/metrics.jsonl", "keeps its own metrics.jsonl"),
        ("run/checkpoints/step_00000004/x.json", "which is a checkpoint"),
        ("export/x.json", "which is a model"),
        ("settings.json", "holds no earlier results"),
        ("file", "holds no earlier results"),
        ("picture.json", "its picture would replace .*picture.png"),
    ],
)
def test_results_replace_results_only(place, name, message):
    with pytest.raises(ValueError, match=message):
        check_output_file(place / name)
    for free in ("results.json", "a/new.json", "run/perplexity.json"):
        check_output_file(place / free)


def test_a_study_has_a_folder_of_its_own(place):
    for name in ("run", "export", "tokenizer", "run/checkpoints/step_00000004/x"):
        with pytest.raises(ValueError, match="is a |keeps its own"):
            check_folder_of_runs(place / name)
    for name in ("new", "project", "logs"):
        check_folder_of_runs(place / name)


def test_two_that_write_the_same_folder_do_not_meet(tmp_path):
    out = tmp_path / "a" / "out"
    with whole_or_not_at_all(out) as partial:
        (partial / "file").write_text("first")
        with pytest.raises(ValueError, match="at work there"), whole_or_not_at_all(out):
            pass
    assert [path.name for path in out.iterdir()] == ["file"] and (out / "file").read_text() == "first"
    with pytest.raises(ValueError, match="is not empty"), whole_or_not_at_all(out):
        pass
    with pytest.raises(KeyError), whole_or_not_at_all(tmp_path / "b" / "c"):
        raise KeyError
    assert list(tmp_path.iterdir()) == [out.parent] and list(out.parent.iterdir()) == [out]
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "of one that was killed").touch()
    with whole_or_not_at_all(tmp_path / "d"):
        pass
    assert not list((tmp_path / "d").iterdir())


def test_a_tokenizer_is_trained_into_a_new_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 20)
    command = ["tokenizer", "train", "--files", str(tmp_path / "text.txt"), "--vocab-size", "270", "--out"]
    cli.main([*command, "~/made"])
    names = ["tokenizer.json", "tokenizer_config.json", "xlstm_lm_tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == names
    written = json.loads((tmp_path / "made" / names[-1]).read_text())
    assert written["name"] == str(tmp_path / "made")
    before = (tmp_path / "made" / names[0]).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, str(tmp_path / "made")])
    assert stopped.value.code == 2 and "it holds a tokenizer" in capsys.readouterr().err
    assert (tmp_path / "made" / names[0]).read_bytes() == before


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/run") == tmp_path / "run" and user_path("a~b") == Path("a~b")
    with pytest.raises(ValueError, match="no home folder of that name"):
        user_path("~nobody-of-this-name/run")
    for text, message in (("", "is no path; give"), (" ", "is no path; give"), ("a\0b", "a NUL character")):
        with pytest.raises(ValueError, match=message):
            user_path(text)
    sections = {"model": {"vocab_size": 300}, "data.sources": [], "data.task": {"name": "parity"}}
    run = load_run_config([], sections | {"training.run_dir": "~/run"})
    assert run.training.folder == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    run = load_run_config([], sections | {"training.run_dir": "run"})
    assert run.training.folder == tmp_path / "run"
