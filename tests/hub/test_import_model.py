"""An import is a whole run folder or nothing, says what is wrong, and changes no bit of a weight."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml

from tests.data.loopback_hub import LoopbackHub
from xlstm_lm import cli, hub
from xlstm_lm.base import durable_files
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.tensor_files import read_tensors, tensor_files
from xlstm_lm.data import TokenizerConfig, build_tokenizer, load_tokenizer, train_bpe
from xlstm_lm.models import XLSTMConfig, build_model
from xlstm_lm.runs.checkpoint import looks_like_a_checkpoint, read_checkpoint
from xlstm_lm.training.run_config import load_run_config

PATTERN = ["mlstm", "slstm", "mlstm_paper"]
TOKENS_BT = torch.arange(60).view(2, 30) % 257


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer of 270 tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("the gate forgets the state that the gate holds\n" * 20)
    return train_bpe([str(folder / "text.txt")], vocab_size=270, out=folder / "tokenizer")


def save(folder: Path, tokenizer: Path | None = None, shard_bytes: int = 2**30, **changes) -> hub.TrainedModel:
    """Export a small model with random weights, every one of them."""
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "embedding_dim": 32, "num_blocks": 3, "num_heads": 2, "pattern": PATTERN}
    model = build_model(XLSTMConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    trained = hub.TrainedModel(model, folder.with_name("source"))
    chosen = load_tokenizer(tokenizer) if tokenizer else build_tokenizer(TokenizerConfig())
    chosen.save(trained.folder / "tokenizer")
    hub.save_export(trained, folder, shard_bytes=shard_bytes)
    return trained


def stored(folder: Path) -> dict[str, torch.Tensor]:
    if looks_like_a_checkpoint(folder):
        return read_checkpoint(folder).all_weights()
    files = tensor_files(folder)
    return dict(read_tensors(files, files))


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_change_no_bit(tmp_path, tied):
    trained = save(tmp_path / "export", shard_bytes=50_000, tie_embeddings=tied)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    hub.import_run(tmp_path / "export", tmp_path / "run")
    loaded = hub.load(tmp_path / "run")
    assert torch.equal(loaded(TOKENS_BT), trained(TOKENS_BT))
    assert loaded.model.config == trained.model.config
    hub.save_export(loaded, tmp_path / "again", shard_bytes=50_000)
    hub.import_run(tmp_path / "again", tmp_path / "run2")
    for one, two in (("export", "again"), ("run/checkpoints/step_00000000", "run2/checkpoints/step_00000000")):
        before, after = stored(tmp_path / one), stored(tmp_path / two)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run" / "model.yaml").read_text() == (tmp_path / "run2" / "model.yaml").read_text()


def test_the_tokenizer_comes_along_and_the_recipe_names_it(tmp_path, bpe):
    save(tmp_path / "export", bpe)
    recipe = hub.import_run(tmp_path / "export", tmp_path / "run")
    assert recipe == tmp_path / "run" / "model.yaml"
    other = tmp_path / "mine.yaml"
    other.write_text(yaml.safe_dump({"model": {"embedding_dim": 64}, "data": {"sources": [{"paths": ["x"]}]}}))
    run = load_run_config([other, recipe])
    assert run.model == hub.load(tmp_path / "run").model.config
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000000" / "state.json").read_text())
    original, text = load_tokenizer(bpe), "the gate forgets <|endoftext|> é"
    for tokenizer in (build_tokenizer(run.data.tokenizer), hub.load(tmp_path / "run").tokenizer):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.fingerprint() == original.fingerprint() == state["tokenizer_fingerprint"]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, bpe):
    save(tmp_path / "export", vocab_size=257)
    with pytest.raises(ValueError, match="has 270 tokens, but the model's embedding has 257 rows"):
        hub.import_run(tmp_path / "export", tmp_path / "run", tokenizer=str(bpe))
    load_tokenizer(bpe).save(tmp_path / "export")
    with pytest.raises(ValueError, match="has 270 tokens, but the model's embedding has 257 rows"):
        _ = hub.load(tmp_path / "export").tokenizer
    with pytest.raises(ValueError, match=r"has 270 tokens, .* Or name one with --tokenizer"):
        hub.import_run(tmp_path / "export", tmp_path / "run")
    hub.import_run(tmp_path / "export", tmp_path / "run", tokenizer="bytes")
    assert hub.load(tmp_path / "run").tokenizer.vocab_size == 257


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-30])


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def take_shards(folder: Path) -> None:
    for number in (1, 3):
        next(folder.glob(f"model-0000{number}-*")).unlink()


def cut_shards(folder: Path) -> None:
    for number in (1, 2):
        path = next(folder.glob(f"model-0000{number}-*"))
        path.write_bytes(path.read_bytes()[:-1])


def rename_tensors(folder: Path) -> None:
    path = next(folder.glob("model-00001-*"))
    weights = safetensors.torch.load(path.read_bytes())
    safetensors.torch.save_file({f"x.{name}": tensor for name, tensor in weights.items()}, path)


def take_tokenizer(folder: Path) -> None:
    for path in folder.glob("*tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_config, r"config.json is damaged"),
        (damage_index, r"model.safetensors.index.json is damaged"),
        (take_shards, r"names files that are missing: \S*model-00001-of\S*, \S*model-00003-of\S*safetensors. Copy"),
        (cut_shards, r"model-00001-of\S* is damaged: .*model-00002-of\S* is damaged: it cannot be read"),
        (rename_tensors, r"names tensors that are not in their files: model.embedding.weight"),
        (take_tokenizer, r"export holds a model but no tokenizer.* Or name one with --tokenizer"),
    ],
)
def test_a_damaged_source_is_named_and_nothing_written(tmp_path, capsys, spoil, message):
    save(tmp_path / "export", shard_bytes=20_000)
    spoil(tmp_path / "export")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["import", "--from", str(tmp_path / "export"), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


def test_the_command_says_how_to_go_on_and_overwrites_nothing(tmp_path, capsys):
    save(tmp_path / "export")
    command = ["import", "--from", str(tmp_path / "export"), "--out", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()  # an empty folder is as good as none
    cli.main(command)
    assert f"--config RECIPE --config {tmp_path}/run/model.yaml --training.run_dir" in capsys.readouterr().out
    for source, message in ((command[2], "run exists and is not empty"), (str(tmp_path / "no"), "no does not exist")):
        with pytest.raises(SystemExit):
            cli.main(
                ["import", "--from", source, "--out", str(tmp_path / ("run" if source == command[2] else "other"))]
            )
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run", "source"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path / "export")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable_files.os, "fsync", refuse)
    with pytest.raises(RunError, match="the disk is full"):
        hub.import_run(tmp_path / "export", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


KILL = """
import os, signal, sys
from xlstm_lm.base import durable_files
from xlstm_lm import hub

