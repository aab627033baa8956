"""Draws the pictures of the README and of docs/concepts.md: python notebooks/picture.py → notebooks/results/*.svg.

The boxes are filled and have white text; lines and captions are of a grey that is readable on white and on black.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
GREY, SLATE, BLUE, GREEN, RED = "#7d8590", "#57606a", "#0969da", "#1a7f37", "#e5484d"
WIDTH, HEIGHT = 560, 420  # narrow, so that the text is legible on a phone
SERVER_X, SERVER_WIDTH, SERVER_HEIGHT = 160, 190, 52


def text(
    x: float,
    y: float,
    words: str,
    colour: str = GREY,
    size: int = 15,
    anchor: str = "middle",
    more: str = "",
) -> str:
    """Return a line of text whose middle (or start) is at x."""
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{more}>{words}</text>'


def box(
    x: float, y: float, width: float, height: float, colour: str, words: str, below: str = ""
) -> str:
    """Return a filled box with a line of white text, or two."""
    middle, centre = x + width / 2, y + height / 2
    rows = (
        [(words, centre + 5, 16)]
        if not below
        else [(words, centre - 3, 16), (below, centre + 16, 14)]
    )
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}"/>'
    return "\n".join([shape, *(text(middle, at, row, "white", size) for row, at, size in rows)])


def lost_box(x: float, y: float, width: float, height: float, words: str, below: str) -> str:
    """Return the dashed outline of a server that does not answer."""
    middle, centre = x + width / 2, y + height / 2
    dashed = f'fill="none" stroke="{RED}" stroke-width="2" stroke-dasharray="7 5"'
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" {dashed}/>'
    return "\n".join(
        [shape, text(middle, centre - 3, words, RED, 16), text(middle, centre + 16, below, RED, 14)]
    )


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a line with an arrow's head at its end."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2"'
    return f'{line} marker-end="url(#green)"/>'


def marker(name: str, colour: str) -> str:
    """Return the head of an arrow."""
    size = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"'
    return f'<marker id="{name}" {size}><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'


def picture() -> str:
    """Return the picture as SVG: N experts, one lost, and the body with N adapters that answers in its place."""
    rows, answer_x, query_middle = (46, 112, 204), 412, 188
    servers = [
        lost_box(SERVER_X, rows[0], SERVER_WIDTH, SERVER_HEIGHT, "expert 1", "its server is lost"),
        box(SERVER_X, rows[1], SERVER_WIDTH, SERVER_HEIGHT, BLUE, "expert 2", "answers for itself"),
        text(SERVER_X + SERVER_WIDTH / 2, 189, "⋮", size=22),
        box(SERVER_X, rows[2], SERVER_WIDTH, SERVER_HEIGHT, BLUE, "expert N", "answers for itself"),
    ]
    body_y, adapter = 290, (SERVER_WIDTH - 16) / 3
    body = [
        box(SERVER_X, body_y, SERVER_WIDTH, 44, GREEN, "one body"),
        box(SERVER_X, body_y + 52, adapter, 40, GREEN, "1"),
        box(SERVER_X + adapter + 8, body_y + 52, adapter, 40, SLATE, "2"),
        box(SERVER_X + 2 * (adapter + 8), body_y + 52, adapter, 40, SLATE, "… N"),
        text(SERVER_X + SERVER_WIDTH / 2, body_y + 112, "an adapter for each expert", size=14),
    ]
    lost = f'stroke="{RED}" stroke-width="2" stroke-dasharray="7 5"'
    lines = [
        f'<line x1="118" y1="{query_middle}" x2="{SERVER_X - 4}" y2="{rows[0] + SERVER_HEIGHT / 2}" {lost}/>',
        text(137, 137, "✕", RED, 22),
        arrow(118, query_middle, SERVER_X - 4, body_y + 22, GREEN),
        arrow(SERVER_X + SERVER_WIDTH + 4, body_y + 22, answer_x - 4, body_y + 22, GREEN),
    ]
    parts = [
        box(8, query_middle - 26, 106, 52, SLATE, "query", "for expert 1"),
        *lines,
        *servers,
        *body,
        box(answer_x, body_y - 10, 140, 64, GREEN, "answer of", "the lost expert 1"),
        text(
            8,
            26,
            "N experts on N servers: networks fine-tuned from one start",
            size=16,
            anchor="start",
        ),
        text(SERVER_X + 4, 279, "one server more", size=16, anchor="start"),
    ]
    title = (
        "One body with an adapter for each of N experts answers for the expert whose server is lost"
    )
    return drawing(WIDTH, HEIGHT, title, [f"<defs>{marker('green', GREEN)}</defs>", *parts])


def drawing(width: float, height: float, title: str, parts: list[str]) -> str:
    """Return parts as an SVG file."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" role="img">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>\n"])


