"""One self-contained HTML page from the files of an experiment or a sweep, and its figures as PNG files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from coin.files.atomic import atomic_path, write_text
from coin.reporting import figures, report_parts as parts
from coin.reporting.choice import choose, named_by_experiment, recommended, shortlist, weakness
from coin.reporting.headline import best_coded, cautions, differences, entries, entry_of, headline
from coin.reporting.report_parts import REPORT_HTML, Source, facts_of, read_source
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES, over_tasks, stand_ins, summarise
from coin.reporting.sweeps import Sweep, legend, sweep_text
from coin.reporting.tables import finding, nda_tables, stand_in_table

PLOTS = "plots"
_NDA = (
    "In %: accuracy of the decoded answer ÷ that of the lost expert itself, mean over the lost tasks, ± sample "
    "standard deviation over seeds. none: the survivors alone. The best is the best on the test sets."
)
_BESIDE = (
    "NDA: with the best decoder. Shaded: the largest mean of its column. oracle: Σβf itself. A pass is the forward "
    "pass of one sample, or its equivalent: merge made the coded model, decoder fitted the dearest decoder; the linear "
    "one costs nothing."
)
_MEMORY = (
    "NDA against what is kept beyond the experts' servers. Up and left is better; the line joins those that no smaller "
    "one equals. Each method's best decoder is named. none: the survivors alone; replica: the expert, compressed."
)
_PAIRED = (
    "In points of NDA, every method with its best decoder, paired by seed, ± standard deviation over seeds. Shaded: "
    "what a t-test at 5 % tells from zero, not corrected for the number of comparisons."
)
_KEEP = (
    "Kept beyond the experts' own servers: memory, as stored; resident, the weights that answering processes hold. "
    "Forwards: networks run for one lost answer. Lost: how many experts may be lost at once. Shaded: no other is as "
    "good in NDA and all of these. none: the survivors alone."
)
_CHOSEN = "Chosen on calibration data, or how a solve ended; several values: seeds or rows of the code differ."


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of an experiment alone, and return the page's path.

    The page needs no network and no second file. Raises FileError where the folder holds no results, a file is damaged,
    results are of other experts than those there, or the report cannot be written.

    Args:
        folder: An experiment (``runs/NAME``), a single seed (``runs/NAME/seed-0``) or a sweep.
        output: The HTML file, or a folder for ``report.html``; by default `folder`.
    """
    source = read_source(Path(folder))
    path = output or source.folder
    page = _Page(path if path.suffix == ".html" and output else path / REPORT_HTML, source)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    write_text(page.path, templates.get_template("report.html.jinja").render(references=REFERENCES, **page.content()))
    return page.path


def report_summary(folder: Path) -> pd.DataFrame:
    """Return the summary of what `write_report` would report, as `coin.reporting.summarise` returns it."""
    return summarise(read_source(Path(folder)).frame)


