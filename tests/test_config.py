"""Recipes and flags: how they compose, and what is said when one is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from xlstm_lm.base.recipe import parse_yaml, read_recipe
from xlstm_lm.cli import make_parser
from xlstm_lm.models.presets import preset, preset_names
from xlstm_lm.runs.same_run import differing_fields
from xlstm_lm.training.deepspeed_section import Offload, ZeroOptimization
from xlstm_lm.training.run_config import as_dict, as_recipe, fields, load_run_config, with_defaults
from xlstm_lm.training.schedule import ScheduleConfig

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "train" / "demo.yaml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_includes_are_read_first_and_the_recipe_wins(tmp_path):
    write(tmp_path / "model" / "small.yaml", "model: {num_blocks: 2, embedding_dim: 64}\n")
    write(tmp_path / "base.yaml", "include: [model/small.yaml]\ntraining: {steps: 5, seed: 3}\n")
    top = write(
        tmp_path / "train" / "top.yaml", "include: [../base.yaml]\nmodel: {num_blocks: 3}\ntraining: {steps: 7}\n"
    )
    values, origins = read_recipe(top)
    assert values == {"model": {"num_blocks": 3, "embedding_dim": 64}, "training": {"steps": 7, "seed": 3}}
    assert origins["model.num_blocks"] == origins["training.steps"] == str(top)
    assert origins["model.embedding_dim"].endswith("small.yaml")


def test_later_recipes_and_flags_win(tmp_path):
    longer = write(tmp_path / "longer.yaml", "training: {steps: 77}\noptimizer: {learning_rate: 1e-4}\n")
    run = load_run_config([DEMO, longer], {"model.num_blocks": 6})
    assert (run.training.steps, run.optimizer.learning_rate, run.model.num_blocks) == (77, 1e-4, 6)
    assert run.model.embedding_dim == load_run_config([DEMO]).model.embedding_dim


def test_a_saved_run_reads_back_equal(tmp_path):
    run = load_run_config(
        [DEMO], {"optimizer.betas": [0.8, 0.9], "model.pattern": ["mlstm", "slstm"], "model.num_blocks": 2}
    )
    saved = write(tmp_path / "config.yaml", as_recipe(run))
    assert load_run_config([saved]) == run


@pytest.mark.parametrize("name", ["010", "1:30", "yes", "2024-01-01", "1e3", "run #2", "null ", "é: {x}", "\x85"])
def test_a_saved_run_keeps_text_as_it_is(name, tmp_path):
    run = load_run_config([DEMO], {"wandb.name": name, "wandb.tags": [name], "training.run_dir": name})
    assert load_run_config([write(tmp_path / "config.yaml", as_recipe(run))]) == run


def test_an_older_runs_configuration_is_todays(tmp_path):
    run = load_run_config([DEMO], {"schedule.warmup": 50, "schedule.cooldown": 450, "optimizer.eps": 1e-08})
    text = as_recipe(run).replace("  warmup: 50", "  warmup_steps: 50").replace("  cooldown:", "  cooldown_steps:")
    assert "warmup_steps: 50" in text and "cooldown_steps: 450" in text
    saved = write(tmp_path / "config.yaml", text)
    assert load_run_config([saved]) == run
    assert not differing_fields(yaml.safe_load(text), yaml.safe_load(as_recipe(run)))


def test_a_field_that_an_older_run_lacks_had_its_default():
    def differing(now, *lacking):
        older = as_dict(load_run_config([DEMO]))
        for name in lacking:
            section, field = name.split(".")
            del older[section][field]
        run = load_run_config([DEMO], now)
        return differing_fields(with_defaults(run, older), as_dict(run))

    assert differing({}, "model.slstm_block", "model.norm_eps", "optimizer.kind", "data.shuffle_documents") == []
    assert differing({}, "schedule.cooldown_shape") == []
    assert differing({"schedule.cooldown_shape": "1-sqrt"}, "schedule.cooldown_shape") == [
        "  schedule.cooldown_shape: 'linear' there, '1-sqrt' now"
    ]
    assert differing({"model.norm_eps": 1e-5}, "model.norm_eps") == ["  model.norm_eps: 1e-06 there, 1e-05 now"]
    assert "  optimizer.kind: 'adamw' there, 'muon' now" in differing({"optimizer.kind": "muon"}, "optimizer.kind")
    assert with_defaults(load_run_config([DEMO]), {"model": {"unknown": 1}}) == {"model": {"unknown": 1}}


def test_a_backend_may_differ_wherever_it_is():
    def config(backend):
        mixers = [{"kind": "mamba2", "scan_backend": backend}]
        pattern = {"pattern": "mamba2", "mlstm_backend": backend, "mixers": mixers}
        return as_dict(load_run_config([DEMO], {f"model.{name}": value for name, value in pattern.items()}))

    assert not differing_fields(config("auto"), config("chunkwise"))


@pytest.mark.parametrize(
    ("before", "steps", "now", "differ"),
    [
        ({"warmup": 50, "cooldown": 450}, 850, {"warmup": 0.0588, "cooldown": 0.5294}, []),
        ({"warmup": 0.0588, "cooldown": 0.5294}, 850, {"warmup": 50, "cooldown": 450}, []),
        ({"warmup": 0.0588, "cooldown": 0.5294}, 1700, {"warmup": 0.0588, "cooldown": 0.5294}, []),  # follow the run
        ({"warmup": 50, "cooldown": 450}, 1700, {"warmup": 0.0294, "cooldown": 450}, []),
        ({"warmup": 50, "cooldown": 450}, 1700, {"warmup": 0.0588, "cooldown": 450}, ["warmup: 50 there, 0.0588 now"]),
        ({"warmup": 50, "cooldown": 450}, 850, {"warmup": 50, "cooldown": 0.5}, ["cooldown: 450 there, 0.5 now"]),
    ],
)
def test_a_schedule_in_steps_is_the_one_in_shares(before, steps, now, differ):
    def config(steps, schedule):
        lengths = {f"schedule.{name}": value for name, value in schedule.items()}
        return as_dict(load_run_config([DEMO], {"training.steps": steps} | lengths))

    assert differing_fields(config(850, before), config(steps, now)) == [f"  schedule.{line}" for line in differ]


def test_a_former_name_wins_over_todays_in_an_earlier_recipe():
    assert load_run_config([DEMO], {"schedule.warmup_steps": 3}).schedule.warmup == 3


@pytest.mark.parametrize("steps", [20, 85, 850, 8500])
def test_the_demo_is_one_flag_shorter_or_longer(steps):
    run = load_run_config([DEMO], {"training.steps": steps})
    run.schedule.check_steps(steps)
    assert run.schedule.lengths(850) == (50, 450)


def schedules():
    """Every recipe of a run, a study or a comparison that says how many steps it has."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        values, _ = read_recipe(path)
        values = values.get("run", values)
        if "steps" in values.get("training", {}):
            yield pytest.param(values["training"]["steps"], values.get("schedule", {}), id=path.stem)


