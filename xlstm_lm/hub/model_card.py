"""The model card of an export: what the model was trained on and how, what it reaches, and how to load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from xlstm_lm.hub.card_metadata import CardOptions, make_metadata
from xlstm_lm.hub.formats.export_format import ExportFormat
from xlstm_lm.hub.lora import lora_targets
from xlstm_lm.hub.origin import base_model, hub_id
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.runs.folder import RunFolder

CURVE = "learning_curve.png"
RECIPE = "recipe.yaml"


def write_model_card(
    folder: Path,
    *,
    name: str,
    model_config: Any,
    export_format: ExportFormat,
    run_dir: Path | None,
    step: int | None,
    difference: float | None,
    num_tokens: int,
    options: CardOptions,
) -> None:
    """Write README.md into an export, and the run's recipe and learning curve beside it.

    `run_dir` and `step` say where the model comes from, `difference` how far its logits were from the trained model's
    in a fresh process; None where that is not known. `num_tokens` is the tokenizer's vocabulary.
    """
    recipe = _read_recipe(run_dir, folder)
    records = RunFolder(run_dir).metrics() if run_dir else []
    records = [each for each in records if step is None or each["step"] <= step]
    final = next((each for each in reversed(records) if each["split"] == "validation"), None)
    sections = [
        f"# {name}",
        _summary(model_config, recipe, step),
        _loading(name, export_format, difference),
        _tuning(model_config, export_format, num_tokens),
        _data(recipe),
        _evaluation(final),
        _training(recipe, records, folder),
    ]
    metadata = make_metadata(
        name=name,
        options=options,
        model_config=model_config,
        export_format=export_format,
        base_model=base_model(run_dir),
        datasets=_hub_datasets(recipe),
        results={key: final[key] for key in ("bits_per_byte", "perplexity") if final and final.get(key)},
    )
    text = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _read_recipe(run_dir: Path | None, folder: Path) -> dict[str, Any]:
    """The run's resolved configuration, copied into the export; empty without a run."""
    run = RunFolder(run_dir) if run_dir else None
    if run is None or not run.config_path.is_file():
        return {}
    shutil.copyfile(run.config_path, folder / RECIPE)
    return run.config()


def _sources(recipe: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return recipe.get("data", {}).get(key) or []


def _hub_datasets(recipe: dict[str, Any]) -> list[str]:
    """Ids of the training data on the hub."""
    named = {source.get("dataset") for source in _sources(recipe, "sources")} - {None, ""}
    return sorted(name for name in named if hub_id(name) or ("/" not in name and not Path(name).exists()))


def _summary(model_config: Any, recipe: dict[str, Any], step: int | None) -> str:
    text = f"A language model of {count_parameters(model_config):,} parameters (family `{model_config.family}`"
    is_xlstm = model_config.family == "xlstm"
    if is_xlstm or model_config.family == "hybrid":
        kinds = model_config.block_kinds()
        blocks = " and ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        described = f"{blocks} blocks of width {model_config.embedding_dim}"
        text += f", [xLSTM](https://arxiv.org/abs/2405.04517): {described}" if is_xlstm else f": {described}"
    text += "), trained with xlstm-lm"
    if step is not None:
        data = recipe.get("data", {})
        tokens = step * data.get("context_length", 0) * data.get("global_batch_size", 0)
        text += f" for {step:,} steps" + (f", {tokens:,} tokens" if tokens else "")
    return text + "."


def _loading(name: str, export_format: ExportFormat, difference: float | None) -> str:
    remote = ", trust_remote_code=True" if export_format.write_code else ""
    batch = ""
    if export_format.leaves_out_padding:
        batch = """
inputs = tokenizer(["The first prompt", "A second"], padding=True, return_tensors="pt")  # on the left
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50), skip_special_tokens=True))"""
    notes = [f"This is the format `{export_format.name}`. It suits {export_format.suits}.", *export_format.limits]
    if difference is not None:
        notes.append(
            "Before this folder was finished, a fresh process loaded it and gave the trained model's logits (largest "
            f"difference {difference:.1e}) and its greedy texts."
        )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{remote})
