"""Exports: what is written, that stock transformers reads it, and that nothing wrong is ever finished."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
import transformers.utils
import yaml

from tests.hub.lively import SMALL, STOCK, logits, make_trained, random_tokens
from xlstm_lm import hub
from xlstm_lm.data import TokenizerConfig, build_tokenizer, train_bpe
from xlstm_lm.hub import bundle, model_card
from xlstm_lm.hub.configuration_xlstm_lm import XLSTMLMConfig
from xlstm_lm.hub.export import choose_format, parse_size
from xlstm_lm.hub.formats import own_format
from xlstm_lm.hub.tokenizer_files import save_tokenizer_files
from xlstm_lm.models import HybridConfig, XLSTMConfig
from xlstm_lm.models.mixers import MIXERS

transformers.utils.is_xlstm_available = lambda: False  # else transformers would run the xlstm package's kernels


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"feedforward_dim": 101},
        {"feedforward_dim": 96},
        {"qk_dim_factor": 1 / 3, "embedding_dim": 192},
        {"embedding_dim": 320, "num_heads": 4, "qk_dim_factor": 0.2, "v_dim_factor": 1.2},
    ],
)
def test_transformers_own_type_gives_the_same_logits(tmp_path, sizes):
    trained = make_trained(tmp_path / "source", **(STOCK | sizes))
    hub.save_export(trained, tmp_path / "export", "transformers")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    width = trained.model.config.embedding_dim
    assert (values["hidden_size"], values["embedding_dim"]) == (width, width)
    assert (values["num_hidden_layers"], values["num_blocks"]) == (2, 2)
    assert values["chunkwise_kernel"] == "chunkwise--native_autograd"
    assert "auto_map" not in values
    assert not list((tmp_path / "export").glob("*.py"))
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(stock) is transformers.xLSTMForCausalLM
    assert not any(info.values())
    tokens_BT = random_tokens(2, 70)
    with torch.no_grad():
        expected_BTV = logits(trained.model, tokens_BT)
        torch.testing.assert_close(stock(tokens_BT).logits, expected_BTV, atol=1e-3, rtol=1e-3)
        assert torch.equal(hub.load(tmp_path / "export")(tokens_BT), expected_BTV)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": ["mlstm", "slstm"]}, "it has mlstm blocks alone, and this model has slstm blocks"),
        ({"pattern": "mlstm_paper"}, "this model has mlstm_paper blocks"),
        ({"tie_embeddings": True}, "it has a head of its own, and model.tie_embeddings is true"),
        ({"input_gate": "sigmoid"}, "its input gate is exponential, and model.input_gate is sigmoid"),
        ({"norm": "layer"}, "it has RMS norms, and model.norm is layer"),
        ({"cell_norm": "rms"}, "it has a layer norm behind its cells, and model.cell_norm is rms"),
        ({"gate_soft_cap": None}, "it has a soft cap on the gates, and model.gate_soft_cap is null"),
        ({"logit_soft_cap": None}, "it has a soft cap on the logits, and model.logit_soft_cap is null"),
        ({"embedding_dim": 96}, "its queries and keys have a multiple of 64 units, and these have 48"),
    ],
)
def test_what_transformers_own_type_cannot_hold_takes_ours(changes, reason):
    config = XLSTMConfig(**(STOCK | changes))
    assert choose_format(XLSTMConfig(**STOCK), None).name == "transformers"
    assert choose_format(config, None).name == "xlstm_lm"
    with pytest.raises(ValueError, match=reason) as refused:
        choose_format(config, "transformers")
    assert str(refused.value).endswith("Take --format xlstm_lm.")
    with pytest.raises(ValueError, match="--format onnx is not known for the family xlstm; there is transf"):
        choose_format(config, "onnx")


def test_what_the_card_says_against_transformers_own_type_is_so_and_ours_is_right(tmp_path):
    trained = make_trained(tmp_path / "source", **STOCK)
    models = {}
    for format_name in ("transformers", "xlstm_lm"):
        hub.save_export(trained, tmp_path / format_name, format_name)
        models[format_name] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / format_name)
    stock, ours = models.values()
    tokens_BT = random_tokens(1, 9)
    padded_BT = torch.cat((torch.full((1, 4), 256), tokens_BT), dim=1)
    mask_BT = (torch.arange(13) >= 4).long()[None]
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = stock.generate(tokens_BT, **greedy)[:, 9:]
    assert torch.equal(ours.generate(tokens_BT, **greedy)[:, 9:], expected)
    assert torch.equal(ours.generate(padded_BT, attention_mask=mask_BT, **greedy)[:, 13:], expected)
    assert not torch.equal(stock.generate(padded_BT, attention_mask=mask_BT, **greedy)[:, 13:], expected)

    with pytest.raises(ValueError, match="cannot use beam search with a cache"):
        stock.generate(tokens_BT, num_beams=2, **greedy)
    beams = stock.generate(tokens_BT, num_beams=2, use_cache=False, **greedy)
    assert torch.equal(ours.generate(tokens_BT, num_beams=2, **greedy), beams)

    long_BT = random_tokens(1, 70)
    gradients = []
    for model in (stock, ours):
        model.train()
        loss = model(long_BT, labels=long_BT, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, model.get_input_embeddings().weight)[0])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-2)
    with pytest.raises(RuntimeError):
        stock(long_BT, use_cache=True).logits.sum().backward()

    stock, ours = (model.eval().to(torch.bfloat16) for model in (stock, ours))
    assert torch.isfinite(ours(long_BT, use_cache=False).logits).all()
    assert torch.isfinite(stock(long_BT, use_cache=True).logits).all()
    with pytest.raises(RuntimeError):
        stock(long_BT, use_cache=False)


@pytest.mark.parametrize("format_name", ["transformers", "xlstm_lm"])
def test_large_weights_come_in_shards_with_an_index(tmp_path, format_name):
    trained = make_trained(tmp_path / "source", **STOCK)
    hub.save_export(trained, tmp_path / "export", format_name, shard_bytes=parse_size("400KB"))
    shards = list((tmp_path / "export").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 410_000 for shard in shards)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in trained.parameters())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens_BT = random_tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BT).logits, trained(tokens_BT), atol=1e-3, rtol=1e-3)
        assert torch.equal(hub.load(tmp_path / "export")(tokens_BT), trained(tokens_BT))


@pytest.mark.parametrize("changes", [{}, STOCK], ids=["xlstm_lm", "transformers"])
@pytest.mark.parametrize(
    ("added", "resized"), [(1, None), (4, None), (4, 261), (2, 259), (6, 263), (6, 320)], ids=lambda value: str(value)
)
def test_tokens_added_to_an_export_take_padded_rows_and_can_be_generated(tmp_path, changes, added, resized):
    hub.save_export(make_trained(tmp_path / "source", **changes), tmp_path / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    names = [f"<|new{number}|>" for number in range(added)]
    tokenizer.add_tokens(names, special_tokens=True)
    if resized:
        model.resize_token_embeddings(resized)
    prompt = torch.tensor([[256, 65]])
    for folder in (None, tmp_path / "tuned"):
        if folder:
            model.save_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name in names:
            token = tokenizer.convert_tokens_to_ids(name)
            with torch.no_grad():  # as if tuned to write nothing else
                hidden = model.base_model(prompt).last_hidden_state[0, -1]
                model.lm_head.weight.zero_()
                model.lm_head.weight[token] = hidden
            assert model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=token)[0, 2] == token


def test_an_id_beyond_the_tokens_decodes_to_nothing(tmp_path):
    hub.save_export(make_trained(tmp_path / "source"), tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.decode([104, 260, 105]) == "hi"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id == 256


def test_stock_tokenizers_make_of_a_text_what_training_made_of_a_document(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 50)
    train_bpe([str(tmp_path / "text.txt")], vocab_size=270, out=tmp_path / "bpe")
    for number, config in enumerate(
        (TokenizerConfig(), TokenizerConfig(kind="huggingface", name=str(tmp_path / "bpe")))
    ):
        ours, folder = build_tokenizer(config), tmp_path / f"tokenizer{number}"
        save_tokenizer_files(ours, folder)
        stock = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("", "the quick é\n\n\tx  ", "日本"):
            ids = stock(text).input_ids
            assert ids == [ours.end_of_document, *ours.encode(text)]
            assert stock.decode(ids, skip_special_tokens=True) == text
        assert stock.eos_token_id == stock.bos_token_id == stock.pad_token_id == ours.end_of_document
        batch = stock(["the", "the quick brown"], padding=True)
        assert batch.attention_mask[0][0] == 0, "padded on the left"


def test_the_code_in_an_export_needs_torch_and_transformers_alone():
    sources = bundle.bundled_sources()
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, module
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in {bundle._flat_name(each) for each in sources}, module
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, module


def make_run(tmp_path, **changes):
    """A run with one checkpoint, its recipe and its metrics."""
    hub.save_export(make_trained(tmp_path / "source", **changes), tmp_path / "first", "xlstm_lm")
    run_dir = tmp_path / "run"
    hub.import_run(tmp_path / "first", run_dir)
    source = {"kind": "hub", "dataset": "somebody/texts", "split": "train", "weight": 1.0}
    recipe = {"model": dict(STOCK | changes), "data": {"sources": [source], "tokenizer": {"kind": "bytes"}}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {"split": "train", "step": 0, "tokens": 10, "loss": 4.0, "bits_per_byte": 5.5},
        {"split": "validation", "step": 0, "tokens": 10, "loss": 3.0, "bits_per_byte": 4.125, "perplexity": 20.25},
        {"split": "validation", "step": 9, "tokens": 90, "loss": 1.0, "bits_per_byte": 1.5, "perplexity": 2.5},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tra')
    return run_dir


@pytest.mark.parametrize(
    ("changes", "expected"), [pytest.param({}, "xlstm_lm", marks=pytest.mark.slow), (STOCK, "transformers")]
)
def test_a_run_is_exported_checked_and_described(tmp_path, changes, expected):
    run_dir = make_run(tmp_path, **changes)
    exported = hub.export(run_dir, tmp_path / "export", step=0)
    assert exported.export_format.name == expected
    assert exported.difference < 1e-3
    text = (tmp_path / "export" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["datasets"] == ["somebody/texts"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0] == {"type": "bits_per_byte", "value": 4.125}
    assert "| perplexity | 20.2500 |" in text
    assert "| somebody/texts | 100% | split train |" in text
    assert f"`{expected}`. It suits " in text
    assert ("trust_remote_code" in text) is (expected == "xlstm_lm")
    assert (tmp_path / "export" / model_card.CURVE).stat().st_size > 5000
    assert (tmp_path / "export" / model_card.RECIPE).read_bytes() == (run_dir / "config.yaml").read_bytes()
    tokens_BT = random_tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(hub.load(tmp_path / "export")(tokens_BT), hub.load(run_dir)(tokens_BT))
    with pytest.raises(ValueError, match="run has no checkpoint of step 7; it has 0"):
        hub.export(run_dir, tmp_path / "other", step=7)


def test_an_export_that_differs_is_not_finished(tmp_path, monkeypatch):
    def convert_wrongly(config, weights):
        for name, tensor in convert(config, weights):
            yield name, tensor.roll(1, 0) if name == "model.blocks.2.mixer.down.weight" else tensor

    convert = own_format.OWN_FORMAT.convert
    monkeypatch.setitem(own_format.OWN_FORMAT.__dict__, "convert", convert_wrongly)
    hub.save_export(make_trained(tmp_path / "source"), tmp_path / "first")
    monkeypatch.setitem(own_format.OWN_FORMAT.__dict__, "convert", convert)
    (tmp_path / "made").mkdir()
    monkeypatch.setitem(own_format.OWN_FORMAT.__dict__, "convert", convert_wrongly)
    with pytest.raises(ValueError, match="differs from the trained model") as refused:
        hub.export(tmp_path / "first", tmp_path / "made" / "export")
    for what in ("batch of 2 at length 64", "padded positions on the left", "greedy generation"):
        assert what in str(refused.value)
    assert not list((tmp_path / "made").iterdir())


def test_a_name_or_shape_that_would_not_be_found_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    def forget(config, weights):
        return ((name, tensor) for name, tensor in convert(config, weights) if "blocks.1.mixer.bias" not in name)

    convert = own_format.OWN_FORMAT.convert
    monkeypatch.setitem(own_format.OWN_FORMAT.__dict__, "convert", forget)
    with pytest.raises(AssertionError, match=r"model.blocks.1.mixer.bias: \(\) written, \(4, 2, 16\) expected"):
        hub.save_export(make_trained(tmp_path / "source"), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_with_xlstm_lm_imported_an_export_needs_no_remote_code(tmp_path):
    hub.save_export(make_trained(tmp_path / "source"), tmp_path / "export")
    script = f"""
