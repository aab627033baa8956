"""What a command is that needs no model, no data and no Trainer from the command line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from coin.experiment import Experiment

_OF_RUN = ("config", "json", "launch", "only")
"""Options of ``coin run`` that are no experiment's."""


@dataclass(frozen=True)
class Call:
    """One call of a command.

    Args:
        options: Its options, instantiated.
        parsed: The same as they were parsed.
        run_parser: The parser of ``coin run``.
    """

    options: dict[str, Any]
    parsed: Namespace
    run_parser: LightningArgumentParser

    def experiment(self, arguments: Sequence[str]) -> Experiment:
        """Return the experiment that ``coin run`` makes of arguments."""
        parser = self.run_parser
        options = parser.instantiate_classes(parser.parse_args(list(arguments))).as_dict()
        return Experiment(**{name: value for name, value in options.items() if name not in _OF_RUN})

    def repeat_of(self, seed: int) -> str:
        """Return the YAML with which ``coin run`` repeats one seed of the experiment that it is called for."""
        config = self.parsed.clone()
        config["seeds"] = [seed]
        for name in _OF_RUN:
            config.pop(name, None)
        return str(self.run_parser.dump(config, skip_none=False))


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        summary: What it does, in one line.
        add_arguments: Gives a parser its options.
        execute: Does it, and prints what has come of it.
    """

    summary: str
    add_arguments: Callable[[LightningArgumentParser], None]
    execute: Callable[[Call], None]


def console() -> Console:
    """Return a console for results: as wide as the terminal, or 100 columns where nobody watches."""
    return Console(width=None if sys.stdout.isatty() else 100)


def add_json_argument(parser: LightningArgumentParser) -> None:
    """Let a command print its summary for a machine."""
    parser.add_argument(
        "--json", action="store_true", help="Print the summary as one JSON document, and nothing else, on stdout."
    )