@pytest.mark.parametrize(("steps", "schedule"), schedules())
@pytest.mark.parametrize("factor", [0.1, 1, 10])
def test_every_recipe_is_one_flag_shorter_or_longer(steps, schedule, factor):
    ScheduleConfig(**schedule).check_steps(round(steps * factor))


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_recipe_is_valid_and_short(recipe):
    load_run_config([recipe])
    assert len(recipe.read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes_the_checks_of_a_recipe(name):
    assert load_run_config([CONFIGS / "data" / "python_stdlib.yaml"], {"model": name}).model == preset(name)


def test_presets_are_named_in_recipes_and_flags_and_fields_beside_them_win(tmp_path):
    base = write(tmp_path / "base.yaml", "model: xlstm-400m\ndata: {sources: [{kind: text, paths: [x]}]}\n")
    top = write(tmp_path / "top.yaml", "include: [base.yaml]\nmodel: {num_blocks: 6}\n")
    swapped = write(tmp_path / "swapped.yaml", "model: {preset: transformer-400m, num_heads: 8}\n")
    assert load_run_config([base]).model == preset("xlstm-400m")
    assert load_run_config([top]).model == replace(preset("xlstm-400m"), num_blocks=6)
    changed = replace(preset("transformer-400m"), num_heads=8)
    assert load_run_config([base, swapped]).model == changed
    assert load_run_config([top, swapped]).model == replace(changed, num_blocks=6)
    assert load_run_config([swapped, base]).model == replace(preset("xlstm-400m"), num_heads=8)
    flags = {"model.num_heads": 2, "model": "mamba2-cpu-1m"}
    with pytest.raises(
        ValueError, match=r"flag --model.num_heads: model.num_heads = 2: .* in the family mamba: remove"
    ):
        load_run_config([top], flags)
    run = load_run_config([top], {"model.tie_embeddings": True, "model": "transformer-cpu-1m"})
    assert run.model == replace(preset("transformer-cpu-1m"), num_blocks=6, tie_embeddings=True)
    saved = write(tmp_path / "config.yaml", as_recipe(run))
    assert "preset" not in saved.read_text() and load_run_config([saved]) == run
    assert load_run_config([saved], {"model.num_blocks": 7}).model == replace(run.model, num_blocks=7)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model: xlstm-40m", {}, r"{file}: model.preset = 'xlstm-40m' is no preset. Did you mean xlstm-400m\?"),
        ("model: {preset: 3}", {}, r"{file}: model.preset = 3 is no preset. There are xlstm-165m, "),
        (
            "{}",
            {"model": "mamba-400m"},
            r"flag --model: model.preset = 'mamba-400m' is no preset. Did you mean mamba2-400m",
        ),
        ("model: {num_heads: 4}", {"model": "xlstm-40m"}, r"flag --model: model.preset = 'xlstm-40m' is no preset"),
        ("model: {family: lstm}", {"model": "xlstm-400m"}, "flag --model: .* of the family xlstm, but model.family is"),
        ("model: {preset: xlstm-400m, num_heads: 3}", {}, "{file}: .*num_heads 3 does not divide"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_with_its_file_or_flag(text, flags, message, tmp_path):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ValueError, match=message.format(file=re.escape(str(path)))):
        load_run_config([path], flags)


def test_a_preset_over_a_runs_whole_configuration_is_refused(tmp_path):
    saved = write(tmp_path / "config.yaml", as_recipe(load_run_config([DEMO])))
    with pytest.raises(ValueError, match="flag --model: model.preset = 'xlstm-cpu-1m' has no effect"):
        load_run_config([saved], {"model": "xlstm-cpu-1m"})


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("zero", sorted((CONFIGS / "deepspeed").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_and_deepspeed_recipes_compose(recipe, zero):
    run = load_run_config([recipe, zero], {"model": "xlstm-165m"})
    assert "zero_optimization" in run.deepspeed


def test_every_field_has_a_description():
    assert len(fields()) > 60
    assert not [field.name for field in fields() if not field.description.strip()]


def test_numbers_as_people_write_them():
    assert parse_yaml("1e-3") == 1e-3
    assert parse_yaml("-2.5E+4") == -2.5e4
    assert parse_yaml("e1") == "e1"
    assert parse_yaml("null") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {num_bloks: 4}",
            r"{file}: model.num_bloks = 4: there is no such field. Did you mean model.num_blocks\?",
        ),
        ("modle: {num_blocks: 4}", r"{file}: modle = .*: there is no such field. Did you mean model\?"),
        (
            "training: {learning_rate: 0.1}",
            r"{file}: training.learning_rate = 0.1: .* Did you mean optimizer.learning_rate\?",
        ),
        ("model: {num_blocks: four}", r"{file}: model.num_blocks = 'four': must be a whole number from 1 to 4,096"),
        ("model: {num_blocks: true}", r"{file}: model.num_blocks = true: must be a whole number"),
        ("model: {num_blocks: 2.5}", r"{file}: model.num_blocks = 2.5: must be a whole number"),
        ("model: {norm: batch}", r"{file}: model.norm = 'batch': must be one of rms, layer"),
        ("model: {pattern: 7}", r"{file}: model.pattern = 7: "),
        ("model: {num_heads: 3}", r"{file}.*: model: num_heads 3 does not divide"),
        ("training: {steps: 0}", r"{file}: training.steps = 0: must be a whole number from 1"),
        ("model: 3", r"{file}: model = 3: must be a section with fields"),
        ("training:", r"{file}: training = null: must be a section with fields"),
        ("data: {sources: [{pahts: [a]}]}", r"{file}: data.sources.0.pahts = .* Did you mean data.sources.0.paths\?"),
        ("data: {sources: {kind: text}}", r"{file}: data.sources = .*: must be a list of sections"),
        ("optimizer: {betas: [0.9]}", r"{file}: optimizer.betas = \[0.9\]: must be a list of 2"),
        ("wandb: {name: 2024}", r"{file}: wandb.name = 2024: must be text in quotes or null"),
        ("wandb: {mode: of}", r"{file}: wandb.mode = 'of': must be one of online, offline, disabled"),
        ("schedule: {warmup: 1.0}", r"{file}: schedule.warmup = 1.0: one step or the whole run\?"),
        ("schedule: {warmup_steps: 3, warmup: 4}", "{file}: schedule.warmup and schedule.warmup_steps are two names"),
        ("foo: 1", r"{file}: foo = 1: there is no such field. There are model, data, training"),
        ("training: {run_dir: ''}", "{file}: training.run_dir is empty"),
        (r'training: {run_dir: "a\0b"}', r"{file}: training.run_dir = 'a\\x00b': must be UTF-8 text without null"),
        (r'wandb: {tags: ["\uD800"]}', r"{file}: wandb.tags = '\\ud800': must be UTF-8 text"),
        ("training.steps: 3", r"{file}: training.steps = 3: .* Only flags join .* write 'training: {steps: ...}'"),
        ("deepspeed: {zero_optimization.stage: 1}", r"write 'zero_optimization: {stage: ...}'"),
        ("Training: {steps: 3}", r"Did you mean training\?"),
        ("optimizer: {kind: sgd}", r"{file}: optimizer.kind = 'sgd': must be one of adamw"),
        ("optimizer: {kind: [adamw]}", r"{file}: optimizer.kind = .*: must be one of adamw"),
        (
            "optimizer: {momentum: 0.9}",
            r"optimizer.momentum = 0.9: there is no such field in the kind adamw: remove it",
        ),
        ("optimizer: {kind: muon, momentun: 0}", r"Did you mean optimizer.momentum\?"),
        ("optimizer: {lr: 3}", r"Did you mean optimizer.learning_rate\?"),
        ("training: {batch_size: 3}", r"Did you mean data.global_batch_size\?"),
        ("model: {hidden_size: 3}", r"Did you mean model.embedding_dim\?"),
        ("training:\n\tsteps: 3", "between values YAML has blanks, not tabs"),
    ],
)
def test_a_mistake_in_a_recipe_names_file_key_and_mend(tmp_path, text, message):
    recipe = write(tmp_path / "mine.yaml", text + "\n")
    with pytest.raises(ValueError, match=message.replace("{file}", ".*mine.yaml")):
        load_run_config([DEMO, recipe])


