"""The files of a run's folder, damaged in every way: one message that names the file, or what is left of it."""

from __future__ import annotations

import json
import re

import pytest

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.read_files import json_lines, read_json
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.picture import draw_learning_curve

DAMAGED = {
    b"": "it is empty",
    b"\0\0\0": "it is empty",
    b'{"id": "a': "it is no JSON",
    b"\xff\xfe": "it is no UTF-8 text",
    b"[1]": "which is no object",
    b'{"other": 1}': "it has no 'id'",
    b'{"id": 3}': "its 'id' is 3",
    b'{"id": "a", "id": "b"}': "it has the key 'id' twice",
    b"[" * 100_000: "it is nested too deep",
    b'{"id": ' + b"1" * 5000 + b"}": "digits",
}


@pytest.mark.parametrize(("content", "problem"), DAMAGED.items(), ids=DAMAGED.values())
def test_a_damaged_json_file_is_named(content, problem, tmp_path):
    (tmp_path / "wandb.json").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        RunFolder(tmp_path).wandb_id()
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/wandb.json is damaged: ") and problem in message
    assert "delete the file for a new one" in message


def test_json_as_editors_save_it_is_read(tmp_path):
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"id":\r\n "a"}\r\n')
    assert read_json(tmp_path / "file.json") == {"id": "a"}
    with pytest.raises(ValueError, match=r"nothing.json is missing"):
        read_json(tmp_path / "nothing.json")
    for read in (read_json, lambda path: json_lines(path, {})):
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory. Restore it from a copy"):
            read(tmp_path)


def metric(step: int, **changes) -> str:
    record = {"split": "train", "step": step, "tokens": 64 * step, "loss": 2.0, "bits_per_byte": 3.0}
    return json.dumps(record | changes)


def test_a_torn_last_line_is_left_out_and_others_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert RunFolder(tmp_path).metrics() == []
    path.write_text(f"{metric(1)}\n\n{metric(2)}")  # whole, but for the line feed
    assert [record["step"] for record in RunFolder(tmp_path).metrics()] == [1, 2]
    path.write_text(f"{metric(1)}\n{metric(2)[:20]}")
    assert [record["step"] for record in RunFolder(tmp_path).metrics()] == [1]
    for damage in ("{", "[]", metric("x"), metric(2, loss="low"), metric(2, tokens=None), "\udcff"):
        path.write_text(f"{metric(1)}\n{damage}\n{metric(3)}\n", errors="surrogateescape")
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is damaged: .* delete that line"):
            RunFolder(tmp_path).metrics()


def test_damage_behind_a_checkpoint_goes_with_what_was_written_there(tmp_path, caplog):
    announce_once.cache_clear()
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{metric(1)}\n{metric(2)}\n{{"step": "x"}}\n{metric(3)}\n')
    split = RunFolder(tmp_path).split(2)
    assert split.kept == [metric(1).encode(), metric(2).encode()]
    assert split.cut == [b'{"step": "x"}', metric(3).encode()] and split.last_step == 3
    assert "line 3, is damaged and left out: it has no 'split'" in caplog.text
    with pytest.raises(ValueError, match="line 3, is damaged"):
        RunFolder(tmp_path).split(3)


@pytest.mark.parametrize(
    ("last", "problem"),
    [(6, ""), (5, ""), (4, "ends at step 4, but .* is of step 9: what came between is lost"), (0, "has no line")],
)
def test_metrics_that_end_before_the_checkpoint_are_missed(last, problem, tmp_path, caplog):
    announce_once.cache_clear()
    (tmp_path / "metrics.jsonl").write_text("".join(f"{metric(step)}\n" for step in range(1, last + 1)))
    checkpoint = tmp_path / "checkpoints" / "step_00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("model: {family: xlstm}\ntraining: {log_every: 5}\n")
    folder = RunFolder(tmp_path)
    folder.point_out_lost_metrics(folder.split(9), checkpoint)
    assert re.search(problem, caplog.text) if problem else not caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"[1]", "holds list"),
        (b"\xff\xfe", "is not valid YAML"),
        (b"a:\n\tb: 1", "is not valid YAML"),
        (b"data: {}", "it has no section 'model'"),
        (b"model: 3", "model is 3, which is no section"),
        (b"model: 2024-13-45", "model is '2024-13-45', which is no section"),
    ],
)
def test_a_damaged_configuration_is_named(content, problem, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        RunFolder(tmp_path).config()
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/config.yaml ") and problem in message and "checkpoints/step_*" in message


def test_the_curve_of_a_run_that_diverged_is_drawn(tmp_path):
    losses = (2.0, 1e300, None)
    lines = [metric(step, loss=loss, bits_per_byte=loss) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    picture = tmp_path / "curve.png"
    draw_learning_curve(RunFolder(tmp_path).metrics(), picture, "run")
    assert picture.exists()