import sys
import xlstm_lm.hub
assert "transformers" not in sys.modules, "to import our package stays cheap"
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "export")!r})
assert type(model).__module__ == "xlstm_lm.hub.modeling_xlstm_lm"
assert AutoTokenizer.from_pretrained({str(tmp_path / "export")!r})("a").input_ids == [256, 97]
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("4GiB", 2**32), ("1.5 K", 1500), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "many", "-1GB", "1TB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size; give one such as 500MB"):
        parse_size(text)


def test_an_exported_class_without_weights_draws_them_as_training_does():
    config = XLSTMLMConfig(**SMALL)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    small = (2 / (5 * config.embedding_dim)) ** 0.5
    for weight in (fresh.model.embedding.weight, fresh.lm_head.weight):
        assert 0.9 < weight.std().item() / small < 1.1


def test_what_is_saved_after_tuning_is_a_model_of_ours_again(tmp_path):
    hub.save_export(make_trained(tmp_path / "source"), tmp_path / "export")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        loaded.model.blocks[0].mixer.gates.bias += 1
    loaded.save_pretrained(tmp_path / "tuned")
    assert "auto_map" not in json.loads((tmp_path / "tuned" / "config.json").read_text()), "it has no code beside it"
    for folder in ("export", "tuned"):  # transformers serve and TRL look this name up in the transformers package
        (name,) = json.loads((tmp_path / folder / "config.json").read_text())["architectures"]
        assert getattr(transformers, name) is transformers.AutoModelForCausalLM
    tokens_BT = random_tokens(1, 9)
    torch.testing.assert_close(hub.load(tmp_path / "tuned")(tokens_BT), loaded(tokens_BT).logits)


