"""argparse with exact flags, and messages that name the flag that was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from xlstm_lm.base import console


class Parser(argparse.ArgumentParser):
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