def test_a_value_out_of_range_is_traced_to_the_one_that_set_it(tmp_path):
    recipe = write(tmp_path / "mine.yaml", "training: {steps: 0, log_every: 5}\n")
    with pytest.raises(ValueError) as refused:
        load_run_config([DEMO, recipe], {"training.log_every": 3})
    assert str(refused.value).startswith(f"{recipe}: training.steps = 0")
    with pytest.raises(ValueError) as refused:
        load_run_config([DEMO, recipe], {"training.steps": -1})
    assert str(refused.value).startswith("flag --training.steps: training.steps = -1")


DEEPSPEED_MISTAKES = [
    ("{zero_optimisation: {stage: 3}}", r"zero_optimisation = .* Did you mean deepspeed.zero_optimization\?"),
    ("{foo: 1}", "deepspeed.foo = 1: there is no such field. There are zero_optimization, "),
    ("{zero_optimization: 3}", "zero_optimization = 3: must be a section"),
    ("{zero_optimization: null}", "zero_optimization = null: must be a section"),
    ("{zero_optimization: {stage: '2'}}", "stage = '2': must be one of 0, 1, 2, 3"),
    ("{zero_optimization: {stage: true}}", "stage = true: must be one of 0, 1, 2, 3"),
    ("{zero_optimization: {overlap_comm: 'true'}}", "overlap_comm = 'true': must be true or false"),
    ("{zero_optimization: {overlap_com: true}}", "Did you mean deepspeed.zero_optimization.overlap_comm"),
    ("{zero_optimization: {reduce_bucket_size: auto}}", "reduce_bucket_size = 'auto': give a value"),
    ("{zero_optimization: {reduce_bucket_size: large}}", "reduce_bucket_size = 'large': must be a whole number"),
    ("{fp16: {enabled: auto}}", "deepspeed.fp16 is not set there: use training.precision"),
    ("{zero_optimization: {reduce_bucket_size: .inf}}", "reduce_bucket_size = inf: must be a whole number"),
    ("{zero_optimization: {offload_optimizer: {devise: cpu}}}", "Did you mean .*offload_optimizer.device"),
    ("{zero_optimization: {offload_optimizer: {device: nvme}}}", "device = 'nvme': must be one of none, cpu"),
    (
        "{zero_optimization: {offload_optimizer: {ratio: 0.5}}}",
        "offload_optimizer.ratio is not set there: checkpoints would",
    ),
    ("{zero_optimization: {zenflow: {}}}", "zenflow is not set there: it changes when weights are updated"),
    ("{zero_optimization: {mics_shard_size: 4}}", "mics_shard_size is not set there: checkpoints here"),
    ("{zero_optimization: {zero_hpz_partition_size: 4}}", "zero_hpz_partition_size is not set there: checkpoints"),
    ("{sequence_parallel_size: 2}", "sequence_parallel_size is not set there: rows are not divided"),
    ("3", "deepspeed = 3: must be a section"),
    *(
        (f"{{{key}: 1}}", f"deepspeed.{key} is not set there: use ")
        for key in ("train_batch_size", "bf16", "optimizer")
    ),
]


