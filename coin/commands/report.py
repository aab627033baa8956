"""``coin report``: the report of finished experiments, from their files alone."""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command, add_json_argument
from coin.reporting import as_json, write_report
from coin.reporting.report import report_summary


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=str, help="Experiments', seeds' or sweeps' folders.")
    parser.add_argument("--output", type=str | None, default=None, help="The HTML file to write.")
    add_json_argument(parser)


def _execute(call: Call) -> None:
    folders = [Path(folder) for folder in call.options["folders"]]
    output = call.options["output"]
    page = write_report(folders, None if output is None else Path(output))
    print(as_json({"report": page, "summary": report_summary(folders)}) if call.options["json"] else page)


REPORT = Command("Write the report of finished experiments.", _add_arguments, _execute)
