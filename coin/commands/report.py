"""``coin report``: the report of a finished experiment, from its files alone."""

from collections.abc import Sequence
from pathlib import Path

from coin.commands.parser import add_json_argument, command_parser, parsed


def main(arguments: Sequence[str]) -> None:
    """Write a report, and print its path."""
    parser = command_parser("report")
    parser.add_argument("folder", type=str, help="An experiment's, a seed's or a sweep's folder.")
    parser.add_argument("--output", type=str | None, default=None, help="The HTML file to write.")
    add_json_argument(parser)
    options = parsed(parser, arguments)
    from coin.reporting.report import report_summary, write_report  # import pandas and matplotlib
    from coin.reporting.results import as_json

    folder = Path(options["folder"])
    page = write_report(folder, None if options["output"] is None else Path(options["output"]))
    print(as_json({"report": page, "summary": report_summary(folder)}) if options["json"] else page)
