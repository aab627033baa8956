"""The commands that are one function: ``coin merge``, ``compress``, ``export`` and ``dashboard``."""

from collections.abc import Sequence
from importlib import import_module

from coin.commands import FUNCTIONS
from coin.commands.parser import command_parser, parsed


def main(arguments: Sequence[str]) -> None:
    """Run a command, whose name ``arguments`` begin with, and print what it returns: a file, or an address."""
    command, *options = arguments
    module, _, name = FUNCTIONS[command].rpartition(".")
    function = getattr(import_module(module), name)
    parser = command_parser(command)
    parser.add_function_arguments(function, as_positional=command != "merge")
    given = parsed(parser, options)
    made = function(**given)
    if command == "merge":
        from coin.commands.closing import after_merge

        print(after_merge(made, given["experts"], options))
    else:
        print(made)