@pytest.mark.parametrize(("section", "message"), DEEPSPEED_MISTAKES)
def test_a_mistake_in_the_deepspeed_section_is_named(section, message):
    with pytest.raises(ValueError, match=f"^flag --deepspeed: .*{message}") as refused:
        load_run_config([DEMO], {"deepspeed": parse_yaml(section)})
    assert "\n" not in str(refused.value)


def test_a_section_as_for_other_programs_is_refused_all_at_once():
    section = {
        "fp16": {"enabled": "auto"},
        "optimizer": {},
        "zero_optimization": {"stage": 1, "sub_group_size": "auto"},
    }
    with pytest.raises(ValueError) as refused:
        load_run_config([DEMO], {"deepspeed": section})
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("flag --deepspeed: deepspeed.") and len(lines) == 3
    assert "deepspeed.zero_optimization.sub_group_size = 'auto': give a value, or remove it" in str(refused.value)


def test_the_deepspeed_section_is_handed_on_as_it_is():
    section = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": {"device": "cpu"}}}
    run = load_run_config([], {"model": {}, "data": {}, "deepspeed": section})
    assert run.deepspeed == section and isinstance(run.deepspeed["zero_optimization"]["reduce_bucket_size"], int)


@pytest.mark.parametrize(
    ("section", "model"),
    [(ZeroOptimization, "zero"), (Offload, "offload_optimizer"), (Offload, "offload_param")],
)
def test_keys_of_zero_are_those_that_deepspeed_has(section, model):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields_ = DeepSpeedZeroConfig.model_fields
    if model != "zero":
        fields_ = next(each for each in get_args(fields_[model].annotation)).model_fields
    known = {name for key, each in fields_.items() for name in (key, each.alias) if name}
    # Handled by DeepSpeed's configuration before its fields are.
    assert set(section.__annotations__) - known <= {"stage3_allgather_sequential"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("wandb.name", text) for text in ("run #2", "2024", "2024-01-01", "yes", "a: b", "#", "[x", "", "~", '"')),
        ("data.tokenizer.end_of_document", "[SEP]"),
        ("data.tokenizer.revision", "1e234567"),
        ("training.run_dir", "null"),
        ("wandb.mode", "offline"),
    ],
)
def test_a_flag_that_holds_text_takes_it_as_it_is(name, text):
    assert flag(name, text) == text


