"""One self-contained HTML page from the files of experiments or sweeps, and its figures as PNG files."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from coin.core.progress import progress
from coin.files.atomic import atomic_path, write_text
from coin.reporting import detail_figures, figures, report_parts as parts
from coin.reporting.extras import read_layers
from coin.reporting.findings import Findings, findings, paired_differences
from coin.reporting.report_parts import REPORT_HTML, Titled
from coin.reporting.sources import ReportSource, facts_of, read_sources
from coin.reporting.style import WIDTH, as_png
from coin.reporting.summary import REFERENCES, decoders_of, largest_samples, over_tasks, shortlist, stand_ins, summarise
from coin.reporting.sweeps import as_numbers, sweep_text
from coin.reporting.tables import nda_tables, stand_in_table

PLOTS = "plots"
_NDA = (
    "In %: accuracy of the decoded answer ÷ that of the lost expert itself, mean over the lost tasks, ± sample "
    "standard deviation over seeds. Shaded: the largest mean of its decoder. none: the survivors alone; oracle: Σβf "
    "itself. A pass is the forward pass of one sample, or its equivalent: merge made the coded model, decoder fitted "
    "the dearest decoder; the linear one costs nothing. The best is the best on the test sets."
)
_COST = (
    "NDA against cost: up and left is better. Blue and green: closed forms; orange and red: trained; dashed, if drawn: "
    "the survivors alone, without a coded model; dotted: the paper's 97.5 %."
)
_KEPT = (
    "NDA of everything that may stand in for a lost expert against what it keeps. Up and left is better. The line joins"
    " those that no smaller one equals; they and each method's best decoder are named. Round: one network runs for a"
    " lost answer; replica: the lost expert's own weights, compressed."
)
_LAYERS = (
    "Above, where the Fisher's mass lies. Below, how far each merge is from the average of the experts (1: as far as "
    "the experts are). Methods with the same numbers are drawn once. Blank: the experts agree."
)
_RISK = (
    "Left: how often decoded answers differ from the expert's, against the risk that was estimated for them without "
    "labels, in bins of 5 %. Dashed: as predicted. Right: their accuracy, and the expert's own (dotted), on the "
    "answers of least risk. All tasks and seeds."
)
_PAIRED = (
    "Paired by seed, ± standard deviation over seeds. Bold, and among the findings: what a 95 % confidence interval "
    "(t-test, three seeds or more, not corrected for the number of comparisons) tells from zero."
)
_KEEP = (
    "Whatever may answer for a lost expert, by what must be kept beyond the experts' own servers. Forwards: networks "
    "run for one lost answer. Losses: the most experts that may be lost at once. Merge: what made it, in seconds. "
    "Shaded: no other is as good in NDA, memory, forwards and losses. Of every method its best decoder is shown."
)
_CHOSEN = "Chosen on calibration data, or how a solve ended; several values: seeds or rows of the code differ."


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of experiments alone, and return the page's path.

    The page needs no network and no second file. Optional files of a seed (``layers.csv``, ``examples.npz``, the
    experts' logs) get their sections where they exist. Raises FileError where a folder holds no results, a file is
    damaged, or the report cannot be written.

    Args:
        folders: Experiments (``runs/NAME``), single seeds (``runs/NAME/seed-0``), sweeps, or several to compare.
        output: The HTML file, or a folder for ``report.html``; by default the nearest folder above all `folders`.
    """
    sources = read_sources([Path(folder) for folder in folders])
    path = output or Path(os.path.commonpath([source.folder.resolve() for source in sources]))
    page = _Page(path if path.suffix == ".html" and output else path / REPORT_HTML, sources)
    with progress("drawing the report", total=None):
        content = page.content()
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    write_text(page.path, templates.get_template("report.html.jinja").render(references=REFERENCES, **content))
    return page.path


