"""One self-contained HTML file from the files of one or several experiments, and its figures as PNG."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import pandas as pd
from matplotlib.figure import Figure

from coin.reporting import details, plots, sections
from coin.reporting.canvas import as_png, as_svg, settle
from coin.reporting.comparison import REFERENCES
from coin.reporting.findings import findings
from coin.reporting.sources import Source, read_sources
from coin.reporting.summary import summarise
from coin.state import atomic_path, write_text

REPORT_HTML = "report.html"
PLOTS = "plots"
_TEMPLATE = Path(__file__).with_name("report_template.html")
_CONFUSION_PANELS = 9


@dataclass(frozen=True)
class _Plot:
    """A figure, the name of its PNG file and what stands below it."""

    name: str
    figure: Figure
    caption: str


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of experiments alone.

    The page needs no network and no second file. Optional files of a seed (`layers.csv`, `examples.npz`) get their
    sections where they exist.

    Args:
        folders: Experiments (``runs/NAME``), single seeds (``runs/NAME/seed-0``), or several to compare.
        output: The HTML file, or a folder for ``report.html``. By default the one folder that is reported, or the
            nearest folder above all of them.

    Returns:
        The path of the HTML file; the plots are in ``plots`` beside it.

    Raises:
        FileError: A folder holds no results, a file is damaged, or the report cannot be written.
    """
    sources = read_sources([Path(folder) for folder in folders])
    path = _output(sources, output)
    frame = pd.concat([source.frame for source in sources], ignore_index=True)
    summary = summarise(frame)
    title = f"coin: {sources[0].name}" if len(sources) == 1 else f"coin: {len(sources)} experiments compared"
    drawn = _Drawn(path.parent / PLOTS)
    body = "\n".join(
        [
            sections.section("What was run", sections.lede(sources)),
            sections.section("Normalised decoding accuracy", sections.nda_tables(summary)),
            sections.section("What the numbers say", _findings(frame)),
            sections.section("Across experiments", drawn.all(_comparing(summary, sources))),
            sections.section("Experts", sections.experts_table(summary)),
            *(_experiment(source, summary, drawn, alone=len(sources) == 1) for source in sources),
            sections.section("How to reproduce", sections.reproduce(sources)),
        ]
    )
    html = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body=body)
    write_text(path, html)
    return path


class _Drawn:
    """Writes each figure as PNG and returns it as HTML."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def all(self, items: Iterator[_Plot]) -> str:
        return sections.figures(self._one(item) for item in items)

    def _one(self, item: _Plot) -> str:
        self._count += 1
        settle(item.figure)
        with atomic_path(self.folder / f"{_slug(item.name)}.png") as temporary:
            temporary.write_bytes(as_png(item.figure))
        svg = as_svg(item.figure, f"f{self._count}", escape(item.caption))
        return sections.figure(svg, item.caption)


def _output(sources: Sequence[Source], output: Path | None) -> Path:
    if output is not None:
        return output if output.suffix == ".html" else output / REPORT_HTML
    folders = [source.folder.resolve() for source in sources]
    return Path(os.path.commonpath(folders)) / REPORT_HTML


def _findings(frame: pd.DataFrame) -> str:
    found = findings(frame)
    if len(found) == 1:
        return sections.findings_list(next(iter(found.values())))
    return "".join(
        sections.folded(f"{experiment}: {erased} lost, P = {samples}", sections.findings_list(items), opened=i == 0)
        for i, ((experiment, erased, samples), items) in enumerate(found.items())
    )


def _comparing(summary: pd.DataFrame, sources: Sequence[Source]) -> Iterator[_Plot]:
    """Draw what several experiments, or several P, have to say together."""
    means = _means(summary)
    if len(sources) > 1 and not means.empty:
        yield _Plot(
            "nda_by_experiment",
            plots.nda_by_experiment(_largest_samples(means)),
            "NDA by method and experiment, each task lost in turn; dotted: the paper's 97.5 %.",
        )
    if means["samples_per_task"].nunique() > 1 and not means["method"].isin(REFERENCES).all():
        yield _Plot(
            "nda_against_samples",
            plots.nda_against_samples(means),
            "NDA against the number of calibration samples per task, mean ± spread over seeds.",
        )


def _experiment(source: Source, summary: pd.DataFrame, drawn: _Drawn, *, alone: bool) -> str:
    """Return one experiment's figures, confusions, layers and examples."""
    own = summary[summary["experiment"] == source.name]
    prefix = "" if alone else f"{source.name}-"
    parts = [
        sections.section("NDA, cost and residual", drawn.all(_accuracies(own, prefix))),
        sections.section("Expert's answer against decoded answer", _confusions(source, drawn, prefix)),
        sections.section("Layer by layer", drawn.all(_layers(source, prefix))),
        sections.section("Examples", "" if source.examples is None else sections.example_images(source.examples)),
    ]
    body = "\n".join(part for part in parts if part)
    return body if alone else sections.folded(f"Experiment {source.name}: figures", body)


