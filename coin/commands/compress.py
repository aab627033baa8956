"""``coin compress``: a network in, its packed delta from the shared initialisation out."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.pipeline.steps.compress import compress_network


def main(arguments: Sequence[str]) -> None:
    """Compress, and print the file that was written."""
    parser = command_parser("compress")
    parser.add_function_arguments(compress_network, as_positional=True)
    print(compress_network(**parsed(parser, arguments)))