def flag(name: str, *texts: str):
    """Value that the command line makes of a flag."""
    given = [part for text in texts for part in (f"--{name}", text)]
    options = vars(make_parser("train").parse_args(["train", "--config", "x.yaml", *given]))
    return options[name]


def test_null_is_null_where_a_flag_may_be():
    assert flag("wandb.name", "null") is None


def test_a_flag_by_its_former_name():
    options = make_parser("train").parse_args(["train", "--config", "x.yaml", "--schedule.warmup_steps", "5"])
    assert vars(options)["schedule.warmup"] == 5


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("data.sources", ["[{kind: text"], "argument --data.sources: '[{kind: text' is not valid YAML: "),
        ("training.steps", ["1", "2"], "argument --training.steps: it is there twice, first as 1"),
        ("deepspeed", ["{a: 1, a: 2}"], "is not valid YAML: the key 'a' occurs twice"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(name, texts, message, capsys):
    with pytest.raises(SystemExit) as ended:
        flag(name, *texts)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--deepspeed.zero_optimization.stage", "2"], "--deepspeed has all below it, as YAML: --deepspeed '...'."),
        (["--data.sources.0.kind", "text"], "--data.sources has all below it, as YAML"),
        (["--schedule", "x"], "schedule is a section, with the flags --schedule.kind, --schedule.warmup"),
        (["--model", "xlstm-cpu-1m", "--model.preset", "xlstm-cpu-3m"], "it is there twice, first as 'xlstm-cpu-1m'"),
        (["--optimizer.betas", "0.9", "0.95"], "quote one with blanks, and lists: '[1, 2]'"),
        (["--model.forget_bias", "-1e2"], "--flag=VALUE where the value begins with a dash"),
        (["training.steps=5"], "Did you mean --training.steps?"),
        (["--lr", "5"], "Did you mean --optimizer.learning_rate?"),
    ],
)
def test_a_flag_that_is_none_is_answered_by_the_one_meant(given, message, capsys):
    with pytest.raises(SystemExit):
        make_parser("train").parse_args(["train", "--config", "x.yaml", *given])
    assert message in capsys.readouterr().err


