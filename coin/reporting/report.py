"""One self-contained HTML file from the files of experiments or sweeps, and its figures as PNG and SVG."""

import os
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from coin.files.atomic import atomic_path, write_text
from coin.progress import progress
from coin.reporting import details, figures, markup, sections, tables
from coin.reporting.canvas import WIDTH, as_element, as_png, as_svg, settle
from coin.reporting.findings import findings
from coin.reporting.gallery import example_images
from coin.reporting.sources import Source, by_folder, read_sources
from coin.reporting.summary import summarise

REPORT_HTML = "report.html"
PLOTS = "plots"
_TEMPLATE = Path(__file__).with_name("report_template.html")
_LEGIBLE = 72
"""Pixels per inch at which a wide figure can still be read; a narrower screen scrolls."""
_FINDINGS = 12
"""More findings' lists than this hide behind one line."""


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` and ``*.svg`` from the files of experiments alone.

    The page needs no network and no second file. Optional files of a seed (`layers.csv`, `examples.npz`) get their
    sections where they exist.

    Args:
        folders: Experiments (``runs/NAME``), single seeds (``runs/NAME/seed-0``), sweeps, or several to compare.
        output: The HTML file, or a folder for ``report.html``. By default the one folder that is reported, or the
            nearest folder above all of them.

    Returns:
        The path of the HTML file; the plots are in ``plots`` beside it.

    Raises:
        FileError: A folder holds no results, a file is damaged, or the report cannot be written.
    """
    sources = read_sources([Path(folder) for folder in folders])
    parts = by_folder(sources)
    path = _output(sources, output)
    frame = pd.concat([source.frame for source in sources], ignore_index=True)
    summary = summarise(frame)
    drawn = _Drawn(path.parent / PLOTS)
    whole = [source for source in sources if not source.is_point]
    across = "Across experiments" if len(whole) > 1 else "With more calibration samples"
    compared = summary[summary["experiment"].isin([source.name for source in whole])]
    with progress("drawing the report", total=None):
        body = "\n".join(
            [
                markup.section("What was run", sections.facts(parts)),
                markup.section("Experts", tables.experts_table(summary)),
                markup.section(across, drawn.all(figures.comparing(compared, len(whole)))),
                *(_sweep(sources, summary, drawn) for sources in parts if sources[0].is_point),
                markup.section("Normalised decoding accuracy", _nda(parts, compared, summary)),
                markup.section("What the numbers say", _findings(frame)),
                *(_experiment(source, summary, drawn, alone=len(sources) == 1) for source in whole),
                markup.section("How to reproduce", sections.reproduce(parts)),
            ]
        )
    html = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(_title(parts)), body=body)
    write_text(path, html)
    return path


def report_summary(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the summary of what `write_report` would report, as `coin.reporting.summarise` returns it.

    Raises:
        FileError: A folder holds no results, or a file is damaged.
    """
    sources = read_sources([Path(folder) for folder in folders])
    return summarise(pd.concat([source.frame for source in sources], ignore_index=True))


class _Drawn:
    """Writes each figure as PNG and SVG and returns it as HTML."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def all(self, items: Iterator[figures.Plot]) -> str:
        return markup.figures([self._one(item) for item in items])

    def _one(self, item: figures.Plot) -> str:
        self._count += 1
        settle(item.figure)
        svg = as_svg(item.figure)
        path = self.folder / _slug(item.name)
        with atomic_path(path.with_name(f"{path.name}.png")) as temporary:
            temporary.write_bytes(as_png(item.figure))
        write_text(path.with_name(f"{path.name}.svg"), svg)
        width = item.figure.get_size_inches()[0]
        element = as_element(svg, f"f{self._count}", escape(item.caption))
        return markup.figure(element, item.caption, width * _LEGIBLE if width > WIDTH else None)


def _title(parts: Sequence[Sequence[Source]]) -> str:
    if len(parts) > 1:
        return f"coin: {len(parts)} experiments compared"
    source = parts[0][0]
    return f"coin: {source.name}" if source.sweep is None else f"coin: sweep {source.sweep.name}"


def _output(sources: Sequence[Source], output: Path | None) -> Path:
    if output is not None:
        return output if output.suffix == ".html" else output / REPORT_HTML
    folders = [source.folder.resolve() for source in sources]
    return Path(os.path.commonpath(folders)) / REPORT_HTML


def _nda(parts: Sequence[Sequence[Source]], compared: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Return the tables of NDA: one per experiment, one for all points of a sweep."""
    out = [tables.nda_tables(compared)]
    for sources in parts:
        if sources[0].is_point:
            options = {source.name: source.group.options for source in sources if source.group is not None}
            own = summary[summary["experiment"].isin(list(options))]
            out.append(tables.sweep_table(own, options))
    return "".join(out) + f'<p class="soft">{tables.NOTE}</p>'


def _findings(frame: pd.DataFrame) -> str:
    found = findings(frame)
    if len(found) == 1:
        return sections.findings_list(next(iter(found.values())))
    few = len(found) <= _FINDINGS
    several = len({experiment for experiment, _, _ in found}) > 1
    first = next(iter(found))[:2]
    methods = frame[frame["experiment"] == first[0]].groupby("samples_per_task")["method"].nunique()
    fullest = methods[methods == methods.max()].index.max()  # a method may have a P of its own
    body = "".join(
        markup.folded(
            f"{f'{experiment}: ' if several else ''}{erased} lost, P = {samples}",
            sections.findings_list(items),
            opened=few and (experiment, erased, samples) == (*first, fullest),
        )
        for (experiment, erased, samples), items in found.items()
    )
    return body if few else markup.folded(f"{len(found)} lists, one for each experiment, loss and P", body)


def _sweep(sources: Sequence[Source], summary: pd.DataFrame, drawn: _Drawn) -> str:
    """Return the figures of a sweep over more than P and seeds: NDA against each option."""
    sweep = sources[0].sweep
    assert sweep is not None
    options = {source.name: source.group.options for source in sources if source.group is not None}
    drawing = drawn.all(figures.against_options(summary, sweep, options))
    note = f'<p class="soft">Every point has a report of its own in its folder in {escape(str(sources[0].folder))}.</p>'
    return markup.section(f"Sweep {sweep.name}", drawing + note)


def _experiment(source: Source, summary: pd.DataFrame, drawn: _Drawn, *, alone: bool) -> str:
    """Return one experiment's figures, confusions, layers and examples."""
    own = summary[summary["experiment"] == source.name]
    prefix = "" if alone else f"{source.name}-"
    examples = "" if source.examples is None else example_images(source.examples)
    parts = [
        markup.section("NDA, cost and residual", drawn.all(figures.accuracies(own, prefix))),
        markup.section("Expert's answer against decoded answer", _confusions(source, drawn, prefix)),
        markup.section("What the methods chose", sections.choices(source)),
        markup.section("Layer by layer", drawn.all(figures.layers(source, prefix))),
        markup.section("Examples", examples),
    ]
    body = "\n".join(part for part in parts if part)
    return body if alone else markup.folded(f"Experiment {source.name}: figures", body)


def _confusions(source: Source, drawn: _Drawn, prefix: str) -> str:
    """Return the confusions of every task; those of the first decoder are open.

    Decoders with options are left to ``confusion.npz``, but for the one that examples are of.
    """
    decoders = list(dict.fromkeys(decoder for decoder, _ in source.confusions))
    examined = source.examples.decoder if source.examples is not None else ""
    shown = [decoder for decoder in decoders if "-" not in decoder or decoder == examined] or decoders[:1]

    def of(decoder: str) -> Iterator[figures.Plot]:
        for (own, task), counts in source.confusions.items():
            if own == decoder:
                yield figures.Plot(
                    f"{prefix}confusion_{decoder}_{task}",
                    details.confusion_matrices(counts),
                    f"Task {task} lost, {decoder} decoder, all seeds. A perfect decoder fills the diagonal.",
                )

    rest = len(decoders) - len(shown)
    note = f'<p class="soft">The counts of {rest} more decoders are in confusion.npz of each seed.</p>' if rest else ""
    return note + "".join(
        markup.folded(f"{decoder} decoder", drawn.all(of(decoder)), opened=i == 0) for i, decoder in enumerate(shown)
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower() or "plot"
