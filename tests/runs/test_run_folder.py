"""Which run a recipe means, whether a run without checkpoints has lost them, and its record of sessions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml

from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.same_run import open_run_folder, run_of_recipe
from xlstm_lm.runs.session import record_session
from xlstm_lm.runs.status import RunStatus, write_status
from xlstm_lm.training.run_config import load_run_config


def make_run(folder: Path, run_dir: str, steps: range = range(1, 5), checkpoint: int | None = 4, every: int = 2) -> str:
    """A run's folder as far as its records go; gives the path of its config.yaml."""
    folder.mkdir(parents=True)
    recipe = {
        "model": {"family": "xlstm"},
        "data": {"sources": []},
        "training": {"run_dir": run_dir, "checkpoint_every": every},
    }
    recipe |= {"optimizer": {"kind": "adamw"}, "schedule": {}, "safeguards": {}, "wandb": {}, "deepspeed": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"split": "train", "step": step, "tokens": step}) + "\n" for step in steps)
    )
    if checkpoint is not None:
        inside = folder / "checkpoints" / f"step_{checkpoint:08}"
        inside.mkdir(parents=True)
        for name in ("config.yaml", "state.json", "manifest.json"):
            (inside / name).write_text((folder / "config.yaml").read_text())
    return str(folder / "config.yaml")


def test_a_runs_recipe_means_the_run_beside_it(tmp_path, monkeypatch):
    relative = make_run(tmp_path / "a" / "run", "run")
    monkeypatch.chdir(tmp_path / "a")
    assert run_of_recipe("run", "run/config.yaml") is None  # where it began
    monkeypatch.chdir(tmp_path)
    assert run_of_recipe("run", "a/run/config.yaml") == tmp_path / "a" / "run"
    make_run(tmp_path / "run", "run")  # another one that is called the same here
    assert run_of_recipe("run", relative) == tmp_path / "a" / "run"
    copy = make_run(tmp_path / "copy", str(tmp_path / "run"))
    assert run_of_recipe(str(tmp_path / "run"), copy) == tmp_path / "copy"
    (tmp_path / "link").symlink_to("run")
    assert run_of_recipe(str(tmp_path / "link"), str(tmp_path / "run" / "config.yaml")) is None
    inside = tmp_path / "a" / "run" / "checkpoints" / "step_00000004"
    assert run_of_recipe("run", str(inside / "config.yaml")) == tmp_path / "a" / "run"
    inside.rename(tmp_path / "kept")
    assert run_of_recipe("run", str(tmp_path / "kept" / "config.yaml")) == tmp_path / "kept"


def test_other_recipes_mean_the_folder_that_they_name(tmp_path):
    own = make_run(tmp_path / "run", "elsewhere")
    recipe = tmp_path / "run" / "mine.yaml"
    recipe.write_text(Path(own).read_text())
    assert run_of_recipe("elsewhere", str(recipe)) is None
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "config.yaml").write_text(Path(own).read_text())  # of a run, but none is there
    assert run_of_recipe("elsewhere", str(tmp_path / "recipes" / "config.yaml")) is None


def test_only_the_file_that_names_run_dir_decides(tmp_path, caplog):
    own = make_run(tmp_path / "moved", str(tmp_path / "before"))
    recipe = yaml.safe_load(Path(own).read_text())
    recipe["model"] = {"vocab_size": 300}
    recipe["data"] = {"sources": [], "task": {"name": "parity"}}
    Path(own).write_text(yaml.safe_dump(recipe))
    assert load_run_config([own]).training.folder == tmp_path / "moved"
    assert f"belongs to the run in {tmp_path / 'moved'}" in caplog.text
    other = {"training.run_dir": str(tmp_path / "new")}
    assert load_run_config([own], other).training.folder == tmp_path / "new"
    (tmp_path / "later.yaml").write_text("training: {run_dir: later}\n")
    assert load_run_config([own, tmp_path / "later.yaml"]).training.run_dir == "later"
    (tmp_path / "above.yaml").write_text("include: [moved/config.yaml]\ntraining: {steps: 7}\n")
    assert load_run_config([tmp_path / "above.yaml"]).training.folder == tmp_path / "moved"


@pytest.mark.parametrize(
    ("steps", "every", "gone"),
    [
        (range(1, 5), 2, True),
        (range(1, 3), 2, False),  # killed while it saved the first
        (range(1, 5), 10, False),
        (range(501, 551), 100, False),  # branched off another run's step 500
        (range(501, 602), 100, True),
        (range(10, 41, 10), 15, True),
    ],
)
def test_checkpoints_are_missed_where_there_must_have_been_one(tmp_path, steps, every, gone):
    text = Path(make_run(tmp_path / "run", "run", steps, checkpoint=None, every=every)).read_text()
    config = yaml.safe_load(text)
    if gone:
        with pytest.raises(ValueError, match="checkpoints are gone"):
            open_run_folder(tmp_path / "run", config, dict, "auto")
        return
    open_run_folder(tmp_path / "run", config, dict, "auto")
    (tmp_path / "run" / "learning_curve.png").touch()  # it came to a good end
    with pytest.raises(ValueError, match="checkpoints are gone"):
        open_run_folder(tmp_path / "run", config, dict, "auto")


@pytest.mark.parametrize(("from_step", "to_step", "gone"), [(0, 0, False), (500, 500, False), (0, 2, True)])
def test_a_run_killed_in_its_first_save_has_missed_no_checkpoint(tmp_path, from_step, to_step, gone):
    """Saves end steps after they begin: metrics then reach past the step of a checkpoint that nobody has published."""
    text = Path(make_run(tmp_path / "run", "run", range(from_step + 1, from_step + 5), checkpoint=None, every=2))
    attempts = [{"attempt": 1, "from_step": from_step, "to_step": to_step}]
    status = RunStatus(
        state="running", reason="", step=to_step, steps=9, attempt=1, updated="", attempts=attempts, requeue=True
    )
    write_status(tmp_path / "run", status)
    with pytest.raises(ValueError, match="checkpoints are gone") if gone else contextlib.nullcontext():
        open_run_folder(tmp_path / "run", yaml.safe_load(text.read_text()), dict, "auto")


def test_a_damaged_environment_is_kept_beside_the_new_one(tmp_path, caplog):
    path = tmp_path / "environment.json"
    for number, content in enumerate(("[]", '{"sessions": [1]}'), start=1):
        path.write_text(content)
        record_session(tmp_path, join_world(), 7, {})
        assert (tmp_path / f"environment.json.damaged-{number}").read_text() == content
        assert [session["from_step"] for session in RunFolder(tmp_path).environment()] == [7]
    assert f"{path} is damaged" in caplog.text
