"""A run goes on from a checkpoint of its own only: one that does not fit is refused, and says in what."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
import yaml

from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint
from xlstm_lm.runs.checkpoint_layout import Share
from xlstm_lm.runs.checkpoint_writer import Snapshot, write_checkpoint
from xlstm_lm.runs.fit import Wanted, check_fit

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SHAPES = {"embedding.weight": (7, 4), "norm.weight": (4,)}
MODEL = {"family": "xlstm", "embedding_dim": 4, "num_heads": 2, "mlstm_backend": "auto"}
MOMENTS = {f"{name}.{key}": shape for name, shape in SHAPES.items() for key in ("exp_avg", "exp_avg_sq")}
WANTED = Wanted(MODEL | {"a_new_field": 1}, SHAPES, "adamw", MOMENTS, lanes=3)
STATE = {
    "step": 5,
    "tokens": 60,
    "optimizer_steps": 5,
    "skipped_steps": 0,
    "skipped_in_a_row": 0,
    "elapsed_seconds": 2.5,
    "data": {str(lane): {"offset": 0} for lane in range(3)},
    "data_fingerprint": {"seed": 0},
    "processes": 1,
}


def write(run_dir: Path, state=STATE, model=MODEL, with_moments=True) -> Path:
    shapes = {"model": SHAPES} | ({"optimizer": MOMENTS} if with_moments else {})
    shares = {
        stem: [Share(name, 0, torch.ones(shape).flatten()) for name, shape in of_stem.items()]
        for stem, of_stem in shapes.items()
    }
    snapshot = Snapshot(
        state=state,
        shapes=shapes,
        shares=shares,
        config_yaml=yaml.safe_dump({"model": model}),
        save_tokenizer=lambda folder: folder.mkdir(),
        keep=9,
    )
    return write_checkpoint(run_dir, ALONE, snapshot)


def sign(folder: Path) -> None:
    """Write a manifest that calls the files intact as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    contents = {name: (folder / name).read_bytes() for name in manifest["files"] if (folder / name).exists()}
    manifest["files"] = {name: {"size": len(each), "crc32": zlib.crc32(each)} for name, each in contents.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_shape(folder: Path, stem: str, name: str, shape: tuple[int, ...] | None) -> None:
    """Give a tensor another shape, with a piece to match, or leave it out of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["tensors"][stem].pop(name)
    if shape:
        piece = [entry["pieces"][0][0], 0, torch.Size(shape).numel()]
        manifest["tensors"][stem][name] = {"shape": list(shape), "pieces": [piece]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_state(folder: Path, **changes) -> None:
    state = {name: value for name, value in (STATE | changes).items() if value is not None}
    (folder / "state.json").write_text(json.dumps(state))


def test_one_that_fits_is_taken(tmp_path):
    check_fit(read_checkpoint(write(tmp_path)), WANTED)
    pinned = MODEL | {"mlstm_backend": "triton"}  # how it is computed, not what
    check_fit(read_checkpoint(write(tmp_path / "other", model=pinned)), WANTED)
    imported = {"step": 0, "imported_from": "/elsewhere", "tokenizer_fingerprint": "x"}
    check_fit(read_checkpoint(write(tmp_path / "imported", imported, with_moments=False)), WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: edit_shape(folder, "model", "embedding.weight", (7, 3)),
            r"weights: embedding.weight: F32 \(7, 3\) there, F32 \(7, 4\) now",
        ),
        (
            lambda folder: edit_shape(folder, "optimizer", "norm.weight.exp_avg_sq", (2,)),
            r"optimizer state: norm.weight.exp_avg_sq: F32 \(2,\) there, F32 \(4,\) now",
        ),
        (
            lambda folder: [edit_shape(folder, "optimizer", name, None) for name in MOMENTS],
            r"optimizer state: embedding.weight.exp_avg: absent there(.|\n)*1 more tensors",
        ),
        (lambda folder: edit_state(folder, tokens=None), r"state.json is damaged: it has no 'tokens'"),
        (lambda folder: edit_state(folder, tokens="many"), r"state.json is damaged: its 'tokens' is 'many'"),
        (lambda folder: edit_state(folder, tokens=-1), r"state.json: tokens is -1"),
        (
            lambda folder: edit_state(folder, data={"0": {}, "1": {}}),
            r"data of 2 lanes there, 3 now; lane 2 is in one of them only",
        ),
        (
            lambda folder: (folder / "state.json").write_text('{"data": {"0": {}, "0": {}}, "step": 5}'),
            r"state.json is damaged: it has the key '0' twice",
        ),
        (lambda folder: edit_state(folder, processes=2), r"random_rank0001.pt: absent, of 2 processes"),
        (lambda folder: (folder / "random_rank0000.pt").write_bytes(b"PK"), r"random_rank0000.pt: it cannot be read"),
        (
            lambda folder: (folder / "config.yaml").write_text(yaml.safe_dump({"model": MODEL | {"num_heads": 1}})),
            r"config.yaml: model.num_heads: 1 there, 2 now",
        ),
        (lambda folder: (folder / "config.yaml").write_text(""), r"config.yaml is empty.* Restore it"),
    ],
)
def test_one_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    folder = write(tmp_path)
    change(folder)
    sign(folder)
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message) as refused:
        check_fit(read_checkpoint(folder), WANTED)
    assert str(folder) in str(refused.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_under_the_number_of_another_step_is_refused(tmp_path):
    folder = write(tmp_path)
    renamed = folder.rename(folder.with_name("step_00000009"))
    with pytest.raises(ValueError, match=r"It holds the checkpoint of step 5, by its state.json"):
        check_fit(read_checkpoint(renamed), WANTED)
    with pytest.raises(ValueError, match=r"step_00000009 holds the checkpoint of step 5"):
        find_checkpoint(tmp_path)
    check_fit(
        read_checkpoint(find_checkpoint(renamed.rename(tmp_path / "best"))), WANTED
    )  # under a name without a number


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ('{"format": 1, "step": 5, "files": []}', "its 'files' is []"),
        ('{"format": "1"}', "its 'format' is '1'"),
        ('{"format": 1, "step": 5, "files": {}}', "it does not name state.json"),
        ('{"format": 1, "step": 5, "files": {"state.json": 3, "config.yaml": {}}}', "no size and checksum of state"),
        ("", "it is empty"),
        ("[1]", "it holds [1]"),
    ],
)
def test_a_damaged_manifest_is_named_and_the_checkpoint_before_it_taken(manifest, problem, tmp_path, caplog):
    good, bad = write(tmp_path, STATE | {"step": 4}), write(tmp_path)
    (bad / "manifest.json").write_text(manifest)
    assert newest_checkpoint(tmp_path) == good
    assert f"{bad}/manifest.json is damaged: " in caplog.text and problem in caplog.text


def test_a_checkpoint_of_another_optimizer_is_refused_by_both_names(tmp_path):
    folder = write(tmp_path, STATE | {"optimizer": "momentum"})
    with pytest.raises(ValueError, match=r"optimizer.kind 'momentum' there, 'adamw' now") as refused:
        check_fit(read_checkpoint(folder), WANTED)
    assert "optimizer state:" not in str(refused.value)
