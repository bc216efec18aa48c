"""The command line. Each command is a module with `add_flags` and `run`, listed in COMMANDS."""

from xlstm_lm.cli.command_line import COMMANDS, main, make_parser

__all__ = ["COMMANDS", "main", "make_parser"]