def test_a_list_with_a_wrong_item_is_named_once():
    with pytest.raises(ValueError) as refused:
        load_run_config([DEMO], {"model.pattern": [1], "optimizer.betas": [7]})
    assert len(str(refused.value).splitlines()) == 2


def test_all_mistakes_are_named_at_once(tmp_path):
    recipe = write(tmp_path / "mine.yaml", "model: {num_bloks: 4}\ntraining: {steps: x}\n")
    with pytest.raises(ValueError, match=r"(?s)model.num_bloks.*training.steps = 'x'"):
        load_run_config([DEMO, recipe])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.yaml", None, "missing.yaml does not exist; that folder has there.yaml"),
        ("list.yaml", "- 1\n", "list.yaml holds list, but a recipe is a mapping"),
        ("broken.yaml", "model: {num_blocks: 4\n", "(?s)broken.yaml is not valid YAML: .*line 2"),
        (
            "includes.yaml",
            "include: there.yaml\n",
            "includes.yaml: include is 'there.yaml', but must be a list of files",
        ),
        ("lost.yaml", "include: [nowhere.yaml]\n", "nowhere.yaml, which .*lost.yaml includes, does not exist"),
        ("circle.yaml", "include: [circle.yaml]\n", "circle.yaml includes itself"),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, name, text, message):
    write(tmp_path / "there.yaml", "training: {steps: 1}\n")
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / name)


def test_each_family_has_its_own_fields(tmp_path):
    recipe = write(tmp_path / "mine.yaml", "model: {family: mamba, version: 1}\ndata: {sources: []}\n")
    with pytest.raises(ValueError, match=r"model.rope_theta = 5: there is no such field in the family mamba"):
        load_run_config([recipe], {"model.rope_theta": 5})
    with pytest.raises(ValueError, match=r"model.family = 'mmaba': must be one of xlstm, transformer"):
        load_run_config([recipe], {"model.family": "mmaba"})


def test_the_flags_say_which_family_has_them():
    by_name = {each.name: each for each in fields()}
    assert by_name["model.rope_theta"].alternatives == ("transformer",)
    assert by_name["model.rope_theta"].description.endswith("(transformer).")
    assert by_name["model.num_blocks"].default == "12 (xlstm, transformer, hybrid); 24 (mamba); 2 (lstm)"
