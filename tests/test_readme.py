"""The README's Python runs, and the links, files and commands of all pages exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import coin
from coin.reporting.extras import PROMISE_COLUMNS, RISK_COLUMNS
from coin.reporting.results import COLUMNS, KEYS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.md")), *sorted(ROOT.glob(".github/**/*.md"))]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_its_python_runs_and_the_coded_model_answers_as_the_lost_expert(monkeypatch, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # it writes a file
    names: dict[str, Any] = {}
    first, *others = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(first, "README.md", "exec"), names)
    assert float(re.findall(r"\d\.\d+", capsys.readouterr().out)[0]) > 0.8
    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert set(names["table"].decoder) == {"linear", "ridge", "feature_ridge", "expert_head"}
    again = coin.Coded.load("system.safetensors", names["experts"])
    assert torch.equal(again.decode(names["inputs"], [0])[0], names["answers"])


def test_every_public_name_is_there() -> None:
    for name in coin.__all__:
        assert getattr(coin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coin.nothing  # noqa: B018


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"(?:configs|notebooks)/[\w/.-]+\.(?:yaml|ipynb|md|py|csv|svg|png)", text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in TARGETS, target


def test_the_benchmarks_page_tells_of_every_column_and_names_files_that_exist() -> None:
    text = (ROOT / "notebooks/BENCHMARK.md").read_text(encoding="utf-8")
    parts = {part.split("`")[1]: part for part in re.split(r"\n## (?=`\w+\.csv`)", text)[1:]}
    told = {name: re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE) for name, part in parts.items()}
    assert told["results.csv"] == list(COLUMNS)
    assert told["risk.csv"] == list(RISK_COLUMNS[len(KEYS) :])
    assert told["promise.csv"] == list(PROMISE_COLUMNS[len(KEYS) :])


def test_top_level_is_what_the_owner_named() -> None:
    allowed = {"pyproject.toml", "coin", "configs", "tests", "notebooks", "Makefile", "README.md", "LICENSE"}
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - {"runs", "data", "dist", "wandb", "lightning_logs"} == allowed
