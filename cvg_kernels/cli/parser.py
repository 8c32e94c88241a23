"""The argument parser of every command: errors in one line, which suggest the nearest name, and help with defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from cvg_kernels.errors import nearest


class Help(argparse.HelpFormatter):
    """Shows the default of an option behind its help, unless the help tells of it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        nothing = default is None or default is False or default in (argparse.SUPPRESS, "")
        return text if nothing or "default" in text else f"{text}; default: %(default)s"


class Commands(argparse._SubParsersAction):
    """The commands of a parser; what its list says of one stands above the help of that one, too."""

    def add_parser(self, name: str, **options: Any) -> Any:
        """Adds a command.

        Args:
            name: its name.
            **options: those of its parser; without a description of its own, `help` is it.
        """
        purpose = options.get("help", "")
        return super().add_parser(name, **{"description": f"{purpose[:1].upper()}{purpose[1:]}."} | options)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of the commands themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help} | options)
        self.register("action", "parsers", Commands)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses arguments, and ends with an error if one is unknown: the parser of a command knows what it takes.

        Args:
            args: arguments of the command line; `None` takes those of this process.
            namespace: where values go; `None` makes a new one.
        """
        found, unknown = super().parse_known_args(args, namespace)
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if options:  # the values of a misspelt option are left over as well, and need no word
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            self.error(f"option must be one of {', '.join(known)}, got {options[0]!r}{nearest(options[0], known)}")
        if unknown:
            self.error(f"no further argument is accepted, got {unknown[0]!r}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = list(map(str, action.choices))
        raise argparse.ArgumentError(
            action, f"must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names)}"
        )
