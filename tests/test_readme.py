"""The Python of README and docs runs, and the links, files and commands of all pages exist."""

import importlib
import pydoc
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import nbformat
import pytest
import torch

import coin
from coin.cli import main
from coin.commands import COMMANDS
from coin.commands.arguments import apply_common_options
from coin.reporting.results import COLUMNS, KEYS, PROMISE_COLUMNS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("notebooks/docs/*.md"))
PAGES = [README, *sorted(ROOT.glob("notebooks/*.md")), *DOCS, *sorted(ROOT.glob(".github/**/*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"(?m)^([a-z-]+):", MAKEFILE)


def text_of(page):
    """The Markdown of a page or of a notebook."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    cells = nbformat.read(page, 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def write_files_of(page, folder):
    """Write the files of the user's that a page shows."""
    files = re.findall(r"(?s)```python\n# (\w+\.py),.*?\n(.*?)```", text_of(page))
    for name, code in files:
        (folder / name).write_text(code)


@pytest.fixture
def run_page(monkeypatch, tmp_path):
    """Runs the Python of a page from top to bottom in an empty folder, and returns its names."""
    sybil = pytest.importorskip("sybil")
    markdown = pytest.importorskip("sybil.parsers.markdown")

    def run(page):
        torch.manual_seed(0)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
        write_files_of(page, tmp_path)
        document = sybil.document.Document.parse(str(page), markdown.PythonCodeBlockParser())
        for example in document.examples():
            example.evaluate()
        return document.namespace

    return run


def test_the_readmes_stand_in_answers_as_the_lost_expert(run_page):
    names = run_page(README)
    experts, inputs = names["experts"], names["samples"][0][0]
    own = experts[0](inputs)
    assert (names["answers"].argmax(1) == own.argmax(1)).float().mean() > 0.8
    again = coin.Coded.load("system.safetensors", experts)
    assert torch.equal(again.answer(inputs, expert="birds"), names["answers"])


def test_a_page_measures_a_system_and_keeps_it(run_page):
    names = run_page(ROOT / "notebooks/docs/networks.md")
    assert set(names["table"].decoder) == {"linear", "ridge", "feature_ridge", "expert_head"}
    again = coin.Coded.load("system.safetensors", names["experts"])
    assert torch.equal(again.decode(names["inputs"], [0, 2]), names["answers"])


WITH_PYTHON = [page for page in DOCS if "```python" in text_of(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, run_page):
    run_page(page)


def test_every_public_name_is_there_and_shown_by_help():
    assert dir(coin) == sorted([*coin.__all__, "data", "errors"])
    assert all(getattr(coin, name) is not None for name in dir(coin))
    printed = pydoc.plain(pydoc.render_doc(coin))
    assert sorted(re.findall(r"(?m)^    (?:class )?(\w+)\(", printed)) == coin.__all__
    first_named = re.findall(r"(?m)^    (\w+)(?=[ ,])", coin.__doc__)
    assert len(first_named) == 7
    assert set(first_named) < set(coin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coin.nothing  # noqa: B018


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text_of(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
FILE = r"(?:configs/[a-z\d_/.-]+|notebooks/[\w/.-]+)\.(?:yaml|ipynb|md|py|csv|svg|png)"


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.stem)
def test_links_and_named_files_lead_somewhere(page):
    text = text_of(page)
    prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(FILE, text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in TARGETS, target


def shell_blocks_of(page):
    return re.findall(r"(?s)```bash\n(.*?)```", text_of(page))


def commands_of(page):
    """Return the words behind ``coin`` in each line of a page's shell blocks."""
    shell = "\n".join(shell_blocks_of(page)).replace("\\\n", " ")
    commands = re.findall(r"\bcoin ([a-z]+ .*)", shell)
    return [shlex.split(command, comments=True) for command in commands]


@cache
def options_of(command):
    """Return the options that a command's help lists."""
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        main([command, "--help"])
    return set(re.findall(r"--([\w-]+)", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_have_their_options_and_files(page):
    for command, *arguments in commands_of(page):
        assert command in COMMANDS
        apply_common_options(arguments)
        for option in re.findall(r"(?m)^--([\w-]+)", "\n".join(arguments)):
            assert option in options_of(command) | {"print_config"}


def test_pages_show_commands():
    assert sum(len(commands_of(page)) for page in PAGES) >= 19


def test_every_column_is_described():
    text = text_of(ROOT / "notebooks/docs/files.md")
    told = {}
    for part in re.split(r"\n## (?=`\w+\.csv`)", text)[1:]:
        told[part.split("`")[1]] = re.findall(r"(?m)^\| `(\w+)` \|", part)
    assert told["results.csv"] == list(COLUMNS)
    assert told["promise.csv"] == list(PROMISE_COLUMNS[len(KEYS) :])


@pytest.mark.slow
def test_the_sites_reference_has_every_command_and_every_name(monkeypatch):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    reference = importlib.import_module("reference")
    start, *sections = reference.commands().split("\n## ")
    assert f"[the options of Lightning's Trainer]({reference.TRAINER})" in start
    commands = [part.partition("\n")[0] for part in sections]
    assert commands == [f"coin {command}" for command in COMMANDS]
    for part in sections:
        assert re.search(r"(?m)^- `-*\w[\w-]*", part), part
    names = re.findall(r"(?m)^::: coin\.(\w+)$", reference.api())
    assert sorted(names) == coin.__all__


def test_top_level_is_what_the_owner_named():
    folders = {"coin", "configs", "tests", "notebooks"}
    files = {"pyproject.toml", "Makefile", "README.md", "LICENSE"}
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - {"runs", "data", "dist", "wandb", "lightning_logs"} == folders | files