def test_every_mixer_runs_where_xlstm_lm_is_not_installed(tmp_path):
    kinds = list(MIXERS)
    trained = make_trained(tmp_path / "source", pattern=kinds, num_blocks=len(kinds))
    hub.save_export(trained, tmp_path / "first")
    exported = hub.export(tmp_path / "first", tmp_path / "export")  # compares with a process that cannot import it
    assert exported.export_format.name == "xlstm_lm" and exported.difference < 1e-3


def test_an_export_has_the_backends_in_plain_pytorch_alone():
    sources = bundle.bundled_sources()
    operations = {use.operation for kind in MIXERS for use in HybridConfig(pattern=kind).operations(micro_rows=1)}
    for operation in operations:
        modules = {name: operation[name].function.partition(":")[0] for name in operation.names}
        assert modules[operation.reference] in sources
        others = [name for name in operation.names if operation[name].native or operation[name].package == "triton"]
        assert not sources.keys() & {modules[name] for name in others}


@pytest.mark.slow
def test_a_stranger_tunes_and_saves_an_export(tmp_path):
    hub.save_export(make_trained(tmp_path / "source"), tmp_path / "export")
    script = """
import sys
sys.modules["xlstm_lm"] = None
import torch
from transformers import AutoModelForCausalLM
export, tuned = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).train()
tokens_BT = torch.arange(70)[None]
model.activation_checkpointing_enable()
model(tokens_BT, labels=tokens_BT).loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        parameter -= 0.01 * parameter.grad
model.save_pretrained(tuned)
again = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True)
torch.testing.assert_close(again(tokens_BT).logits, model.eval()(tokens_BT).logits)
fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
assert fresh.model.blocks[0].mixer.gates.bias.tolist() == [-10, -10, 3, 6], "initialised as in training"
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    folders = [str(tmp_path / "export"), str(tmp_path / "tuned")]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, env=environment)


def test_both_entry_files_import_every_other_file(tmp_path):
    # transformers 5.0 to 5.9 copy a local folder's other files only then.
    from transformers.dynamic_module_utils import get_relative_imports

    bundle.write_code(tmp_path)
    entries = {"configuration_xlstm_lm", "modeling_xlstm_lm"}
    others = {path.stem for path in tmp_path.glob("*.py")} - entries
    for entry in entries:
        assert set(get_relative_imports(tmp_path / f"{entry}.py")) - entries == others


@pytest.mark.parametrize(
    ("installed", "told"), [({"xlstm"}, True), ({"xlstm", "mlstm_kernels"}, False), (set(), False)]
)
def test_a_package_in_the_way_of_transformers_is_named(monkeypatch, installed, told):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert ("pip uninstall xlstm" in (choose_format(XLSTMConfig(), None).obstacle() or "")) is told
    assert own_format.OWN_FORMAT.obstacle() is None
