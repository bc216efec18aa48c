"""The commands as a person types them."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_lm import cli
from xlstm_lm.parallel.launcher import short_name

DEMO = str(Path(__file__).parents[1] / "configs" / "train" / "demo.yaml")
TINY = """
    --model.embedding_dim 32 --model.num_blocks 2 --model.slstm_positions [0] --model.num_heads 2
    --data.context_length 32 --data.global_batch_size 4 --data.validation_tokens 2000
    --training.steps 6 --training.log_every 2 --training.checkpoint_every 3
    --schedule.warmup_steps 2 --schedule.cooldown_steps 2
""".split()


def run_command(*arguments: str, launcher: tuple[str, ...] = ("-m", "xlstm_lm")) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, env=environment, timeout=240
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run of the demo's recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    finished = run_command("train", "--config", DEMO, "--training.run_dir", str(folder), *TINY)
    assert finished.returncode == 0, finished.stderr
    (folder / "stdout.txt").write_text(finished.stdout)
    (folder / "stderr.txt").write_text(finished.stderr)
    return folder


def test_training_ends_with_the_result_a_sample_and_what_to_do_next(run_dir):
    out = (run_dir / "stdout.txt").read_text()
    for expected in (
        "Final validation: ",
        "bits per byte",
        "A sample:\ndef ",
        "Learning curve: ",
        "Resume, longer:",
        "Generate:",
        "Export:",
    ):
        assert expected in out
    assert (run_dir / "learning_curve.png").stat().st_size > 5000
    assert json.loads((run_dir / "samples.jsonl").read_text().splitlines()[0])["step"] == 6
    splits = [json.loads(line)["split"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert splits.count("validation") >= 1
    assert splits.count("train") == 3


def test_what_a_run_shows_is_its_own_and_begins_at_once(run_dir):
    lines = (run_dir / "stderr.txt").read_text().splitlines()
    assert lines[:5] == [
        "importing PyTorch",
        "importing DeepSpeed",
        "opening the data",
        "checking the kernels",
        "building the model",
    ]
    assert all(line.startswith(("step ", "validation at step ", "DeepSpeed's bf16 at ZeRO")) for line in lines[5:])


def run_printed(run_dir: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Give the command that the run printed, with further arguments."""
    line = next(line for line in (run_dir / "stdout.txt").read_text().splitlines() if line.startswith(name))
    command = [*shlex.split(line.removeprefix(name)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_printed_export_and_generate_commands_work(run_dir):
    exported = run_printed(run_dir, "Export:")
    assert exported.returncode == 0, exported.stderr
    sampling = ("--max-new-tokens", "20", "--temperature", "0")
    from_run = run_printed(run_dir, "Generate:", *sampling)
    from_export = run_command("generate", "--model", f"{run_dir}-export", "--prompt", "def ", *sampling)
    assert from_run.returncode == 0, from_run.stderr
    assert from_run.stdout.startswith("def ")
    assert from_run.stdout == from_export.stdout


def test_torchrun_with_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "xlstm_lm")
    finished = run_command(
        "train", "--config", DEMO, "--training.run_dir", str(tmp_path / "run"), *TINY, launcher=launcher
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Final validation: ") == 1
    assert (
        "Resume, longer:   " + shlex.join([short_name(sys.executable), *launcher, "train", "--config", DEMO])
        in finished.stdout
    )


def test_the_deepspeed_launcher(tmp_path):
    with socket.socket() as free:  # another suite may run at the same time
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launcher = (deepspeed, "--num_gpus", "1", "--master_port", port, "--module", "xlstm_lm")
    finished = run_command(
        "train", "--config", DEMO, "--training.run_dir", str(tmp_path / "run"), *TINY, launcher=launcher
    )
    assert finished.returncode == 0, finished.stderr
    assert "Final validation: " in finished.stdout
    assert (
        "Resume, longer:   " + shlex.join([short_name(launcher[0]), *launcher[1:], "train", "--config", DEMO])
        in finished.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--config", DEMO, "--model.num_bloks", "4"],
            "flag --model.num_bloks 4: there is no such flag. Did you mean --model.num_blocks?",
        ),
        (
            ["train", "--config", DEMO, "--steps=4"],
            "flag --steps 4: there is no such flag. Did you mean --training.steps?",
        ),
        (
            ["train", "--config", DEMO, "--model.num_blocks", "four"],
            "flag --model.num_blocks: model.num_blocks = 'four': must be a whole number from 1",
        ),
        (["train", "--config", "configs/train/dmo.yaml"], "configs/train/dmo.yaml does not exist"),
        (["generate", "--modle", "x", "--model", "x", "--prompt", "x"], "Did you mean --model?"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--wxyz", "1"],
            "flag --wxyz 1: there is no such flag. See 'xlstm-lm generate --help' for all flags.",
        ),
        (["doctor", "float64"], "float64 is no type to check kernels in; there are float32, bfloat16, float16."),
        (["train"], "the following arguments are required: --config"),
        (["trian"], "invalid choice: 'trian'"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere does not exist. Give a run"),
        (
            ["train", "--config", DEMO, "--dry-run", "x"],
            "argument --dry-run: x must be a whole number from 1",
        ),
        (
            ["generate", "--model", "nowhere", "--prompt", ""],
            "--prompt is empty; give at least one character to continue",
        ),
        (
            ["generate", "--model", "nowhere", "--prompt", "x", "--top-p", "2"],
            "argument --top-p: 2 must be a number above 0 and at most 1",
        ),
        (["generate", "--model", "nowhere", "--prompt", "x", "--temperature", "nan"], "nan must be a number from 0"),
        (
            ["generate", "--model", "nowhere", "--prompt", "x", "--max-new-tokens", "0"],
            "0 must be a whole number from 1",
        ),
        (["tokenizer", "train", "--files", "x", "--vocab-size", "1e3", "--out", "x"], "1e3 must be a whole number"),
        (["export", "--run", "nowhere", "--out", "x"], "nowhere does not exist. Give a run"),
        (
            ["export", "--run", "nowhere", "--out", "x", "--shard-size", "many"],
            "'many' is no size; give one such as 500MB",
        ),
        (["export", "--run", "nowhere", "--out", "x", "--push", "a/b/c"], "Give a name such as somebody/my-model"),
        (["tokenizer", "train", "--files", "nowhere/*.txt", "--vocab-size", "300", "--out", "x"], "nowhere/*.txt"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_help_lists_every_field_with_its_description(capsys):
    from xlstm_lm.training.run_config import fields

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    for field in fields():
        assert f"--{field.name}" in text
        assert "".join(field.description.split()) in text


def test_a_trained_tokenizer_trains_a_model(tmp_path):
    files = tmp_path / "text.txt"
    files.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    out = tmp_path / "tokenizer"
    made = run_command("tokenizer", "train", "--files", str(files), "--vocab-size", "280", "--out", str(out))
    assert made.returncode == 0, made.stderr
    flags = made.stdout.split("Use it:")[1].split()
    source = json.dumps([{"kind": "text", "paths": [str(files)]}])
    sources = ("--data.sources", source, "--data.validation", "[]", "--model.vocab_size", "280")
    trained = run_command(
        "train", "--config", DEMO, "--training.run_dir", str(tmp_path / "run"), *TINY, *flags, *sources
    )
    assert trained.returncode == 0, trained.stderr
    assert "A sample:" in trained.stdout
