"""The command line: `xlstm-lm train | status | generate | export | import | tokenizer | checkpoint | doctor`.

Each command imports its modules when it is called, which keeps `--help` quick.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xlstm_lm import __version__
from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, CountOrZero, NonNegative, PositiveRatio, Seed, VocabSize, argument
from xlstm_lm.base.import_path import keep_current_folder_out
from xlstm_lm.base.program import program, told_once

COMMANDS = ("train", "status", "generate", "export", "import", "tokenizer", "checkpoint", "doctor")
SLOW_COMMANDS = ("train", "generate", "export", "import", "checkpoint", "doctor")
SAMPLE_PROMPT = "def "  # beginning of the sample at the end of a run
SAMPLE_TOKENS = 400


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations of flags, and with the nearest flag in messages about unknown ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag, _, value = unknown[0].partition("=")
            value = value or (unknown[1] if len(unknown) > 1 else "")
            hint = self._flag_hint(flag.lstrip("-"), parsed.command, is_flag=flag.startswith("-"))
            self.error(f"flag {flag} {value}".rstrip() + f": there is no such flag. {hint}")
        return parsed

    def _flag_hint(self, name: str, command: str, is_flag: bool) -> str:
        from xlstm_lm.base.mistakes import nearest

        flags = self.flags_of(command)
        sections = {flag.rpartition(".")[0] for flag in flags}
        if above := [flag for flag in flags if name.startswith(f"{flag}.") and flag not in sections]:
            return f"--{above[0]} has all below it, as YAML: --{above[0]} '...'."
        if below := [flag for flag in flags if flag.startswith(f"{name}.")]:
            more = ", ..." if len(below) > 5 else ""
            return f"{name} is a section, with the flags --{', --'.join(below[:5])}{more}"
        otherwise = f"See 'xlstm-lm {command} --help' for all flags."
        if not is_flag:
            otherwise = f"A flag has one value; quote one with blanks, and lists: '[1, 2]'. {otherwise}"
        return nearest(name, flags, otherwise).replace("Did you mean ", "Did you mean --")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message, which only the first process of a machine writes."""
        if message.endswith("expected one argument"):
            message += ": --flag VALUE, or --flag=VALUE where the value begins with a dash"
        if console.is_first_on_machine():
            super().error(message)
        self.exit(2)

    def flags_of(self, command: str) -> list[str]:
        """List every long flag of a command, without the dashes."""
        commands = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return [flag[2:] for flag in commands.choices[command]._option_string_actions if flag.startswith("--")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake ends it with code 2 and one message, a run that cannot continue with code 1."""
    keep_current_folder_out()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher puts its own flag before the command; the rank is in the environment as well.
    arguments = [each for each in arguments if not each.startswith("--local_rank=")]
    command = next(iter(arguments), "")
    with program(f"xlstm-lm {command}" if command in COMMANDS else "xlstm-lm"):
        if command in SLOW_COMMANDS and not {"-h", "--help"} & set(arguments):
            console.stage("importing PyTorch")
        options = _make_parser(command == "train").parse_args(arguments)
        options.run(options)


def _make_parser(with_fields: bool) -> _Parser:
    parser = _Parser(prog="xlstm-lm", description="Train xLSTM language models, and use what was trained.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Train a model from recipes; the same command continues a run that was stopped.")
    train.usage = "xlstm-lm train --config RECIPE [--config RECIPE ...] [--dry-run N] [--section.field VALUE ...]"
    train.add_argument(
        "--config", action="append", required=True, metavar="RECIPE", help="YAML recipe; given again, later ones win."
    )
    train.add_argument(
        "--dry-run",
        type=int,
        metavar="N",
        help="Run one step as rank 0 of N processes that do not exist, print what it holds and sends, and end.",
    )
    if with_fields:
        from xlstm_lm.training.run_config import add_field_flags

        add_field_flags(train)

    status = command("status", _status, "Print where runs stand, from the files of their folders.")
    status.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run; of several, each has one line.")
    status.add_argument(
        "--requeue",
        action="store_true",
        help="Print whether the run should be started again, and why; exit with 0 if it should and 1 if not.",
    )

    generate = command("generate", _generate, "Continue a prompt with a trained model.")
    generate.add_argument(
        "--model", required=True, metavar="FOLDER", help="A run, a checkpoint, an export, or an id on the hub."
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="The text to continue.")
    generate.add_argument("--max-new-tokens", type=argument(Count), default=256, metavar="N", help="Default: 256.")
    generate.add_argument(
        "--temperature", type=argument(NonNegative), default=0.8, metavar="T", help="0 is greedy. Default: 0.8."
    )
    generate.add_argument(
        "--top-p", type=argument(PositiveRatio), default=0.95, metavar="P", help="Nucleus of the draw. Default: 0.95."
    )
    generate.add_argument("--seed", type=argument(Seed), default=0, metavar="S", help="Default: 0.")

    export = command("export", _export, "Write a trained model for transformers, and check that transformers loads it.")
    export.add_argument(
        "--run", required=True, dest="source", metavar="FOLDER", help="A run or one of its checkpoints."
    )
    export.add_argument(
        "--step", type=argument(CountOrZero), metavar="N", help="Step of the run's checkpoint. Default: the newest."
    )
    export.add_argument("--out", required=True, metavar="FOLDER", help="A new folder.")
    export.add_argument(
        "--format",
        choices=["transformers", "xlstm_lm"],
        help="transformers: a model type that is part of transformers; xlstm_lm: any model, with padded prompts, beams "
        "and bf16, and with its code in the folder. Default: transformers, if it can hold the model.",
    )
    export.add_argument(
        "--shard-size", default="4GiB", metavar="SIZE", help="Largest file of weights, such as 500MB. Default: 4GiB."
    )
    export.add_argument("--push", metavar="REPO", help="Also put it on the Hugging Face hub, as somebody/my-model.")
    export.add_argument(
        "--license", metavar="NAME", help="Of the weights, for the model card: apache-2.0, cc-by-4.0, ... or other."
    )
    export.add_argument(
        "--license-name", metavar="NAME", help="With --license other: its name, such as my-license-1.0."
    )
    export.add_argument("--license-link", metavar="URL", help="With --license other: where its text is.")
    export.add_argument(
        "--language", nargs="+", default=[], metavar="CODE", help="Of the training data, as ISO 639 codes: en de."
    )
    export.add_argument(
        "--base-model",
        metavar="REPO",
        help="Id on the hub of the model that was tuned. Default: the one that the run was imported from.",
    )

    importing = command("import", _import, "Make a run of a model from elsewhere, to train it on.")
    importing.add_argument(
        "--from",
        required=True,
        dest="source",
        metavar="PATH",
        help="A transformers folder of type xlstm, llama, mamba or mamba2; a state dict of the xlstm package with its "
        "configuration beside it; an export, a run or a checkpoint; or an id on the hub, such as NX-AI/xLSTM-7b.",
    )
    importing.add_argument("--out", required=True, metavar="FOLDER", help="A new folder, the run's.")
    importing.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, a folder, or an id on the Hugging Face hub. Default: the one in the model's folder.",
    )

    tokenizer = command("tokenizer", _tokenizer, "Train a byte-level BPE tokenizer on text files.")
    tokenizer.add_argument("action", choices=["train"])
    tokenizer.add_argument("--files", nargs="+", required=True, metavar="FILE", help="Text files or glob patterns.")
    tokenizer.add_argument(
        "--vocab-size",
        type=argument(VocabSize),
        required=True,
        metavar="N",
        help="Vocabulary, end of document included.",
    )
    tokenizer.add_argument("--out", required=True, metavar="FOLDER", help="A new folder, as transformers reads it.")

    checkpoint = command("checkpoint", _checkpoint, "List, verify or merge the checkpoints of a run.")
    checkpoint.add_argument("run_dir", metavar="RUN", help="Folder of the run.")
    checkpoint.add_argument("--verify", action="store_true", help="Compare the checksums of all files.")
    checkpoint.add_argument(
        "--merge", type=argument(CountOrZero), metavar="STEP", help="Write the weights of this step to one file, --out."
    )
    checkpoint.add_argument("--out", metavar="FILE", help="With --merge: a new safetensors file.")

    doctor = command("doctor", _doctor, "Versions, devices, kernels, and whether each computes what it should.")
    doctor.add_argument(
        "types",
        nargs="*",
        metavar="TYPE",
        help="float32, bfloat16 or float16: check kernels in these. Default: that of training here, and float32.",
    )
    return parser


def _train(options: argparse.Namespace) -> None:
    from xlstm_lm.training.run_config import load_run_config

    overrides = {name: value for name, value in vars(options).items() if "." in name or name in ("model", "deepspeed")}
    try:
        run = load_run_config(options.config, overrides)
    except ValueError as error:
        raise error if console.is_first_on_machine() else told_once(error) from None
    console.stage("importing DeepSpeed")
    with console.libraries_quieted():
        from xlstm_lm.training.loop import train

        if options.dry_run is not None:
            from xlstm_lm.training.dry_run import dry_run

            for line in dry_run(run, options.dry_run):
                console.say(line)
            return
        run_dir = train(run)
    if console.is_first_process():
        _conclude(run_dir, options.config, overrides)


def _conclude(run_dir: Path, recipes: list[str], overrides: dict[str, Any]) -> None:
    """Print the results of a finished run, a sample, and commands to continue with.

    Raises:
        RunError: the run has diverged.
    """
    from xlstm_lm.base.durable_files import RunError
    from xlstm_lm.base.finite import NotFiniteError
    from xlstm_lm.hub import load
    from xlstm_lm.models.generation import SamplingConfig, continue_text
    from xlstm_lm.parallel.launcher import program_command
    from xlstm_lm.runs.folder import RunFolder

    folder = RunFolder(run_dir)
    final, step = folder.last_validation(), max(folder.checkpoints())
    numbers = {"bits per byte": "bits_per_byte", "nats a token": "loss"}
    shown = [f"{final[key]:.4f} {unit}" for unit, key in numbers.items() if final and final.get(key) is not None]
    if final:
        console.say(f"\nFinal validation: {', '.join(shown) or 'not finite'}")
    trained = load(run_dir)
    sampling = SamplingConfig(max_new_tokens=SAMPLE_TOKENS)
    try:
        text = "".join(continue_text(trained.model, trained.tokenizer, SAMPLE_PROMPT, sampling))
        problem = "Its validation loss is not finite." if final and final.get("loss") is None else ""
    except NotFiniteError as error:
        problem = str(error)
    if problem:
        raise RunError(
            f"The run has diverged by step {step}. {problem} All of it is kept, the last checkpoint is "
            f"{trained.folder}. Start a new run, in another training.run_dir, with a lower optimizer.learning_rate."
        )
    folder.add_sample(step, SAMPLE_PROMPT, text)
    console.say(f"\nA sample:\n{SAMPLE_PROMPT}{text}")
    again = [part for recipe in recipes for part in ("--config", recipe)]
    longer = overrides | {"training.steps": 2 * step}
    again += [part for name, value in longer.items() for part in (f"--{name}", _as_flag(value))]
    program, name = program_command(), str(run_dir)
    console.say(f"\nLearning curve: {folder.curve_path}")
    console.say(f"Resume, longer:   {shlex.join([*program_command(launched=True), 'train', *again])}")
    console.say(f"Generate:         {shlex.join([*program, 'generate', '--model', name, '--prompt', SAMPLE_PROMPT])}")
    console.say(f"Export:           {shlex.join([*program, 'export', '--run', name, '--out', f'{name}-export'])}")


def _as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _status(options: argparse.Namespace) -> None:
    from xlstm_lm.runs.overview import look_at, one_line, page
    from xlstm_lm.runs.status import read_status, should_requeue
    from xlstm_lm.runs.text_curve import can_write

    folders = [Path(each) for each in options.runs]
    if options.requeue:
        if len(folders) > 1:
            raise ValueError(f"--requeue answers for one run, but there are {len(folders)}: give one folder.")
        look_at(folders[0])  # names a folder that holds no run
        again, reason = should_requeue(read_status(folders[0]))
        print(f"{'requeue' if again else 'no requeue'}: {reason}")
        raise SystemExit(0 if again else 1)
    if len(folders) > 1:
        for each in folders:
            print(one_line(look_at(each)))
    else:
        print(page(look_at(folders[0]), unicode=can_write(sys.stdout.encoding)))


def _generate(options: argparse.Namespace) -> None:
    import torch

    from xlstm_lm.models.generation import SamplingConfig, continue_text

    sampling = SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if not options.prompt:
        raise ValueError("--prompt is empty; give at least one character to continue.")
    try:
        prompt = os.fsencode(options.prompt).decode("utf-8")  # whatever the encoding of the locale
    except UnicodeDecodeError:
        raise ValueError(f"--prompt {options.prompt!a} is not UTF-8; give it as UTF-8 text.") from None
    from xlstm_lm.hub import load

    console.stage(f"loading {options.model}")
    trained = load(options.model)
    trained.to("cuda" if torch.cuda.is_available() else "cpu")
    console.end_stage()
    print(prompt, end="", flush=True)
    for text in continue_text(trained.model, trained.tokenizer, prompt, sampling):
        print(text, end="", flush=True)
    print()


def _export(options: argparse.Namespace) -> None:
    from xlstm_lm import hub
    from xlstm_lm.hub.card_metadata import CardOptions
    from xlstm_lm.hub.export import parse_size

    card = CardOptions(
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        languages=tuple(options.language),
        base_model=options.base_model,
    )
    exported = hub.export(
        options.source,
        options.out,
        step=options.step,
        format_name=options.format,
        shard_bytes=parse_size(options.shard_size),
        repository=options.push,
        card=card,
    )
    console.end_stage()
    form = exported.export_format
    print(f"Wrote {exported.folder} in the format {form.name}, which suits {form.suits}.")
    for limit in form.limits:
        print(f"  {limit}")
    print(f"A fresh process gave the trained model's logits (largest difference {exported.difference:.1e}) and texts.")
    if not card.license:
        print("The model card names no license of the weights; --license adds one (apache-2.0, cc-by-4.0, ...).")
    if exported.address:
        print(f"Pushed to {exported.address}")
    print(f"Try it:  xlstm-lm generate --model {shlex.quote(str(exported.folder))} --prompt 'def '")


def _import(options: argparse.Namespace) -> None:
    from xlstm_lm.hub import import_run

    console.stage(f"importing {options.source}")
    recipe = shlex.quote(str(import_run(options.source, options.out, options.tokenizer)))
    console.end_stage()
    out = shlex.quote(options.out)
    print(f"Wrote {out}. Train it on:  xlstm-lm train --config RECIPE --config {recipe} --training.run_dir {out}")


def _tokenizer(options: argparse.Namespace) -> None:
    from xlstm_lm.data import train_bpe

    console.stage("training the tokenizer")
    out = train_bpe(options.files, vocab_size=options.vocab_size, out=options.out)
    console.end_stage()
    print(f"Wrote {out}. Use it:  --data.tokenizer.kind huggingface --data.tokenizer.name {shlex.quote(str(out))}")


def _checkpoint(options: argparse.Namespace) -> None:
    from xlstm_lm.base.paths import user_path
    from xlstm_lm.runs.checkpoint_list import list_checkpoints, merge, table

    run_dir = user_path(options.run_dir)
    if (options.merge is None) != (options.out is None):
        raise ValueError("--merge STEP and --out FILE belong together: give both, or neither.")
    console.stage("reading checkpoints")
    if options.merge is not None:
        out = merge(run_dir, options.merge, user_path(options.out))
        console.end_stage()
        print(f"Wrote the weights of step {options.merge} to {shlex.quote(str(out))}.")
        return
    listed = list_checkpoints(run_dir, options.verify)
    console.end_stage()
    print(table(listed, options.verify))
    damaged = [each.step for each in listed if each.damage]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(listed)} checkpoints are damaged: of step {', '.join(map(str, damaged))}."
        )


def _doctor(options: argparse.Namespace) -> None:
    from xlstm_lm.doctor import main

    console.end_stage()
    main(options.types)
