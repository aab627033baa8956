"""``coin choose``: the cheapest stand-in of a finished experiment that meets a user's limits."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parse
from coin.reporting.choice import choose
from coin.reporting.tables import print_table, standin_table


def main(arguments: Sequence[str]) -> None:
    """Choose, and print the stand-ins that meet the wishes and the reason."""
    parser = command_parser("choose")
    parser.add_function_arguments(choose, as_positional=True)
    options = parser.instantiate(parse(parser, arguments))
    rows, sentence = choose(**options.as_dict())
    if len(rows):
        print_table(standin_table(rows))
    print(sentence)
