"""HTML as text: sections, figures, tables. Everything that comes from outside is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

_MANY = 9
"""Tables of more columns are set closer and take the whole window."""


def section(title: str, body: str) -> str:
    """Return a section with its heading, nothing where it is empty."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def figure(svg: str, caption: str, width: float | None = None) -> str:
    """Return an SVG element with its caption.

    Args:
        svg: The element.
        caption: What stands below it.
        width: The least width in pixels at which it can be read, for a figure that takes the page's whole width.
    """
    if width is not None:
        svg = f'<div class="scroll"><div style="min-width:{width:.0f}px">{svg}</div></div>'
    kind = "" if width is None else ' class="wide"'
    return f"<figure{kind}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(items: Iterable[str]) -> str:
    """Return figures side by side where there is room."""
    body = "\n".join(items)
    return f'<div class="figures">{body}</div>' if body else ""


def folded(title: str, body: str, *, opened: bool = False) -> str:
    """Return a part that opens on a click, nothing where it is empty."""
    if not body:
        return ""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[str], text_columns: Sequence[str], kind: str = "") -> str:
    """Return a table that scrolls sideways where it is too wide; `text_columns` are set to the left."""
    cells = [f'<th{" class=text" if name in text_columns else ""} scope="col">{_breakable(name)}</th>' for name in head]
    opening = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="scroll{" many" if len(head) > _MANY else ""}">{opening}<thead><tr>{"".join(cells)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Sequence[str], kind: str = "") -> str:
    """Return a table's row."""
    return f'<tr class="{kind}">{"".join(cells)}</tr>' if kind else f"<tr>{''.join(cells)}</tr>"


def cell(text: str, kind: str = "") -> str:
    """Return a table's cell."""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _breakable(name: str) -> str:
    """Return a heading that may go on in a new line behind a hyphen, as the long names of decoders have them."""
    return escape(name).replace("-", "-<wbr>")
