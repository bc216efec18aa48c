"""Table of the commands, and the program that runs one of them.

Only the module of the command that is called is imported, which keeps `xlstm-lm --help` quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xlstm_lm import __version__
from xlstm_lm.base import console
from xlstm_lm.base.import_path import keep_current_folder_out
from xlstm_lm.base.program import program, warning_held_back
from xlstm_lm.cli.parser import Parser


@dataclass(frozen=True)
class Command:
    """One command of the program."""

    module: str
    """Module with `add_flags(parser)` and `run(options)`."""
    description: str
    """One sentence for `--help`."""
    imports_torch: bool = True
    """Whether it imports PyTorch, which lasts long enough to be shown as a stage."""
    handles_warning: bool = False
    """Whether it handles a scheduler's warning once it is at work, until when the warning waits."""


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "xlstm_lm.cli.train",
        "Train a model from recipes; the same command continues a run that was stopped.",
        handles_warning=True,
    ),
    "status": Command(
        "xlstm_lm.cli.status", "Print where runs stand, from the files of their folders.", imports_torch=False
    ),
    "generate": Command("xlstm_lm.cli.generate", "Continue a prompt with a trained model."),
    "export": Command(
        "xlstm_lm.cli.export", "Write a trained model for transformers, and check that transformers loads it."
    ),
    "import": Command("xlstm_lm.cli.import_model", "Make a run of a model from elsewhere, to train it on."),
    "tokenizer": Command(
        "xlstm_lm.cli.tokenizer", "Train a byte-level BPE tokenizer on text files.", imports_torch=False
    ),
    "tokenize": Command("xlstm_lm.cli.tokenize", "Write the documents of a recipe as token ids, with statistics."),
    "checkpoint": Command("xlstm_lm.cli.checkpoint", "List, verify or merge the checkpoints of a run."),
    "flops": Command(
        "xlstm_lm.cli.flops", "Print a model's parameters, FLOPs, state and traffic, part by part, without building it."
    ),
    "plan": Command(
        "xlstm_lm.cli.plan", "Print what a run needs on a number of GPUs: memory, traffic, hours and money."
    ),
    "doctor": Command("xlstm_lm.cli.doctor", "Versions, devices, kernels, and whether each computes what it should."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake ends it with code 2 and one message, a run that cannot continue with code 1."""
    keep_current_folder_out()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher puts its own flag before the command; the rank is in the environment as well.
    arguments = [each for each in arguments if not each.startswith("--local_rank=")]
    name = next(iter(arguments), "")
    command = COMMANDS.get(name)
    waiting = warning_held_back() if command and command.handles_warning else contextlib.nullcontext()
    with waiting, program(f"xlstm-lm {name}" if command else "xlstm-lm"):
        if command and command.imports_torch and not {"-h", "--help"} & set(arguments):
            console.stage("importing PyTorch")
        options = make_parser(name).parse_args(arguments)
        options.run(options)


def make_parser(called: str) -> Parser:
    """Build the parser of all commands, with the flags of the one that is called.

    Args:
        called: Name of the command that is called; any other text for none.
    """
    parser = Parser(prog="xlstm-lm", description="Train xLSTM language models, and use what was trained.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser: argparse.ArgumentParser = commands.add_parser(
            name, help=command.description, description=command.description
        )
        if name == called:
            module = importlib.import_module(command.module)
            module.add_flags(subparser)
            subparser.set_defaults(run=module.run)
    return parser