model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{remote})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
{batch.strip()}
```

The tokenizer puts the end of a document before a text, as training did. From a local copy,
`xlstm_lm.hub.load` gives xlstm-lm's own module, and `xlstm-lm import` a run to train on from.

""" + "\n".join(f"* {note}" for note in notes)


def _tuning(model_config: Any, export_format: ExportFormat, num_tokens: int) -> str:
    """Hints for training on with transformers' tools."""
    notes, padded = [], model_config.vocab_size - num_tokens
    targets = lora_targets(model_config, export_format.name)
    if targets:
        fields = "".join(f"\n    {field}={json.dumps(value)}," for field, value in targets.items())
        notes.append(
            "PEFT has no default targets for this type of model. These reach everything but embedding, norms and "
            f"convolutions:\n\n```python\nfrom peft import LoraConfig\n\nconfig = LoraConfig(\n    r=16,\n"
            f'    task_type="CAUSAL_LM",{fields}\n)\n```'
        )
    if "modules_to_save" in targets:
        notes.append(
            "`modules_to_save` names the mixers whose matrices have more dimensions than PEFT adapts; they are trained "
            "in full."
        )
    if export_format.write_code:
        notes.append(
            "Rows packed from several documents, as by TRL's `packing=True` and transformers' "
            "`DataCollatorWithFlattening`, are read as such: the state is reset where `position_ids` begin again."
        )
    if padded > 0:
        notes.append(
            f"The tokenizer has {num_tokens:,} tokens, embedding and head {model_config.vocab_size:,} rows: the first "
            f"{padded:,} tokens that are added, such as the end of a chat turn, need no `resize_token_embeddings`."
        )
    return "\n\n".join(["## Fine-tuning", *notes]) if notes else ""


def _data(recipe: dict[str, Any]) -> str:
    sources = _sources(recipe, "sources")
    if not sources:
        return ""
    rows = ["| source | share | details |", "|---|---|---|"]
    total = sum(source.get("weight", 1.0) for source in sources)
    for source in sources:
        what = source.get("dataset") or ", ".join(source.get("paths") or []) or source["kind"]
        details = [f"{key} {source[key]}" for key in ("config_name", "split", "revision") if source.get(key)]
        rows.append(f"| {what} | {source.get('weight', 1.0) / total:.0%} | {', '.join(details)} |")
    data, tokenizer = recipe["data"], recipe["data"].get("tokenizer", {})
    words = tokenizer.get("name") or tokenizer.get("kind", "bytes")
    context = f"Tokenizer `{words}`; rows of {data.get('context_length')} tokens, packed, state reset at each document."
    return "\n".join(["## Training data", "", *rows, "", context])


def _evaluation(final: dict[str, Any] | None) -> str:
    if not final:
        return ""
    numbers = [key for key in ("bits_per_byte", "perplexity", "loss") if final.get(key) is not None]
    rows = [f"| {key.replace('_', ' ')} | {final[key]:.4f} |" for key in numbers]
    return "\n".join(
        [
            "## Evaluation",
            "",
            f"On held-out documents, after step {final['step']:,} (perplexity and loss, in nats, per token):",
            "",
            "| | value |",
            "|---|---|",
            *rows,
        ]
    )


def _training(recipe: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> str:
    if not recipe:
        return ""
    parts = ["## Training"]
    if records:
        from xlstm_lm.runs.picture import draw_learning_curve

        draw_learning_curve(records, folder / CURVE, Path(recipe.get("training", {}).get("run_dir", "run")).name)
        parts.append(f"![Bits per byte over tokens]({CURVE})")
    shown = {key: recipe[key] for key in ("model", "optimizer", "schedule", "training") if key in recipe}
    parts.append(
        f"The whole recipe is in `{RECIPE}`; `xlstm-lm train --config {RECIPE} --training.run_dir NEW` repeats the run."
    )
    parts.append(f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```")
    return "\n\n".join(parts)