def report_summary(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the summary of what `write_report` would report, as `coin.reporting.summarise` returns it."""
    return summarise(pd.concat([each.frame for each in read_sources([Path(f) for f in folders])], ignore_index=True))


class _Page:
    """Collects what the template shows; figures are written as they are drawn."""

    def __init__(self, path: Path, sources: Sequence[ReportSource]) -> None:
        self.path, self.sources = path, sources
        self.frame = pd.concat([source.frame for source in sources], ignore_index=True)
        self.summary = summarise(self.frame)
        self.means = over_tasks(self.summary)
        self.has_methods = not self.means["method"].isin(REFERENCES).all()
        self.found = {
            str(name): findings(part, kinds=source.kinds)
            for source in sources
            for name, part in source.frame.groupby("experiment", sort=False)
        }

    def content(self) -> dict[str, Any]:
        """Return what the template wants: the finding first, then what lies behind it."""
        source, several = self.sources[0], len(self.found) > 1
        best, found = max(self.found.items(), key=lambda each: each[1].best.nda.mean() if each[1].best else -1.0)
        facts = [facts_of(each) for each in self.sources]
        cautions: dict[str, list[str]] = {}
        for name, each in self.found.items():
            for text in each.cautions:
                cautions.setdefault(text, []).append(name)
        # NDA of other tasks or another network is another quantity: there is no best of such experiments.
        alike = len({(each.get("tasks"), each.get("network")) for each in facts}) == 1 and found.best is not None
        headline, roles = found.headline, found.roles
        if several and alike:
            headline = f"The best of {len(self.found)} experiments is {best}. {headline}"
        elif several:
            headline, roles = f"{len(self.found)} experiments; what each of them says stands under Findings.", {}
        configuration = pd.DataFrame(facts, index=[each.name for each in self.sources]).T.fillna("–")
        described: list[dict[str, Any]] = [
            {"title": "Configuration", "tables": [("", configuration.reset_index(names=""))], "prose": True},
            {"commands": [parts.command(each, self.path, alone=len(self.sources) == 1) for each in self.sources]},
        ]
        sections: dict[str, list[dict[str, Any]]]
        if several:
            headlines = [f"{name}: {each.headline}" for name, each in self.found.items()]
            sections = {
                "Findings": [{"list": headlines}],
                "Methods and decoders": self._methods(self._across()),
                "Experts": [{"tables": [("", parts.experts_table(self.summary))]}],
                "How to reproduce": described,
            }
        else:
            sections = {
                "What to keep": [self._kept()],
                "Methods and decoders": self._methods(self._more_figures()),
                "Differences between methods": [
                    {"list": found.significant_differences, "tables": self._differences(found), "text": _PAIRED}
                ],
                "Whether to trust it": self._trust(source, found),
                "Inside": [
                    {
                        "title": "Experts",
                        "tables": [("", parts.experts_table(self.summary))],
                        "figures": self._curves(),
                    },
                    {"title": "What was chosen", "tables": parts.choices(source), "text": _CHOSEN, "prose": True},
                    {"title": "Layers", "figures": self._layers(source)},
                ],
                "How to reproduce": described,
            }
        drawn = {title: [each for each in map(_drawn, section) if each] for title, section in sections.items()}
        name = source.name if len(self.sources) == 1 else f"{len(self.sources)} experiments compared"
        said = (facts[0].get(fact, "") for fact in ("tasks", "network", "date", "machine"))
        return {
            "title": f"coin: {name}",
            "subtitle": "" if several else " · ".join([*filter(None, said), f"seeds {facts[0]['seeds']}"]),
            "headline": headline,
            "roles": roles,
            "cautions": [f"{'; '.join(whose)}: {text}" if several else text for text, whose in cautions.items()],
            "opening": list(self._memory()),
            "sections": {title: section for title, section in drawn.items() if section},
        }

    def _kept(self) -> dict[str, Any]:
        """Return the table of what to keep: what to look at first, and everything."""
        kept = stand_ins(self.summary)
        shown = shortlist(kept)
        first = [("", stand_in_table(kept[shown]))] if len(kept) else []
        every = None if shown.all() else (f"All {len(kept)} methods and decoders", stand_in_table(kept))
        return {"tables": first, "more": every, "text": _KEEP, "phone": ["method", "decoder", "NDA", "memory MiB"]}

    def _methods(self, drawn: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the tables of NDA, and the figures if there is a method to be seen in them."""
        phone = ["method", "P", *decoders_of(self.means)[:2]]
        return [
            {"tables": self._tables(), "text": _NDA, "phone": phone},
            {"figures": self._costs(), "text": _COST},
            {"figures": drawn if self.has_methods else ()},
        ]

    def _tables(self) -> Iterator[Titled]:
        sweeps = [source for source in self.sources if len(source.names) > 1]
        for (name, erased), table in nda_tables(self.summary).items():
            if not any(name in source.names for source in sweeps):
                yield f"{f'{name}: ' if len(self.found) > 1 else ''}{erased} lost", table
        for source in sweeps:
            yield source.name, sweep_text(source.frame, pd.DataFrame.from_dict(source.options, orient="index"))

    def _draw(self, name: str, figure: Figure, caption: str) -> dict[str, Any]:
        png = as_png(figure)
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower() or "plot"
        with atomic_path(self.path.parent / PLOTS / f"{slug}.png") as temporary:
            temporary.write_bytes(png)
        return {"image": parts.data_url("image/png", png), "caption": caption, "wide": figure.get_figwidth() > WIDTH}

    def _memory(self) -> Iterator[dict[str, Any]]:
        kept = stand_ins(self.summary)
        if len(self.found) == 1 and (kept["memory_mib"] > 0).any():
            size = float(self.sources[0].document["configuration"].get("network_mib") or "nan")
            yield self._draw("nda_against_memory", figures.nda_against_memory(kept, size), _KEPT)

    def _costs(self) -> Iterator[dict[str, Any]]:
        for decoder in reversed(decoders_of(self.means)[:2] if self.has_methods and len(self.found) == 1 else ()):
            figure = figures.nda_against_cost(self.means, decoder)
            yield self._draw(f"nda_against_cost_{decoder}", figure, f"NDA against cost, {decoder} decoder.")

    def _more_figures(self) -> Iterator[dict[str, Any]]:
        """Draw P, all decoders and residuals where there is something to be seen."""
        coded = self.means[~self.means["method"].isin(REFERENCES)]
        for source in self.sources:  # a line never joins the points of one with another's
            own = coded[coded["experiment"].isin(source.names)]
            if own["samples_per_task"].nunique() > 1:
                prefix, whose = (f"{source.name}-", f" of {source.name}") if len(self.sources) > 1 else ("", "")
                rest = "; mean over the sweep's other options" if len(source.names) > 1 else ""
                caption = f"NDA against the number of calibration samples per task{whose}{rest}."
                yield self._draw(f"{prefix}nda_against_samples", figures.nda_against_samples(own), caption)
        if len(self.found) == 1 and coded["decoder"].nunique() > 2:
            caption = "All decoders: a marker each. Dotted: the paper's 97.5 %."
            yield self._draw("nda_by_method", figures.nda_by_method(self.means), caption)
        if len(self.found) == 1 and np.isfinite(coded["residual_mean"]).any():
            caption = "NDA against the residual. Where a decoder is fitted, a large residual need not cost accuracy."
            yield self._draw("nda_against_residual", figures.nda_against_residual(self.means), caption)

    def _across(self) -> Iterator[dict[str, Any]]:
        """Draw several experiments side by side, and NDA against the options of sweeps."""
        means = largest_samples(self.means[~self.means["method"].eq("oracle")])
        whole = means[means["experiment"].isin([source.name for source in self.sources])]
        if whole["experiment"].nunique() > 1:
            yield self._draw("nda_by_experiment", figures.nda_by_experiment(whole), "NDA by method and experiment.")
        yield from self._more_figures()
        for source, sweep in ((each, each.sweep) for each in self.sources if each.sweep):
            own = means[means["experiment"].isin(source.names)]
            names = [name for name in next(iter(source.options.values())) if len(sweep.swept[name]) > 1]
            for name in names:
                options = {experiment: each[name] for experiment, each in source.options.items()}
                values = as_numbers(own["experiment"].map(options))
                figure = figures.nda_against_option(own, name, values, joined=sweep.full)
                others = ", ".join(other for other in names if other != name)
                caption = f"NDA against {name}, mean ± spread over seeds{f'; mean over {others}' if others else ''}."
                yield self._draw(f"{sweep.name}-nda_against_{name}", figure, caption)

    def _differences(self, found: Findings) -> Iterator[Titled]:
        for decoder in reversed(decoders_of(self.means)[:2]):
            table = paired_differences(found, decoder)
            if min(table.shape) > 1:
                yield f"Difference in NDA, points, {decoder} decoder", table

    def _curves(self) -> Iterator[dict[str, Any]]:
        if logged := parts.training_logs(self.sources[0]):
            caption = "The experts' accuracy while they are fine-tuned, a line per seed."
            figure = detail_figures.training_curves(pd.concat(logged, ignore_index=True))
            yield self._draw("training", figure, caption)

    def _layers(self, source: ReportSource) -> Iterator[dict[str, Any]]:
        if (layers := next(source.read(read_layers), None)) is not None:
            yield self._draw("layers", detail_figures.layer_profile(layers), _LAYERS)

    def _trust(self, source: ReportSource, found: Findings) -> list[dict[str, Any]]:
        """Return risks, confusions and examples of the best decoder, if there is one, and accuracies by task."""
        by_task = {"title": "Accuracy and agreement by task", "tables": parts.accuracy_by_task(self.summary, found)}
        if (best := found.best) is None:
            return [by_task]
        keys = parts.keys_of_shown(source, best)
        totals, tables = parts.risks(source, best.decoder)
        curves = []
        if tables:
            curves = [self._draw("risk", figures.risk_curves(totals[totals["name"].isin(keys)]), _RISK)]
        return [
            {"title": "Risk of decoded answers", "tables": tables, "figures": curves},
            by_task,
            {"title": "Confusions", "figures": self._confusions(source, best.decoder, keys)},
            {"title": "Examples", "examples": parts.example_images(source, best.decoder, keys)},
        ]

    def _confusions(self, source: ReportSource, decoder: str, keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        for task, counts, classes in parts.confusions(source, keys):
            caption = f"Task {task} lost, {decoder} decoder, all seeds. A perfect decoder fills the diagonal."
            yield self._draw(f"confusion_{task}", detail_figures.confusion_matrices(counts, classes), caption)


def _drawn(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a section with its generators run; nothing if there is nothing but words about it."""
    made = {name: list(value) if isinstance(value, Iterator) else value for name, value in part.items()}
    return made if any(made.get(name) for name in ("list", "tables", "figures", "examples", "commands")) else {}