def code() -> str:
    """Return the picture of a code: its matrix, and what each coded model approximates."""
    weights = ("¼", "¼", "½"), ("½", "0", "½")
    parts = [
        box(186 + 110 * column, 16, 96, 44, BLUE, f"expert {column + 1}") for column in range(3)
    ]
    for row, entries in enumerate(weights):
        y = 76 + 56 * row
        parts.append(box(16, y, 150, 44, GREEN, f"coded model {row + 1}"))
        parts += [
            text(234 + 110 * column, y + 29, entry, size=20) for column, entry in enumerate(entries)
        ]
        terms = " + ".join(
            f"{entry} f{'₁₂₃'[place]}" for place, entry in enumerate(entries) if entry != "0"
        )
        parts.append(
            text(520, y + 28, f"≈ {terms}", anchor="start", size=18, more=' font-style="italic"')
        )
    rule = "one row a coded model; weights are not negative, and every row sums to 1"
    parts.append(text(16, 208, rule, anchor="start", size=17))
    return drawing(720, 224, "A code of two coded models over three experts", parts)


KINDS = (
    ("survivors alone", SLATE, "regression", ("a regression", "N − 1 networks", "1")),
    ("coded with survivors", GREEN, "coded model", ("one network", "N networks", "1")),
    (
        "a body with adapters",
        GREEN,
        "body, N adapters",
        ("⅕ network for N = 2", "1 network", "all"),
    ),
    ("compressed copies", SLATE, "N deltas", ("N small deltas", "1 network", "all")),
)
"""Stand-ins: the name, the colour and the name of what is kept; its memory, forwards and losses."""


def kinds() -> str:
    """Return the picture of the four kinds of stand-in."""
    parts = []
    for place, (name, colour, kept, costs) in enumerate(KINDS):
        x, reads = 16 + 222 * place, place < 2
        parts.append(text(x + 97, 24, name, size=17, more=' font-weight="bold"'))
        parts.append(lost_box(x, 40, 60, 48, "1", "lost"))
        for server, label in enumerate(("2", "N")):
            faint = "" if reads else ' opacity="0.3"'
            shape = box(
                x + 67 * (server + 1), 40, 60, 48, BLUE, label, "asked" if reads else "idle"
            )
            parts.append(f"<g{faint}>{shape}</g>")
        parts.append(box(x, 100, 194, 48, colour, kept))
        for line, (what, value) in enumerate(
            zip(("keeps", "runs", "may lose"), costs, strict=True)
        ):
            parts.append(text(x, 178 + 24 * line, f"{what} {value}", anchor="start", size=17))
    return drawing(900, 236, "Four kinds of stand-in, and what each costs", parts)


def nda() -> str:
    """Return the picture of NDA: two accuracies and their ratio."""
    parts = [
        box(230, 16, 480 * 0.96, 40, BLUE, "96 % right"),
        box(230, 68, 480 * 0.93, 40, GREEN, "93 % right"),
        text(218, 42, "the lost expert itself", anchor="end"),
        text(218, 94, "the answers in its place", anchor="end"),
        text(230, 142, "NDA = 93 / 96 = 97 %", anchor="start", size=18),
        text(440, 142, "(for example; on the test set of the lost task)", anchor="start", size=14),
    ]
    return drawing(
        760, 160, "Accuracy of the lost expert, of the answers in its place, and their ratio", parts
    )


def badges() -> str:
    """Return README's badges: the Python versions, the licence and the version that pyproject.toml names."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    versions = [
        name.rpartition(" ")[2] for name in project["classifiers"] if ":: Python :: " in name
    ]
    facts = {
        "Python": f"{versions[0]} to {versions[-1]}",
        "licence": project["license"],
        "version": project["version"],
    }
    parts, x = [], 0
    for name, value in facts.items():
        left, right = 12 + 8 * len(name), 14 + 8 * len(value)
        parts.append(f'<rect x="{x}" width="{left}" height="22" fill="{SLATE}"/>')
        parts.append(f'<rect x="{x + left}" width="{right}" height="22" fill="{BLUE}"/>')
        parts.append(text(x + left / 2, 16, name, "white", 13))
        parts.append(text(x + left + right / 2, 16, value, "white", 13))
        x += left + right + 8
    return drawing(x, 22, "Python versions, licence and version", parts)


PICTURES = {"picture": picture, "code": code, "kinds": kinds, "nda": nda, "badges": badges}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / "results" / f"{name}.svg").write_text(draw(), encoding="utf-8")
