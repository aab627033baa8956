"""The pieces of the HTML report. Everything that comes from outside is escaped here."""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape

import pandas as pd
from PIL import Image

from coin.reporting.comparison import (
    Cell,
    Comparison,
    Line,
    comparisons,
    expert_accuracies,
    percent,
    seconds,
    short,
)  # fmt: skip
from coin.reporting.extras import Examples
from coin.reporting.findings import Finding
from coin.reporting.sources import Source

_EXAMPLES = 48


def section(title: str, body: str) -> str:
    """Return a section with its heading, nothing where it is empty."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def lede(sources: Sequence[Source]) -> str:
    """Return what was run, in a sentence per experiment."""
    sentences = []
    for source in sources:
        frame = source.frame
        tasks = list(dict.fromkeys(frame["task"]))
        samples = ", ".join(str(value) for value in sorted(set(frame["samples_per_task"])))
        network = _lookup(source.document["configuration"], "network", "name")
        code = _code(source)
        parts = [
            f"{len(tasks)} tasks ({', '.join(tasks)})",
            *([str(network)] if network else []),
            *([code] if code else []),
            f"P = {samples} calibration samples per task",
            f"{_count(frame['seed'].nunique(), 'seed')}",
            f"methods {', '.join(dict.fromkeys(frame['method']))}",
        ]
        name = f"<b>{escape(source.name)}</b>: " if len(sources) > 1 else ""
        sentences.append(f"<p>{name}{escape('; '.join(parts))}.</p>")
    return "\n".join(sentences)


def findings_list(found: Iterable[Finding]) -> str:
    """Return findings as a list; a word says what the colour does."""
    items = [f'<li class="{item.kind}"><b>{item.kind}</b>{escape(item.text)}</li>' for item in found]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def nda_table(comparison: Comparison) -> str:
    """Return one comparison as a table: the best cells marked, the references set apart."""
    several = len(comparison.samples) > 1
    head = ["method", "BatchNorm", *(["P"] if several else []), *comparison.decoders, "residual", "seconds", "passes"]
    rows = []
    before: Line | None = None
    for line in comparison.lines:
        first = line.is_reference and before is not None and not before.is_reference
        kind = " ".join(["reference"] * line.is_reference + ["first"] * first)
        cells = [_td(line.name), _td(line.batchnorm or "–", "text")]
        cells += [_td(str(line.samples_per_task))] if several else []
        for decoder in comparison.decoders:
            cell = line.cells.get(decoder)
            cells.append(_td("–") if cell is None else _td(percent(cell), "best" if cell.best else ""))
        residual = "–" if math.isnan(line.residual.mean) else f"{line.residual.mean:.3f}"
        cells += [_td(residual), _td(seconds(line.seconds.mean)), _td(short(line.passes.mean))]
        rows.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
        before = line
    return _table(head, rows, text_columns=("method", "BatchNorm"))


def nda_tables(summary: pd.DataFrame) -> str:
    """Return all comparisons of a summary, and how to read them."""
    tables = [
        f"<h3>{escape(each.experiment)}: {escape(each.erased)} lost</h3>{nda_table(each)}"
        for each in comparisons(summary)
    ]
    note = (
        "NDA in %: accuracy of the decoded output ÷ accuracy of the expert itself, mean over the lost tasks, ± sample "
        "standard deviation over seeds. Shaded: the best of its decoder (and P). <i>none</i>: the survivors alone, "
        "without a coded model; <i>oracle</i>: Σβf itself. Seconds and passes (forward-equivalents of one sample) are "
        "what it took to make the coded model."
    )
    return "".join(tables) + f'<p class="soft">{note}</p>'


def experts_table(summary: pd.DataFrame) -> str:
    """Return the experts' own accuracies."""
    experts = expert_accuracies(summary)
    rows = [
        f"<tr>{_td(row['experiment'])}{_td(row['task'], 'text')}"
        f"{_td(percent(Cell(row['mean'], row['spread'])))}{_td(str(row['seeds']))}</tr>"
        for _, row in experts.iterrows()
    ]
    return _table(["experiment", "task", "test accuracy (%)", "seeds"], rows, text_columns=("experiment", "task"))


def figure(svg: str, caption: str) -> str:
    """Return an SVG element with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(items: Iterable[str]) -> str:
    """Return figures side by side where there is room."""
    body = "\n".join(items)
    return f'<div class="figures">{body}</div>' if body else ""


def folded(title: str, body: str, *, opened: bool = False) -> str:
    """Return a part that opens on a click, nothing where it is empty."""
    if not body:
        return ""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def example_images(examples: Examples) -> str:
    """Return example images, first those where the decoded answer differs from the expert's."""
    differing = examples.expert != examples.decoded
    order = sorted(range(len(examples.images)), key=lambda i: not differing[i])[:_EXAMPLES]
    items = []
    for i in order:
        buffer = io.BytesIO()
        Image.fromarray(examples.images[i]).save(buffer, format="PNG")
        label, expert, decoded = (
            escape(examples.name_of(int(answers[i]))) for answers in (examples.label, examples.expert, examples.decoded)
        )
        items.append(
            f'<figure class="{"differs" if differing[i] else "same"}"><img alt="test image of class {label}" '
            f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
            f"<figcaption>is {label}<br>expert {expert}<br>decoded {decoded}</figcaption></figure>"
        )
    if not items:
        return ""
    shown = f"{len(items)} of {_count(len(examples.images), 'image')}; framed where the decoded answer differs."
    return f'<div class="examples">{"".join(items)}</div><p class="soft">{shown}</p>'


def reproduce(sources: Sequence[Source]) -> str:
    """Return the command, the versions and the configuration of every experiment."""
    parts = []
    for source in sources:
        document = source.document
        command = _lookup(document, "extra", "command")
        config = source.seeds[0] / "config.yaml"
        if not command:
            command = f"coin run --config {config}" if config.is_file() else "coin run --config EXPERIMENT.yaml"
        versions = document.get("versions")
        named = versions.items() if isinstance(versions, dict) else ()
        rows = [f"<tr>{_td(str(name))}{_td(str(value), 'text')}</tr>" for name, value in named]
        configuration = json.dumps(document["configuration"], indent=2, ensure_ascii=False)
        parts.append(
            f"<h3>{escape(source.name)}</h3><pre>{escape(str(command))}</pre>"
            + folded("Versions", _table(["package", "version"], rows, text_columns=("package", "version")))
            + folded(f"Configuration ({source.seeds[0].name})", f"<pre>{escape(configuration)}</pre>")
        )
    return "".join(parts)


def _code(source: Source) -> str:
    """Return the code in words; nothing where the results do not say."""
    configuration = source.document["configuration"]
    code, choice = _lookup(configuration, "code"), _lookup(configuration, "code_choice")
    if not code:
        return ""
    text = f"code {json.dumps(code)}"
    return text if choice is None else f"{text}, chosen from the calibration data of {source.seeds[0].name}"


def _table(head: Sequence[str], rows: Sequence[str], text_columns: Sequence[str]) -> str:
    cells = [f'<th{" class=text" if name in text_columns else ""} scope="col">{escape(name)}</th>' for name in head]
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(cells)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _td(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _lookup(value: object, *keys: str) -> object:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
