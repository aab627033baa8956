"""``coin export``: a network of Hugging Face's in, a folder that transformers loads out."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.pipeline.steps.export import export


def main(arguments: Sequence[str]) -> None:
    """Export, and print the folder that was written."""
    parser = command_parser("export")
    parser.add_function_arguments(export, as_positional=True)
    print(export(**parsed(parser, arguments)))
