"""The model card: what the hub reads at its top, where each fact comes from, and options that are refused at once."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.hub.lively import STOCK, make_trained
from tests.hub.test_export import make_run
from xlstm_lm import hub
from xlstm_lm.cli import main
from xlstm_lm.hub.card_metadata import LICENSES, CardOptions, papers
from xlstm_lm.hub.origin import base_model, hub_id
from xlstm_lm.models import MambaConfig, TransformerConfig, XLSTMConfig

SNAPSHOT = "models--somebody--base-7b/snapshots/" + 40 * "a"


def card_of(folder) -> ModelCard:
    """The card as the hub's client reads it, which raises where the metadata is not right."""
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def test_every_fact_reaches_the_metadata(tmp_path):
    options = CardOptions(license="Apache-2.0", languages=("en", "no", "code"), base_model="somebody/base")
    run_dir = make_run(tmp_path, **STOCK)
    hub.save_export(hub.load(run_dir), tmp_path / "my export: #1", "xlstm_lm", card=options)
    card = card_of(tmp_path / "my export: #1")
    assert card.data.to_dict() | {"model-index": None} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "no", "code"],
        "base_model": "somebody/base",
        "datasets": ["somebody/texts"],
        "tags": ["xlstm-lm", "custom_code", "arxiv:2405.04517", "arxiv:2503.13427"],
        "model-index": None,
    }
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"bits_per_byte": 4.125, "perplexity": 20.25}
    assert card.data.model_name == "my export: #1"
    assert 'from_pretrained("my export: #1", trust_remote_code=True)' in card.text
    assert "`DataCollatorWithFlattening`" in card.text
    assert "257 tokens, embedding and head 261 rows: the first 4 tokens that are added" in card.text


def test_what_nobody_said_is_not_guessed(tmp_path):
    run_dir = make_run(tmp_path, **STOCK)
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text())
    (tmp_path / "some" / "folder").mkdir(parents=True)
    recipe["data"]["sources"] = [{"kind": "hub", "dataset": str(tmp_path / "some" / "folder")}]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))
    hub.save_export(hub.load(run_dir), tmp_path / "export", "transformers")
    card = card_of(tmp_path / "export")
    assert not {"license", "language", "base_model", "datasets"} & card.data.to_dict().keys()
    assert "DataCollatorWithFlattening" not in card.text, "transformers' own xLSTM ignores positions"