class _Page:
    """What the template shows; figures are written as they are drawn."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.summary = summarise(source.frame)

    def content(self) -> dict[str, Any]:
        """Return what the template shows: the finding first, then what lies behind it."""
        source, facts = self.source, facts_of(self.source)
        sweep = source.sweep if source.sweep and len(source.sweep.options) > 1 else None
        content = self._of_sweep(sweep) if sweep else self._of_experiment()
        name = f"sweep {source.sweep.name}" if source.sweep else source.frame["experiment"].iloc[0]
        content["sections"]["Experts"].insert(0, {"tables": [("", parts.experts_table(self.summary))]})
        content["sections"]["How to reproduce"] = [
            {"tables": [("", pd.DataFrame(facts.items(), columns=["", "configuration"]))], "prose": True},
            {"command": parts.command(source, self.path)},
        ]
        said = (facts.get(fact, "") for fact in ("tasks", "network", "date", "machine"))
        subtitle = " · ".join([*filter(None, said), f"seeds {facts['seeds']}"])
        sections = {title: section for title, section in content.pop("sections").items() if section}
        return {"title": f"coin: {name}", "subtitle": subtitle, "sections": sections, **content}

    def _of_experiment(self) -> dict[str, Any]:
        source, frame, kept = self.source, self.source.frame, stand_ins(self.summary)
        kinds = {str(made.get("label")): str(made["method"]) for made in source.made if "method" in made}
        found = entries(frame, kinds)
        told = headline(found, frame["task"].nunique())
        if len(kept):
            row = recommended(kept)
            entry = entry_of(frame, kinds, row["name"], row["decoder"])
            told = headline(found, frame["task"].nunique(), entry)
            if found_weak := weakness(row):
                told = f"Nothing can be recommended: {found_weak}."
        opening: dict[str, Any] = {}
        if (kept["memory_mib"] > 0).any():
            size = float(source.first["configuration"].get("network_mib") or "nan")
            opening = self._draw("nda_against_memory", figures.nda_against_memory(kept, size), _MEMORY)
        keep = _what_to_keep(kept, source.folder, "methods and decoders")
        examples, tasks, chosen = [], [], []
        if best := best_coded(found):
            if images := list(parts.example_images(source, best)):
                examples = [{"text": f"Decoded with {best.decoder}.", "examples": images}]
            tasks = [{"tables": list(parts.by_task(self.summary, source, best.decoder))}]
        tables = [(f"{erased} lost", table) for erased, table in nda_tables(self.summary).items()]
        phone = ["method", "P", "NDA", "decoder"]
        methods: list[dict[str, Any]] = [{"tables": tables, "text": f"{_NDA} {_BESIDE}", "phone": phone}]
        if len(paired := differences(found)):
            methods.append({"tables": [("Differences over seeds", paired)], "text": _PAIRED})
        if len(made := parts.choices(source)):
            chosen = [{"title": "What was chosen", "tables": [("", made)], "text": _CHOSEN, "prose": True}]
        return {
            "headline": told,
            "cautions": cautions(frame),
            "opening": opening,
            "sections": {
                "What to keep": keep,
                "Examples": examples,
                "Methods and decoders": methods,
                "Task by task": tasks,
                "Experts": chosen,
            },
        }

    def _of_sweep(self, sweep: Sweep) -> dict[str, Any]:
        """Return what is recommended of a sweep, its table, and a figure for each option."""
        means = over_tasks(self.summary)
        means = means[(means["method"] != REFERENCES[1]) & means["nda_mean"].notna()]
        kept = named_by_experiment(stand_ins(self.summary))
        told = f"{len(sweep.options)} experiments. {finding(kept) if len(kept) else ''}".strip()
        table = sweep_text(self.source.frame, pd.DataFrame.from_dict(dict(sweep.options), orient="index"))
        methods: list[dict[str, Any]] = [{"tables": [("", table)], "text": _NDA}]
        methods.append({"figures": list(self._options(sweep, means))})
        if len(long_values := legend(sweep)):
            methods.append({"title": "What numbers stand for", "tables": [("", long_values)], "prose": True})
        keep = _what_to_keep(kept, self.source.folder, "stand-ins")
        sections = {"What to keep": keep, "Methods and decoders": methods, "Experts": []}
        return {"headline": told, "cautions": [], "opening": {}, "sections": sections}

    def _options(self, sweep: Sweep, means: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """Draw NDA against every option of a sweep that varies."""
        names = [name for name, values in sweep.swept.items() if len(values) > 1 and len(means)]
        for name in names:
            of_each = {experiment: own[name] for experiment, own in sweep.options.items()}
            values = means["experiment"].map(of_each)
            numbers = pd.to_numeric(values, errors="coerce")
            plotted = values if numbers.isna().any() else numbers
            others = ", ".join(other for other in names if other != name)
            caption = f"NDA against {name}, mean ± spread over seeds{f'; mean over {others}' if others else ''}."
            figure = figures.nda_against_option(means, name, plotted, joined=len(names) == 1)
            yield self._draw(f"nda_against_{name}", figure, caption)

    def _draw(self, name: str, figure: Figure, caption: str) -> dict[str, Any]:
        png = as_png(figure)
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower() or "plot"
        with atomic_path(self.path.parent / PLOTS / f"{slug}.png") as temporary:
            temporary.write_bytes(png)
        return {"image": parts.data_url("image/png", png), "caption": caption}


def _what_to_keep(kept: pd.DataFrame, folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the section of what `choose` says of stand-ins, and their table; `kind` is what all of them are called."""
    if kept.empty:
        return []
    shown = shortlist(kept)
    lead = f"{choose(folder)[1]} For other limits: coin choose."
    more = None if shown.all() else (f"All {len(kept)} {kind}", stand_in_table(kept))
    phone = ["method", "decoder", "NDA", "memory MiB"]
    first = [("", stand_in_table(kept[shown]))]
    return [{"lead": lead, "tables": first, "more": more, "text": _KEEP, "phone": phone}]
