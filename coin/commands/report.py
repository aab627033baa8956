"""``coin report``: the report of a finished experiment, from its files alone."""

from collections.abc import Sequence
from pathlib import Path

from coin.commands.parser import add_json_argument, command_parser, parsed
from coin.reporting.report import report_summary, write_report
from coin.reporting.results import as_json


def main(arguments: Sequence[str]) -> None:
    """Write a report, and print its path."""
    parser = command_parser("report")
    parser.add_argument("folder", type=Path, help="An experiment's, a seed's or a sweep's folder.")
    parser.add_argument("--output", type=Path | None, default=None, help="The HTML file to write.")
    add_json_argument(parser)
    options = parsed(parser, arguments)
    page = write_report(options["folder"], options["output"])
    print(as_json({"report": page, "summary": report_summary(options["folder"])}) if options["json"] else page)
