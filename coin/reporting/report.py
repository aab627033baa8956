"""One self-contained HTML page from the files of experiments or sweeps, and its figures as PNG files."""

import base64
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from coin.errors import FileError
from coin.files.atomic import atomic_path, write_text
from coin.progress import progress
from coin.reporting import figures
from coin.reporting.extras import LAYERS_CSV, Examples, read_examples, read_layers
from coin.reporting.findings import Entry, Findings, findings, paired_differences
from coin.reporting.results import RESULTS_CSV, Counts, asked_policy, read_configuration, read_confusions, read_results
from coin.reporting.summary import (
    REFERENCES,
    SUMMARY_CSV,
    decoders_of,
    expert_accuracies,
    largest_samples,
    over_tasks,
    seed_folders,
    summarise,
    variant_names,
)
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, Sweep, as_numbers, read_sweep_table, sweep_text
from coin.reporting.tables import COSTS, nda_tables, percent

REPORT_HTML = "report.html"
PLOTS = "plots"
_TEMPLATE = "report.html.jinja"
_COST_CAPTION = (
    "NDA (accuracy of the decoded answer ÷ that of the lost expert, mean over tasks ± spread over seeds) of every method "
    "against what it costs, by decoder. Up and left is better. Blue and green: closed forms; orange and red: trained; "
    "dashed: the survivors alone, without a coded model; dotted: the paper's 97.5 %."
)


