"""The parser of the commands that are plain functions: YAML files, dotted overrides, ``--print_config``."""

from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser, Namespace

from coin.commands import COMMANDS, FUNCTIONS
from coin.commands.arguments import apply_common_options
from coin.errors import ConfigurationError


def command_parser(name: str) -> ArgumentParser:
    """Return a parser of ``coin NAME`` to which the command adds its options."""
    parser = ArgumentParser(
        prog=f"coin {name}", description=COMMANDS[name], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "-c",
        "--config",
        action="config",
        help="A YAML file of options, or the name of one that comes with coin; several stack.",
    )
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Return a command's options as they are given; the parser's ``instantiate`` makes their objects."""
    options = parser.parse_args(apply_common_options(arguments))
    del options["config"]
    for section in parser.groups or ():
        if options.get(section, "") is None:
            raise ConfigurationError(
                f"found no options in {section}, expected 'option: value' lines; or leave it out"
            )
    return options


def run_function(command: str, arguments: Sequence[str]) -> None:
    """Run a command that is one function, and print what it returns: files, or an address."""
    module, _, name = FUNCTIONS[command].rpartition(".")
    function = getattr(import_module(module), name)
    parser = command_parser(command)
    parser.add_function_arguments(function, as_positional=command != "merge")
    options = parser.instantiate(parse(parser, arguments))
    made = function(**options.as_dict())
    if made is not None:
        print(*(made if isinstance(made, list) else [made]), sep="\n")
