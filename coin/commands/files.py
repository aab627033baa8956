"""``coin merge``, ``compress`` and ``export``: functions of `coin.pipeline.steps` with files in and files out."""

from collections.abc import Sequence
from importlib import import_module

from coin.commands import ON_FILES
from coin.commands.parser import command_parser, parsed


def main(arguments: Sequence[str]) -> None:
    """Run a command, whose name ``arguments`` begin with, and print what was written."""
    name, *options = arguments
    function = getattr(import_module(f"coin.pipeline.steps.{name}"), ON_FILES[name])
    parser = command_parser(name)
    parser.add_function_arguments(function, as_positional=name != "merge")
    written = function(**parsed(parser, options))
    print(*(written if isinstance(written, list) else [written]), sep="\n")