@dataclass(frozen=True)
class Source:
    """One folder that is reported: an experiment's, a seed's or a sweep's.

    Args:
        folder: As it was given.
        seeds: The folders that hold results; of a sweep, those of the largest P. They may be gone.
        frame: All rows of ``results.csv``; ``experiment`` is made unique among the report's sources.
        document: ``results.json`` of the first seed.
        sweep: The sweep, where it is one.
    """

    folder: Path
    seeds: tuple[Path, ...]
    frame: pd.DataFrame
    document: dict[str, Any]
    sweep: Sweep | None = None

    @property
    def name(self) -> str:
        """What the source is called."""
        return str(self.frame["experiment"].iloc[0]) if self.sweep is None else f"sweep {self.sweep.name}"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the files of experiments alone.

    The page needs no network and no second file. Optional files of a seed (``layers.csv``, ``examples.npz``, the
    experts' logs) get their sections where they exist.

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
    above = Path(os.path.commonpath([source.folder.resolve() for source in sources]))
    path = (output if output.suffix == ".html" else output / REPORT_HTML) if output else above / REPORT_HTML
    page = _Page(path, sources)
    with progress("drawing the report", total=None):
        single = page.frame["experiment"].nunique() == 1
        content = page.experiment(sources[0]) if single else page.comparison()
        templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        html = templates.get_template(_TEMPLATE).render(references=REFERENCES, costs=COSTS, **content)
    write_text(path, html)
    return path


def report_summary(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the summary of what `write_report` would report, as `coin.reporting.summarise` returns it.

    Raises:
        FileError: A folder holds no results, or a file is damaged.
    """
    return summarise(pd.concat([each.frame for each in read_sources([Path(f) for f in folders])], ignore_index=True))


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Read experiments' folders (with ``seed-*``), single seeds' folders or sweeps' folders (with ``sweep.csv``).

    Experiments of one name are told apart by their folders, a sweep's beside others by the sweep's name.

    Raises:
        FileError: No folder is given, one holds no results, or a file is damaged.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not unique:
        raise FileError("found no folder to report on, expected at least one; `coin report runs/NAME`")
    found = [_read(folder) for folder in unique]
    names = [source.name for source in found]
    for place, source in enumerate(found):
        own: Any = source.frame["experiment"]
        if source.sweep is not None and len(found) > 1:
            source.frame["experiment"] = [
                name if name == source.sweep.name else f"{source.sweep.name} {name}" for name in own
            ]
        elif names.count(source.name) > 1:
            source.frame["experiment"] = f"{names[place]} ({source.folder})"
    return found


def _read(folder: Path) -> Source:
    sweep = read_sweep_table(folder)
    if sweep is not None:
        found = (seed for point in sweep.points for seed in sorted((folder / point).glob("seed-*")))
        seeds = tuple(seed for seed in found if (seed / RESULTS_CSV).is_file())
        frame = sweep.frame
    else:
        seeds = (folder,) if (folder / RESULTS_CSV).is_file() else tuple(seed_folders(folder))
        if not seeds:
            raise FileError(
                f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' nor '{SWEEP_CSV}' in '{folder}', expected "
                "the folder of an experiment, of one seed or of a sweep; make it with `coin run` or `coin sweep`"
            )
        frame = pd.concat([read_results(seed) for seed in seeds], ignore_index=True)
    return Source(folder, seeds, frame, read_configuration(seeds[0]) if seeds else {"configuration": {}}, sweep)


class _Page:
    """Collects what the template shows: figures are written as they are drawn."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self.sources = sources
        self.frame = pd.concat([source.frame for source in sources], ignore_index=True)
        self.summary = summarise(self.frame)
        self.means = over_tasks(self.summary)
        self.has_methods = not self.means["method"].isin(REFERENCES).all()

    def experiment(self, source: Source) -> dict[str, Any]:
        """Return the page of one experiment: the finding first, then what lies behind it."""
        found = findings(self.frame)
        parts = [
            _section("Findings", lists=[found.beyond_spread], text=_how_found(found)),
            _section("Differences between methods", tables=list(_difference_tables(found, self.means))),
            _section("Accuracy and agreement by task", tables=list(_task_tables(self.summary, found))),
            _section("More figures", figures=list(self._more_figures())),
            _section("Experts", tables=[("", _experts(self.summary))], figures=list(self._curves(source))),
            _section("Layers", figures=list(self._layers(source))),
            _section("Confusions", figures=list(self._confusions(source, found))),
            _section("Examples", examples=list(_examples(source, found))),
        ]
        return self._content(source.name, [found], parts)

    def comparison(self) -> dict[str, Any]:
        """Return the page of several experiments or of a sweep over more than P and seeds."""
        found = {str(name): findings(part) for name, part in self.frame.groupby("experiment", sort=False)}
        listed = [[f"{name}: {each.headline}" for name, each in found.items()]]
        parts = [
            _section("Findings", lists=listed),
            _section("Figures", figures=list(self._across())),
            _section("Experts", tables=[("", _experts(self.summary))]),
        ]
        title = self.sources[0].name if len(self.sources) == 1 else f"{len(self.sources)} experiments compared"
        ranked = [each for each in found.values() if each.best is not None]
        top = max(
            ranked, key=lambda each: each.best.nda.mean() if each.best else 0.0, default=next(iter(found.values()))
        )
        where = next(name for name, each in found.items() if each is top)
        return self._content(title, [top], parts, f"The best of {len(found)} experiments is {where}. ")

    def _content(
        self, title: str, found: list[Findings], parts: list[dict[str, Any]], lead: str = ""
    ) -> dict[str, Any]:
        several = len(self.sources) > 1 or self.frame["experiment"].nunique() > 1
        facts = [_facts(source) for source in self.sources]
        names = [source.name for source in self.sources]
        lines = list(dict.fromkeys(name for each in facts for name in each))
        table = pd.DataFrame([[name, *(each.get(name, "–") for each in facts)] for name in lines], columns=["", *names])
        hero = [] if several or not self.has_methods else list(self._cost_figures())
        parts = [
            *parts,
            _section("Configuration", tables=[("", table)], choices=_choices(self.sources[0]) if not several else []),
            _section("How to reproduce", commands=[self._reproduce(source) for source in self.sources]),
        ]
        return {
            "title": f"coin: {title}",
            "subtitle": "; ".join(_subtitle(source) for source in self.sources) if not several else "",
            "headline": lead + found[0].headline,
            "entries": list(_entries(found[0])),
            "cautions": found[0].cautions,
            "hero": hero,
            "tables": list(self._nda_tables()),
            "phone": ["method", "P", *decoders_of(self.means)[:2]],
            "sections": [part for part in parts if part["filled"]],
        }

    def _nda_tables(self) -> Iterator[tuple[str, pd.DataFrame]]:
        swept = {
            name
            for each in self.sources
            if each.sweep and len(each.sweep.options) > 1
            for name in each.frame.experiment
        }
        several = self.frame["experiment"].nunique() > 1
        for (name, erased), table in nda_tables(self.summary).items():
            if name not in swept:
                yield f"{f'{name}: ' if several else ''}{erased} lost", table
        for source in self.sources:
            if source.sweep is not None and len(source.sweep.options) > 1:
                names = dict(zip(source.sweep.options, dict.fromkeys(source.frame["experiment"]), strict=True))
                points = pd.DataFrame.from_dict(
                    {names[own]: o for own, o in source.sweep.options.items()}, orient="index"
                )
                yield source.name, sweep_text(source.frame, points)

    def _draw(self, name: str, figure: Figure, caption: str, wide: bool = False) -> dict[str, Any]:
        png = figures.as_png(figure)
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-").lower() or "plot"
        with atomic_path(self.path.parent / PLOTS / f"{slug}.png") as temporary:
            temporary.write_bytes(png)
        return {"image": _data("image/png", png), "caption": caption, "wide": wide}

    def _cost_figures(self) -> Iterator[dict[str, Any]]:
        for place, decoder in enumerate(reversed(decoders_of(self.means)[:2])):
            name = "nda_against_cost" if place == 0 else f"nda_against_cost_{decoder}"
            yield self._draw(name, figures.nda_against_cost(self.means, decoder), _COST_CAPTION)

    def _more_figures(self) -> Iterator[dict[str, Any]]:
        if not self.has_methods:
            return
        if self.means["samples_per_task"].nunique() > 1:
            caption = "NDA against the number of calibration samples per task."
            yield self._draw("nda_against_samples", figures.nda_against_samples(self.means), caption)
        if self.means["decoder"].nunique() > 2:
            caption = "All decoders: a marker each. Dotted: the paper's 97.5 %."
            yield self._draw("nda_by_method", figures.nda_by_method(self.means), caption)
        if np.isfinite(self.means.loc[~self.means["method"].isin(REFERENCES), "residual_mean"]).any():
            caption = "NDA against the residual. Where a decoder is fitted, a large residual need not cost accuracy."
            yield self._draw("nda_against_residual", figures.nda_against_residual(self.means), caption)

    def _across(self) -> Iterator[dict[str, Any]]:
        if not self.has_methods:
            return
        whole = [source.frame["experiment"].iloc[0] for source in self.sources if not source.sweep]
        if len(whole) > 1:
            rows = largest_samples(self.means[self.means["experiment"].isin(whole)])
            yield self._draw("nda_by_experiment", figures.nda_by_experiment(rows), "NDA by method and experiment.")
        if self.means["samples_per_task"].nunique() > 1:
            caption = "NDA against the number of calibration samples per task; mean over all else."
            yield self._draw("nda_against_samples", figures.nda_against_samples(self.means), caption)
        for source in self.sources:
            sweep = source.sweep
            if sweep is None:
                continue
            own = largest_samples(self.means[self.means["experiment"].isin(set(source.frame["experiment"]))])
            labels = dict(zip(dict.fromkeys(source.frame["experiment"]), sweep.options.values(), strict=True))
            names = [name for name in next(iter(sweep.options.values())) if len(sweep.swept[name]) > 1]
            for name in names:
                values = as_numbers(own["experiment"].map({label: options[name] for label, options in labels.items()}))
                others = ", ".join(other for other in names if other != name)
                caption = f"NDA against {name}, mean ± spread over seeds{f'; mean over {others}' if others else ''}."
                figure = figures.nda_against_option(own, name, values, joined=sweep.full)
                yield self._draw(f"{sweep.name}-nda_against_{name}", figure, caption)

    def _curves(self, source: Source) -> Iterator[dict[str, Any]]:
        found = []
        columns = ["epoch", "train/accuracy", "val/accuracy"]
        for task, seed in itertools.product(dict.fromkeys(source.frame["task"]), source.seeds):
            path = seed / "experts" / task / "logs" / "metrics.csv"
            with suppress(OSError, ValueError, KeyError):  # a log, no result: it may be of another kind of training
                found.append(pd.read_csv(path)[columns].assign(task=task, seed=seed.name))
        if found:
            figure = figures.training_curves(pd.concat(found, ignore_index=True))
            yield self._draw("training", figure, "The experts' accuracy while they are fine-tuned, a line per seed.")

    def _layers(self, source: Source) -> Iterator[dict[str, Any]]:
        layers = next((found for found in map(read_layers, source.seeds) if found is not None), None)
        if layers is not None:
            caption = (
                "Above, where the Fisher's mass lies. Below, how far each merge is from the average of the experts (1: "
                "as far as the experts are). Methods with the same numbers are drawn once. Blank: the experts agree."
            )
            yield self._draw("layers", figures.layer_profile(layers), caption, wide=True)

    def _confusions(self, source: Source, found: Findings) -> Iterator[dict[str, Any]]:
        archives = [read_confusions(seed) for seed in source.seeds]
        shown = _shown(found)
        for task in dict.fromkeys(source.frame["task"]):
            counts: dict[str, Counts] = {}
            for entry in shown:
                key = f"{_key(source.frame, entry)}|{task}|{task}"
                own = [archive[key] for archive in archives if key in archive]
                if own and len({each.shape for each in own}) == 1:
                    counts[entry.name] = np.sum(own, axis=0)
            if counts:
                size = len(next(iter(counts.values())))
                classes = (source.document.get("classes") or {}).get(task)
                names = list(map(str, classes if classes and len(classes) == size else range(size)))
                figure = figures.confusion_matrices(counts, names)
                caption = (
                    f"Task {task} lost, {shown[0].decoder} decoder, all seeds. A perfect decoder fills the diagonal."
                )
                yield self._draw(f"confusion_{task}", figure, caption)

    def _reproduce(self, source: Source) -> dict[str, Any]:
        """Return the command, which reads a file that the page itself hands out, and the files beside the page."""
        seeds = sorted({int(seed) for seed in source.frame["seed"]})
        if source.sweep is not None:
            name, path = f"{source.sweep.name}.yaml", source.folder / SWEEP_YAML
            command = ["coin", "sweep", name]
        else:
            name, path = f"{source.frame['experiment'].iloc[0]}.yaml", source.seeds[0] / "config.yaml"
            command = [
                "coin",
                "run",
                "-c",
                name,
                f"--seeds={json.dumps(seeds, separators=(',', ':'))}",
                "--output=runs",
            ]
        files = [source.folder / name for name in (SUMMARY_CSV, SWEEP_CSV)]
        files += [seed / file for seed in source.seeds for file in (RESULTS_CSV, LAYERS_CSV)]
        here = self.path.parent.resolve()
        versions = source.document.get("versions")
        return {
            "title": source.name if len(self.sources) > 1 else "",
            "command": shlex.join(command),
            "name": name,
            "config": _data("text/yaml", path.read_bytes()) if path.is_file() else "",
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
            "json": json.dumps(source.document["configuration"], indent=2, ensure_ascii=False),
            "files": [os.path.relpath(file.resolve(), here) for file in files if file.is_file()],
            "reports": os.path.relpath(source.folder.resolve() / REPORT_HTML, here) if len(self.sources) > 1 else "",
            "wandb": str(source.document.get("wandb") or ""),
            "offline": any(seed.glob("wandb/offline-run-*") for seed in source.seeds),
        }


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _section(title: str, **content: Any) -> dict[str, Any]:
    """Return a section for the template; it is shown where any of its content is there."""
    defaults: dict[str, Any] = dict.fromkeys(("lists", "tables", "figures", "examples", "commands", "choices"), ())
    filled = any(bool(part) for name, part in content.items() if name != "text" and part != [()])
    return {**defaults, "text": "", **content, "title": title, "id": title.lower().replace(" ", "-"), "filled": filled}


def _how_found(found: Findings) -> str:
    best = next(iter(found.entries.values()))
    return (
        f"Paired over {len(best.nda)} seeds, ± their standard deviation: what a 95 % confidence interval (t-test, not "
        "corrected for the number of comparisons) tells from zero. The best are the best on the test sets."
    )


def _entries(found: Findings) -> Iterator[tuple[str, Entry]]:
    """Return the three that the first screen names."""
    for role, entry in (
        ("best closed form", found.closed_form),
        ("fair baseline: best trained", found.trained),
        ("floor: no coded model", found.floor),
    ):
        if entry is not None:
            yield role, entry


def _shown(found: Findings) -> list[Entry]:
    """Return the best method and COIN, with the best one's decoder."""
    best = found.best
    if best is None:
        return []
    coin = found.entries.get(("coin", best.decoder))
    return [best, *([coin] if coin is not None and coin.name != best.name else [])]


def _key(frame: pd.DataFrame, entry: Entry) -> str:
    """Return how ``confusion.npz`` and ``examples.npz`` call a variant and its decoder."""
    row = frame[(variant_names(frame) == entry.name) & (frame["decoder"] == entry.decoder)].iloc[0]
    return f"{row['method']}|{asked_policy(row['batchnorm'])}|{row['decoder']}"


def _difference_tables(found: Findings, means: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for decoder in reversed(decoders_of(means)[:2]):
        table = paired_differences(found, decoder)
        if table.shape[0] > 1 and table.shape[1] > 1:
            yield f"Difference in NDA, points, {decoder} decoder", table


def _task_tables(summary: pd.DataFrame, found: Findings) -> Iterator[tuple[str, pd.DataFrame]]:
    """Return the expert's accuracy, the decoded accuracy and the agreement of every task with the best decoder."""
    best = found.best or found.floor
    if best is None:
        return
    alone = (summary["erased"] == summary["task"]) & (summary["decoder"] == best.decoder)
    rows = largest_samples(summary[alone & (summary["method"] != "oracle")])
    rows = rows.assign(name=variant_names(rows), last=rows["method"].isin(REFERENCES)).sort_values(
        "last", kind="stable"
    )
    lines = []
    for name, part in rows.groupby("name", sort=False):
        line = {"method": str(name)}
        for row in part.to_dict("records"):
            line[f"{row['task']}: decoded"] = percent(row["decoded_accuracy_mean"], row["decoded_accuracy_std"])
            line[f"{row['task']}: agreement"] = percent(row["agreement_mean"], row["agreement_std"])
        lines.append(line)
    own = {f"{row.task}: decoded": percent(row.mean, row.spread) for row in expert_accuracies(rows).itertuples()}
    table = pd.DataFrame([{"method": "the expert itself", **own}, *lines]).fillna("–")
    yield f"Accuracy of the decoded answers, and agreement with the expert, in %, {best.decoder} decoder", table


def _experts(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the experts' own accuracies; experiments that share their experts share a line."""
    experts = expert_accuracies(summary)
    total = experts["experiment"].nunique()
    lines = []
    for (task, seeds, mean, spread), same in experts.groupby(
        ["task", "seeds", "mean", "spread"], sort=False, dropna=False
    ):
        whose = ", ".join(same["experiment"]) if len(same) < total else "all"
        lines.append([whose, task, percent(mean, spread), str(seeds)])
    table = pd.DataFrame(lines, columns=["experiment", "task", "test accuracy (%)", "seeds"])
    return table if total > 1 else table.drop(columns="experiment")


def _examples(source: Source, found: Findings) -> Iterator[dict[str, Any]]:
    """Return the example images by task, each with what the expert, the best method and COIN answer."""
    examples = next((read for read in map(read_examples, source.seeds) if read is not None), None)
    shown = {entry.name: _key(source.frame, entry) for entry in _shown(found)}
    if examples is None or not shown:
        return
    decoded = {name: examples.decoded[key] for name, key in shown.items() if key in examples.decoded}
    for task, indices in examples.by_task().items():
        differ = {
            name: sum(int(answers[i] != examples.expert[i]) for i in indices) for name, answers in decoded.items()
        }
        said = ", ".join(f"{count} of {len(indices)} for {name}" for name, count in differ.items())
        yield {
            "title": f"Task {task} lost" if task else "",
            "text": f"A random draw of the test set, the same for all methods, {_shown(found)[0].decoder} decoder. "
            f"Answers that differ from the expert's: {said}.",
            "images": [_example(examples, decoded, i) for i in indices],
        }


def _example(examples: Examples, decoded: dict[str, Any], i: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(examples.images[i]).save(buffer, format="PNG", optimize=True)
    answers = [(name, examples.name_of(int(own[i])), own[i] != examples.expert[i]) for name, own in decoded.items()]
    return {
        "image": _data("image/png", buffer.getvalue()),
        "label": examples.name_of(int(examples.label[i])),
        "answers": [("expert", examples.name_of(int(examples.expert[i])), False), *answers],
    }


def _choices(source: Source) -> list[tuple[str, str]]:
    """Return what the methods chose on held-out samples and how their solves ended, in the first seed."""
    out = []
    for method in source.document.get("methods", []):
        plain = {k: v for k, v in (method.get("chosen") or {}).items() if not isinstance(v, dict) and v not in ("", [])}
        said = (
            f"{k} {len(v)} tensors" if isinstance(v, list) else f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in plain.items()
        )
        out += [(str(method["label"]), ", ".join(said))] if plain else []
    return out


def _subtitle(source: Source) -> str:
    date, machine = (str(source.document.get(name) or "") for name in ("date", "machine"))
    seeds = source.frame["seed"].nunique()
    facts = _facts(source)
    shown = [facts["tasks"], facts.get("network", ""), "1 seed" if seeds == 1 else f"{seeds} seeds", date[:10], machine]
    return " · ".join(text for text in shown if text)


def _facts(source: Source) -> dict[str, str]:
    """Return what was run, in words; what the results do not say is left out."""
    frame, configuration = source.frame, source.document["configuration"]
    network, base = _dict(configuration.get("network")), _dict(configuration.get("base"))
    tasks = []
    for task in dict.fromkeys(frame["task"]):
        given = _dict(_dict(configuration.get("tasks")).get(task))
        kind = str(given.get("class") or str(given.get("class_path") or "").rpartition(".")[2])
        tasks.append(f"{task} ({kind})" if kind else str(task))
    start = "random weights" if network.get("weights") is None else f"weights {network['weights']}"
    if base:
        start = f"checkpoint {base['checkpoint']}" if base.get("checkpoint") else "a base trained beforehand"
    methods = list(dict.fromkeys(frame.loc[~frame["method"].isin(REFERENCES), "method"]))
    code, sweep = configuration.get("code"), source.sweep
    swept = (
        f"{name}: {', '.join(values)}" for name, values in (sweep.swept if sweep else {}).items() if len(values) > 1
    )
    size = "tokens" if network.get("name") == "minilm" else "pixels"
    found = {
        "tasks": ", ".join(tasks),
        "network": f"{network['name']}, {network.get('image_size')} {size}" if network.get("name") else "",
        "starts from": start if "weights" in network else "",
        "code": json.dumps(code) if code else "",
        "P, calibration samples per task": ", ".join(map(str, sorted(set(frame["samples_per_task"])))),
        "methods": ", ".join(methods),
        "decoders": ", ".join(dict.fromkeys(frame["decoder"])),
        "seeds": ", ".join(map(str, sorted(set(frame["seed"])))),
        "swept": "; ".join(swept),
        "date": str(source.document.get("date") or ""),
        "machine": str(source.document.get("machine") or ""),
    }
    return {name: text for name, text in found.items() if text}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
