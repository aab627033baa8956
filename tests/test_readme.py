"""The Python of README and docs runs, and the links, files and commands of all pages exist."""

import importlib
import pydoc
import re
import shlex
import sys
from collections.abc import Callable
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
TARGETS = re.findall(
    r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
)


@pytest.fixture
def run_page(monkeypatch, tmp_path):
    """Runs the Python of a page from top to bottom in an empty folder, and returns its names."""
    sybil = pytest.importorskip("sybil")
    markdown = pytest.importorskip("sybil.parsers.markdown")

    def run(page: Path) -> dict[str, object]:
        torch.manual_seed(0)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
        for name, code in re.findall(
            r"```python\n# (\w+\.py),.*?\n(.*?)```", page.read_text(), flags=re.DOTALL
        ):
            Path(name).write_text(code)  # a file of the user's
        document = sybil.document.Document.parse(str(page), markdown.PythonCodeBlockParser())
        for example in document.examples():
            example.evaluate()
        return document.namespace

    return run


def test_the_readmes_stand_in_answers_as_the_lost_expert(run_page) -> None:
    names = run_page(README)
    experts, inputs = names["experts"], names["samples"][0][0]
    own = experts[0](inputs)
    assert (names["answers"].argmax(1) == own.argmax(1)).float().mean() > 0.8
    again = coin.Coded.load("system.safetensors", experts)
    assert torch.equal(again.answer(inputs, expert="birds"), names["answers"])


def test_a_page_measures_a_system_and_keeps_it(run_page) -> None:
    names = run_page(ROOT / "notebooks/docs/networks.md")
    assert set(names["table"].decoder) == {"linear", "ridge", "feature_ridge", "expert_head"}
    again = coin.Coded.load("system.safetensors", names["experts"])
    assert torch.equal(again.decode(names["inputs"], [0, 2]), names["answers"])


@pytest.mark.parametrize(
    "page",
    [page for page in DOCS if "```python" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page, run_page) -> None:
    run_page(page)


def test_every_public_name_is_there_and_shown_by_help() -> None:
    assert dir(coin) == sorted([*coin.__all__, "data", "errors"])
    assert all(getattr(coin, name) is not None for name in dir(coin))
    printed = pydoc.plain(pydoc.render_doc(coin))
    assert sorted(re.findall(r"(?m)^    (?:class )?(\w+)\(", printed)) == coin.__all__
    first_named = re.findall(r"(?m)^    (\w+)(?=[ ,])", coin.__doc__ or "")
    assert len(first_named) == 7
    assert set(first_named) < set(coin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coin.nothing  # noqa: B018


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def text_of(page: Path) -> str:
    """The Markdown of a page or of a notebook."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(
        cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown"
    )


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("notebooks/*.ipynb"))], ids=lambda page: page.stem
)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    text = text_of(page)
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(
        r"(?:configs/[a-z\d_/.-]+|notebooks/[\w/.-]+)\.(?:yaml|ipynb|md|py|csv|svg|png)", text
    ):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in TARGETS, target


def commands_of(page: Path) -> list[list[str]]:
    """Return the words behind ``coin`` in each line of a page's shell blocks."""
    found = []
    for block in re.findall(
        r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        commands = re.findall(r"\bcoin ([a-z]+ .*)", block.replace("\\\n", " "))
        found += [shlex.split(command, comments=True) for command in commands]
    return found


@pytest.fixture(scope="module")
def options_of() -> Callable[[str], set[str]]:
    """Return a function that returns the options that a command's help lists."""

    @cache
    def read(command: str) -> set[str]:
        with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
            main([command, "--help"])
        return set(re.findall(r"--([\w-]+)", printed.getvalue()))

    return read


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_have_their_options_and_files(
    page: Path, options_of: Callable[[str], set[str]]
) -> None:
    for command, *arguments in commands_of(page):
        assert command in COMMANDS
        apply_common_options(arguments)
        for argument in arguments:
            option = re.match(r"--([\w-]+)", argument)
            assert option is None or option[1] in options_of(command) | {"print_config"}, argument


def test_pages_show_commands() -> None:
    assert sum(len(commands_of(page)) for page in PAGES) >= 19


def test_every_column_is_described() -> None:
    text = (ROOT / "notebooks/docs/files.md").read_text(encoding="utf-8")
    parts = {part.split("`")[1]: part for part in re.split(r"\n## (?=`\w+\.csv`)", text)[1:]}
    told = {
        name: re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE)
        for name, part in parts.items()
    }
    assert told["results.csv"] == list(COLUMNS)
    assert told["promise.csv"] == list(PROMISE_COLUMNS[len(KEYS) :])


@pytest.mark.slow
def test_the_sites_reference_has_every_command_and_every_name(monkeypatch) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    reference = importlib.import_module("reference")
    page = reference.commands()
    sections = {part.partition("\n")[0]: part for part in page.split("\n## coin ")[1:]}
    assert list(sections) == list(COMMANDS)
    assert (
        f"[the options of Lightning's Trainer]({reference.TRAINER})" in page.partition("\n## ")[0]
    )
    for command, part in sections.items():
        options = {
            name.replace("-", "_")
            for name in re.findall(r"^- `-*(\w[\w-]*)", part, flags=re.MULTILINE)
        }
        assert options, command
    assert (
        sorted(re.findall(r"^::: coin\.(\w+)$", reference.api(), flags=re.MULTILINE))
        == coin.__all__
    )


def test_top_level_is_what_the_owner_named() -> None:
    allowed = {
        "pyproject.toml",
        "coin",
        "configs",
        "tests",
        "notebooks",
        "Makefile",
        "README.md",
        "LICENSE",
    }
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - {"runs", "data", "dist", "wandb", "lightning_logs"} == allowed