def killed_at(call):
    left = call
    fsync = os.fsync
    def count(descriptor):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    durable_files.os.fsync = count
    hub.import_run(sys.argv[1], sys.argv[2])
    os._exit(0)

call = 0
while True:
    call += 1
    process = os.fork()
    if not process:
        killed_at(call)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(status, os.path.exists(sys.argv[2]), flush=True)
    if os.path.exists(sys.argv[2]):
        break
"""


def test_an_import_that_is_killed_leaves_no_run_and_can_be_repeated(tmp_path):
    """Killed wherever it writes something through to the disk, again and again, in the same folder."""
    trained = save(tmp_path / "export")
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "export"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    *killed, last = done.stdout.splitlines()
    assert len(killed) > 6 and set(killed) == {"-9 False"}, done.stdout + done.stderr
    assert last.endswith("True")
    assert torch.equal(hub.load(tmp_path / "run")(TOKENS_BT), trained(TOKENS_BT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run", "source"]


MEMORY = """
import sys
import torch._dynamo  # torch imports it where the meta device is first used
from xlstm_lm import hub

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

before = anonymous()
trained = hub.load(sys.argv[1])
after = anonymous()
print((after - before) / sum(parameter.numel() * 4 for parameter in trained.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the memory of a process")
def test_a_model_is_not_held_twice(tmp_path):
    """An export takes no memory but the pages of its files."""
    save(tmp_path / "export", vocab_size=50_000, embedding_dim=128, num_heads=4)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "export")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(done.stdout) < 0.2


@pytest.fixture
def loopback(tmp_path, monkeypatch):
    """Connects the hub's client to a hub on loopback that serves a folder as somebody/model."""
    monkeypatch.chdir(tmp_path)

    @contextlib.contextmanager
    def serve(folder: Path):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with LoopbackHub("somebody/model", files, is_model=True) as server:
            for name in ("hf_hub_download", "snapshot_download"):
                place = {"endpoint": server.endpoint, "cache_dir": tmp_path / "cache"}
                monkeypatch.setattr(huggingface_hub, name, functools.partial(getattr(huggingface_hub, name), **place))
            yield server

    return serve


def test_a_hub_id_is_downloaded(tmp_path, bpe, loopback):
    trained = save(tmp_path / "export", bpe, shard_bytes=50_000)
    with loopback(tmp_path / "export") as server:
        hub.import_run("somebody/model", "run")
        assert any(request.endswith(".safetensors") for request in server.requests)
    loaded = hub.load("run")
    assert torch.equal(loaded(TOKENS_BT), trained(TOKENS_BT)) and loaded.tokenizer.vocab_size == 270
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000000" / "state.json").read_text())
    assert state["imported_from"] == "somebody/model"


def test_a_hub_id_that_cannot_be_read_is_explained(tmp_path, loopback):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "other" / "model.safetensors").write_bytes(b"many gigabytes")
    with loopback(tmp_path / "other") as server:
        with pytest.raises(ValueError, match="somebody/model on the Hugging Face hub has model_type 'bert'; known are"):
            hub.import_run("somebody/model", "run")
        assert not any("safetensors" in request for request in server.requests)
        with pytest.raises(ValueError, match=r"nobody/none does not exist here.* hf download nobody/none --local-dir"):
            hub.load("nobody/none")
        asked = len(server.requests)
        with pytest.raises(ValueError, match="other/none does not exist"):  # the folder is here: a mistyped path
            hub.load("other/none")
        assert len(server.requests) == asked
    assert not (tmp_path / "run").exists()
