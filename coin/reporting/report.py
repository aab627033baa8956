"""One self-contained HTML page of an experiment's tables and figures, from its files alone."""

import base64
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from coin.files.atomic import atomic_path, write_text
from coin.reporting.choice import choose_from, shortlist
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import as_json, read_document, read_promises
from coin.reporting.style import as_png
from coin.reporting.summary import (
    expert_accuracies,
    read_run,
    stand_ins,
    summarise,
    variant_names,
)
from coin.reporting.tables import nda_tables, promise_table, stand_in_table
from coin.reporting.text import percents

REPORT_HTML = "report.html"
PLOTS = "plots"
_NDA = (
    "In %: accuracy of the decoded answer ÷ that of the lost expert itself, mean over the lost tasks, ± sample "
    "standard deviation over seeds. none: the survivors alone; oracle: Σβf itself. Starred: the largest of its column."
)
_MEMORY = (
    "NDA against what is kept beyond the experts' servers. Up and left is better; the line joins those that no smaller "
    "one equals."
)
_KEEP = (
    "Every method's best decoder, and what no other beats (starred). Memory: as stored, beyond the experts' own "
    "servers; resident: the weights that answering processes hold. Forwards: networks run for one lost answer. Lost: "
    "how many experts may be lost at once."
)
_EXPERTS = "Accuracy on the test sets, in %."
_PROMISES = "In %: a share of so many answers is promised to be accepted, of which at most so many differ; and found."


@dataclass(frozen=True)
class Section:
    """A part of the page: tables by their titles, figures by their files' names, and a text that stands as it is."""

    title: str
    caption: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    text: str = ""


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of an experiment alone, and return the page's path.

    The page needs no network and no second file. Raises FileError where the folder holds no results, a file is damaged,
    or results are of other experts than those there.

    Args:
        folder: An experiment (``runs/NAME``) or a single seed (``runs/NAME/seed-0``).
        output: The HTML file, or a folder for ``report.html``; by default `folder`.
    """
    place = output or folder
    path = place if place.suffix == ".html" and output else place / REPORT_HTML
    seeds, frame = read_run(folder)
    summary = summarise(frame)
    name = str(frame["experiment"].iloc[0])
    sections = _sections(name, seeds, frame, summary)
    images = {}
    for section in sections:
        for plot, figure in section.figures.items():
            images[plot] = _draw(plot, figure, path.parent / PLOTS)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    template = templates.get_template("report.html.jinja")
    _, sentence = choose_from(stand_ins(summary))
    page = template.render(name=name, sentence=sentence, sections=sections, images=images)
    write_text(path, page)
    return path


def _sections(
    name: str, seeds: Sequence[Path], frame: pd.DataFrame, summary: pd.DataFrame
) -> list[Section]:
    """Return the sections of an experiment or of one seed, given its name, its seeds' folders and its rows."""
    document = read_document(seeds[0])
    configuration = document["configuration"]
    kept = stand_ins(summary)
    short = kept[shortlist(kept)]
    memory = nda_against_memory(kept, configuration.get("network_mib", math.nan))
    promises = [found for found in map(read_promises, seeds) if found is not None]
    promised = {"": promise_table(pd.concat(promises, ignore_index=True))} if promises else {}
    accuracies = {
        "Accuracy of the decoded answers": _by_task(summary, short, "decoded_accuracy"),
        "Agreement with the expert": _by_task(summary, short, "agreement"),
    }
    tables = {f"{erased} lost": table for erased, table in nda_tables(summary).items()}
    numbers = ",".join(map(str, sorted(set(frame["seed"]))))
    command = shlex.join(["coin", "run", "-c", f"{name}.yaml", f"--seeds=[{numbers}]"])
    versions = [f"{package} {version}" for package, version in document["versions"].items()]
    made = ", ".join([document["date"], document["machine"], *versions])
    options = _text_of(seeds[0] / "config.yaml") or as_json(configuration)
    return [
        Section("NDA against memory", _MEMORY, figures={"nda_against_memory": memory}),
        Section("Stand-ins", _KEEP, {"": stand_in_table(short)}),
        Section("NDA by method and decoder", _NDA, tables),
        Section("Task by task", "Of the stand-ins above, in %.", accuracies),
        Section("Experts", _EXPERTS, {"": _experts(summary)}),
        Section("Promises", _PROMISES, promised),
        Section("Configuration", made, text=f"{command}\n\n{options}"),
    ]


def _by_task(summary: pd.DataFrame, kept: pd.DataFrame, number: str) -> pd.DataFrame:
    """Return a line per stand-in and a column per task: mean ± spread of a number, each lost alone."""
    alone = summary[summary["erased"] == summary["task"]]
    texts = percents(alone[f"{number}_mean"], alone[f"{number}_std"])
    alone = alone.assign(method=variant_names(alone), text=texts)
    lines = ["method", "decoder"]
    table = alone.pivot_table(
        index=lines, columns="task", values="text", aggfunc="first", sort=False
    )
    shown = kept[["name", "decoder"]].rename(columns={"name": "method"})
    return shown.merge(table.reset_index(), on=lines)


def _experts(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the experts' own accuracies as text."""
    experts = expert_accuracies(summary)
    texts = percents(experts["mean"], experts["spread"])
    return experts.assign(accuracy=texts)[["task", "accuracy", "seeds"]].astype(str)


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _draw(name: str, figure: Figure, folder: Path) -> str:
    """Write a figure to a folder, and return it as an address within the page."""
    png = as_png(figure)
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower()
    with atomic_path(folder / f"{slug}.png") as temporary:
        temporary.write_bytes(png)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
