"""``coin choose``: the cheapest stand-in of a finished experiment that meets a user's limits."""

from collections.abc import Sequence
from typing import Any

from coin.commands.parser import add_json_argument, command_parser, parsed


def main(arguments: Sequence[str]) -> None:
    """Choose, and print the stand-ins that meet the wishes and the reason."""
    from coin.reporting.choice import choose  # imports pandas

    parser = command_parser("choose")
    parser.add_function_arguments(choose, as_positional=True)
    add_json_argument(parser)
    options: dict[str, Any] = parsed(parser, arguments)
    as_document = options.pop("json")
    rows, sentence = choose(**options)
    from coin.reporting.results import as_json
    from coin.reporting.tables import choice_table, results_console, rich_table

    if as_document:
        print(as_json({"rows": rows, "sentence": sentence}))
        return
    if len(rows):
        results_console().print(rich_table(choice_table(rows), "what meets the limits", ["method", "decoder"]))
    print(sentence)
