"""The site's pages that lie elsewhere or nowhere: README, contributing, and the reference, from what the code says.

A hook of MkDocs: see ``.mkdocs.yml``.
"""

import io
import re
from contextlib import redirect_stdout, suppress
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import coin
from coin.cli import main
from coin.commands import COMMANDS

ROOT = Path(__file__).parent.parent
LINKS = {
    "](notebooks/": "](",
    "](../notebooks/": "](",
    "](../../README": "](../index",
    "](.github/CONTRIBUTING": "](contributing",
    "](../../.github/CONTRIBUTING": "](../contributing",
    "[Apache-2.0](LICENSE)": "Apache-2.0",
}
"""How links between files of the repository are written on the site."""
TRAINER = "https://lightning.ai/docs/pytorch/stable/common/trainer.html#trainer-flags"
FORMULA = re.compile(r"(\${1,2})([^$<]+?)\1")
OPTION = re.compile(r"^  (-\S.*?|\w+)(?:  +(\S.*))?$")
SHARED = re.compile(r"- `(-h|--help|--config|--print_config|\S+\.help|.* CONFIG`)")
"""Options that every command or every section has."""
LIGHTNINGS = re.compile(r"- `--trainer\.|\*\*Lightning's Trainer")
"""Options of the Trainer, which Lightning describes."""
SUBCLASSES = re.compile(r", known subclasses: [^)]*")
TITLES = {"<class 'lightning": "The module", "A DataModule": "The data"}
"""What sections of options are called whose own names say little, by how these begin."""
ROOMS = {
    "coin.modules": "A system of experts and coded models",
    "coin.coding": "Codes, decoders, promises",
    "coin.coding.metrics": "Metrics",
    "coin.merging": "Merge methods in closed form",
    "coin.distillation": "Merge methods that train",
    "coin.networks": "BatchNorm, compressed networks",
    "coin.reporting.choice": "What to keep of an experiment",
    "coin.statistics": "Fishers and Gram matrices",
}
TASKS = ["ImageFolder", "TextFile", "MNIST5k", "Digits", "Glyphs", "TorchvisionTask"]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to the site."""
    pages = {"index": text("README.md"), "contributing": text(".github/CONTRIBUTING.md")}
    for name, content in (pages | {"docs/commands": commands(), "docs/api": api()}).items():
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links are the site's."""
    for repository, site in LINKS.items():
        markdown = markdown.replace(repository, site)
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Return a notebook with the site's links, and its formulas as MathML, which browsers show by themselves."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r'href="([\w/-]+)\.(md|ipynb)(?=["#])', r'href="\1.html', html)

    def mathml(found: re.Match[str]) -> str:
        return convert(unescape(found[2]), "block" if found[1] == "$$" else "inline")

    parts = re.split(
        r"(<pre.*?</pre>|<script.*?</script>|<style.*?</style>|<svg.*?</svg>)",
        html,
        flags=re.DOTALL,
    )
    parts[::2] = [FORMULA.sub(mathml, part) for part in parts[::2]]
    return "".join(parts)


def text(name: str) -> str:
    """Return a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> str:
    """Return the page of all commands and their options."""
    head = f"""# Commands

Every command takes YAML files or names of shipped ones (`-c`, several stack), its options, and `--print_config`.
`fit`, `fisher` and `evaluate` need a Trainer, and are LightningCLI's: they
take `--trainer.` with [the options of Lightning's Trainer]({TRAINER}), and
`--trainer.matmul_precision`.
"""
    return "\n".join([head, *(command(name, what) for name, what in COMMANDS.items())])


def command(name: str, what: str) -> str:
    """Return a command's options as Markdown, from its help."""
    printed = io.StringIO()
    with patch.dict("os.environ", COLUMNS="100000"), redirect_stdout(printed), suppress(SystemExit):
        main([name, "--help"])
    lines = [f"## coin {name}", "", what, ""]
    for line in printed.getvalue().partition("\n\n")[2].splitlines():
        if option := OPTION.match(line):
            shown = next(
                (each for each in option[1].split(", ") if each.startswith("--")), option[1]
            )
            lines.append(f"- `{shown}` {escaped(option[2] or '')}")
        elif line.startswith("   "):
            lines[-1] += escaped(line.strip())
        elif line.endswith(":") and line != "options:":
            title = next(
                (name for start, name in TITLES.items() if line.startswith(start)),
                line.removesuffix(":"),
            )
            lines += ["", f"**{title}**", ""]
    kept = [line for line in lines if not SHARED.match(line) and not LIGHTNINGS.match(line)]
    return "\n".join(SUBCLASSES.sub("", line) for line in kept) + "\n"


def escaped(text: str) -> str:
    """Return a line of help with its code as Markdown's."""
    text = re.sub(r"`([^`<]+) <(\S+)>`_", r"[\1](\2)", text)
    return re.sub(r"``(.*?)``", r"`\1`", text.replace(":paramref:", "")).replace("<", "&lt;")


def api() -> str:
    """Return the page of all names of `import coin`, and of the tasks."""
    start = [
        line.removeprefix(">>> ")
        for line in (coin.__doc__ or "").splitlines()
        if line.startswith(">>> ")
    ]
    lines = [
        "# Python",
        "",
        "The names of `import coin`, and the tasks of `coin.data`. Examples start from:",
        "",
    ]
    lines += ["```python", *start, "```", ""]
    for room, title in ROOMS.items():
        names = [f"coin.{name}" for name in sorted(coin._HOMES[room.removeprefix("coin.")].split())]
        lines += [f"## {title}", "", *(f"::: {name}\n" for name in names)]
    lines += ["## Tasks", "", *(f"::: coin.data.{name}\n" for name in TASKS)]
    return "\n".join(lines)
