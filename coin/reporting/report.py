"""One self-contained HTML page of an experiment, from its files alone: what to keep, one table, the figure, options."""

import base64
import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]
from jinja2 import Environment, FileSystemLoader

from coin.files.atomic import atomic_path, write_text
from coin.reporting.choice import choose_from, shortlist, undominated
from coin.reporting.figures import as_png, nda_against_memory
from coin.reporting.results import read_document
from coin.reporting.standins import standins
from coin.reporting.summary import read_run
from coin.reporting.tables import BEST, LEGEND, experts_line, standin_table

REPORT_HTML = "report.html"
PLOT = "plots/nda_against_memory.png"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of an experiment alone, and return the page's path.

    The page needs no network and no second file. Raises FileError where the folder holds no results, or a file is
    damaged.

    Args:
        folder: An experiment (``runs/NAME``) or a single seed (``runs/NAME/seed-0``).
        output: The HTML file; by default ``report.html`` in `folder`.
    """
    path = output or folder / REPORT_HTML
    seeds, frame = read_run(folder)
    kept = standins(frame)
    document = read_document(seeds[0])
    configuration = dict(document["configuration"])
    network_mib = configuration.pop("network_mib", math.nan)  # measured, no option
    png = b""
    if len(kept):
        shown = shortlist(kept)
        figure = nda_against_memory(kept[shown], undominated(kept)[shown], network_mib)
        png = as_png(figure)
        with atomic_path(path.parent / PLOT) as temporary:
            temporary.write_bytes(png)

    versions = [f"{package} {version}" for package, version in document["versions"].items()]
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("report.html.jinja").render(
        name=str(frame["experiment"].iloc[0]),
        sentence=choose_from(kept)[1],
        experts=experts_line(frame),
        table=_html(standin_table(standins(frame, oracle=True))),
        legend=LEGEND,
        image=base64.b64encode(png).decode(),
        made=", ".join([document["date"], document["machine"], *versions]),
        options=yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True),
    )
    write_text(path, page)
    return path


def _html(table: pd.DataFrame) -> str:
    """Return a `standin_table` as HTML, in bold what is marked."""

    def weight(text: Any) -> str:
        return "font-weight: bold" if text.endswith(BEST) else ""

    styler = table.style.hide(axis="index").format(escape="html").map(weight, subset=["NDA"])
    return styler.set_uuid("standins").to_html()