def test_the_base_model_outlives_import_training_and_another_import(tmp_path):
    cached = tmp_path / SNAPSHOT
    hub.save_export(make_trained(tmp_path / "source", **STOCK), cached)
    hub.import_run(cached, tmp_path / "run")
    assert base_model(tmp_path / "run") == "somebody/base-7b"
    first, later = (tmp_path / "run" / "checkpoints" / f"step_{step:08}" for step in (0, 5))
    shutil.move(first, later)  # as in training: the imported checkpoint is deleted, later ones have no origin
    state = json.dumps(json.loads((later / "state.json").read_text()) | {"step": 5}).encode()
    (later / "state.json").write_bytes(state)
    manifest = json.loads((later / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(state), "crc32": zlib.crc32(state)}
    (later / "manifest.json").write_text(json.dumps(manifest | {"step": 5}))
    hub.save_export(hub.load(later), tmp_path / "export")
    assert card_of(tmp_path / "export").data.base_model == "somebody/base-7b"
    for source in (later, tmp_path / "run", tmp_path / "export"):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        hub.import_run(source, tmp_path / "again")
        assert base_model(tmp_path / "again") == "somebody/base-7b", source
    (tmp_path / "run" / "imported.json").write_text("{")
    with pytest.raises(ValueError, match=r"imported.json is damaged: .* name the model with --base-model"):
        hub.save_export(hub.load(later), tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("NX-AI/xLSTM-7b", "NX-AI/xLSTM-7b"),
        (f"/cache/hub/{SNAPSHOT}", "somebody/base-7b"),
        ("/cache/hub/models--gpt2/snapshots/" + 40 * "0" + "/", "gpt2"),
        ("/home/me/models/mine", None),
        ("./runs/demo", None),
        ("tests/hub", None),
        ("gpt2", None),
        ("a/b/c", None),
    ],
)
def test_ids_on_the_hub(source, expected, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert hub_id(source) == expected


def test_papers():
    xlstm = {"embedding_dim": 64, "num_blocks": 2}
    assert papers(XLSTMConfig(**xlstm)) == ["2405.04517", "2503.13427"]
    assert papers(XLSTMConfig(**xlstm, input_gate="sigmoid")) == ["2405.04517", "2503.13427", "2503.14376"]
    assert papers(XLSTMConfig(**xlstm, pattern=["mlstm_paper", "slstm"])) == ["2405.04517"]
    assert papers(XLSTMConfig(**xlstm, pattern="slstm", input_gate="sigmoid")) == ["2405.04517"]
    assert papers(TransformerConfig()) == ["2302.13971"]
    assert papers(MambaConfig(version=1)) == ["2312.00752"]
    assert papers(MambaConfig(version=2)) == ["2405.21060"]


def test_licenses():
    assert len(set(LICENSES)) == len(LICENSES)
    for name in ("MIT", "cc-by-nc-sa-4.0", "llama3.1", "openrail++"):
        assert CardOptions(license=name).license == name.lower()
    link = {"license_name": "my-license-1.0", "license_link": "https://example.org/license"}
    assert CardOptions(license="other", **link).license_name == "my-license-1.0"
    for wrong in ({"license": "other"}, link, {"license": "mit", **link}, {"license": "other", "license_name": "mine"}):
        with pytest.raises(ValueError, match="--license other needs --license-name and --license-link"):
            CardOptions(**wrong)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--license", "apache"], "--license apache: the hub has no license of that name. Did you mean apache-2.0"),
        (["--license", "GPL-3.0-or-later"], "Did you mean gpl-3.0"),
        (["--license", "0BSD"], "For any other give --license other, with --license-name and --license-link"),
        (["--license", ""], "the hub has no license of that name"),
        (["--license", "other", "--license-name", "My License", "--license-link", "https://a.b"], "lowercase letters"),
        (["--license", "other", "--license-name", "mine", "--license-link", "LICENSE"], "give the address of its text"),
        (["--language", "en", "English"], r"--language English: not an ISO 639 code. Did you mean en \(English\)"),
        (["--language", "Swedish"], r"Did you mean sv \(Swedish\)"),  # not sw, which it begins with
        (["--language", "EN"], r"Did you mean en \(English\)"),
        (["--language", "pt-BR"], r"Did you mean pt \(Portuguese\)"),
        (["--language", "xx"], "Give codes such as en, de or zh"),
        (["--base-model", "a/b/c"], "--base-model a/b/c: .* Give an id on the hub, such as NX-AI/xLSTM-7b"),
    ],
)
def test_options_that_the_hub_would_refuse_are_refused_before_anything_is_read(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(["export", "--run", str(tmp_path / "nothing"), "--out", str(tmp_path / "export"), *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "nothing" not in said


def test_the_program_says_that_no_license_was_named(tmp_path, capsys, monkeypatch):
    hub.save_export(make_trained(tmp_path / "source", **STOCK), tmp_path / "first")
    monkeypatch.setattr(sys.modules["xlstm_lm.hub.export"], "check", lambda folder, question: {"difference": 0.0})
    for number, flags in enumerate(([], ["--license", "mit", "--language", "en", "de"])):
        out = tmp_path / f"export{number}"
        main(["export", "--run", str(tmp_path / "first"), "--out", str(out), *flags])
        data = card_of(out).data
        assert (data.license, data.language) == (("mit", ["en", "de"]) if flags else (None, None))
        assert ("names no license" in capsys.readouterr().out) is not bool(flags)
    assert json.loads((tmp_path / "export0" / "config.json").read_text())["model_type"] == "xlstm"
