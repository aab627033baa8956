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
    from coin.reporting.tables import BEST, percent, results_console, rich_table, stand_in_table

    if as_document:
        print(as_json({"rows": rows, "sentence": sentence}))
        return
    if len(rows):
        worst = [percent(nda) + BEST * (place == 0) for place, nda in enumerate(rows["nda_worst"])]
        table = stand_in_table(rows).drop(columns="merge s").rename(columns={"NDA": "worst task"})
        results_console().print(
            rich_table(table.assign(**{"worst task": worst}), "what meets the limits", ["method", "decoder"])
        )
    print(sentence)