def _accuracies(summary: pd.DataFrame, prefix: str) -> Iterator[_Plot]:
    means = _means(summary)
    if means.empty or means["method"].isin(REFERENCES).all():
        return
    means = _largest_samples(means)
    samples = int(means["samples_per_task"].iloc[0])
    yield _Plot(
        f"{prefix}nda_by_method",
        plots.nda_by_method(means),
        f"NDA by method and decoder, P = {samples}; dotted: the paper's 97.5 %.",
    )
    yield _Plot(
        f"{prefix}nda_against_cost",
        plots.nda_against_cost(means),
        f"NDA against the time it takes to make the coded model, P = {samples}. Up and to the left is better.",
    )
    if means.loc[~means["method"].isin(REFERENCES), "residual_mean"].notna().any():
        yield _Plot(
            f"{prefix}nda_against_residual",
            plots.nda_against_residual(means),
            "NDA against the residual. Where a decoder is fitted, a large residual need not cost accuracy.",
        )
    tasks = summary[(summary["task"] != "mean") & (summary["erased"] == summary["task"])]
    yield _Plot(
        f"{prefix}nda_per_task",
        plots.nda_per_task(_largest_samples(tasks)),
        f"NDA of each task when it is lost, P = {samples}.",
    )


def _confusions(source: Source, drawn: _Drawn, prefix: str) -> str:
    """Return the confusions of every task; those of the first decoder are open."""
    decoders = list(dict.fromkeys(decoder for decoder, _ in source.confusions))

    def of(decoder: str) -> Iterator[_Plot]:
        for (own, task), counts in source.confusions.items():
            if own == decoder:
                shown = dict(list(counts.items())[:_CONFUSION_PANELS])
                more = f" The first {len(shown)} of {len(counts)} methods." if len(shown) < len(counts) else ""
                yield _Plot(
                    f"{prefix}confusion_{decoder}_{task}",
                    details.confusion_matrices(shown),
                    f"Task {task} lost, {decoder} decoder, all seeds. A perfect decoder fills the diagonal.{more}",
                )

    return "".join(
        sections.folded(f"{decoder} decoder", drawn.all(of(decoder)), opened=i == 0)
        for i, decoder in enumerate(decoders)
    )


def _layers(source: Source, prefix: str) -> Iterator[_Plot]:
    if source.layers is not None:
        yield _Plot(
            f"{prefix}layers",
            details.layer_profile(source.layers),
            "Where the Fisher's mass lies and how far each merge is from its experts, from input to head.",
        )


def _means(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks, each lost alone."""
    return summary[(summary["task"] == "mean") & summary["erased"].str.startswith("1 of ")]


def _largest_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each experiment's rows at its largest P: one point per method."""
    return rows[rows["samples_per_task"] == rows.groupby("experiment")["samples_per_task"].transform("max")]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower() or "plot"
