"""Every table of measured numbers in the README and the docs is the stored results' in notebooks/results."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PAGES = [NOTEBOOKS.parent / "README.md", *sorted(NOTEBOOKS.glob("docs/*.md"))]


def script(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(NOTEBOOKS), *sys.path])
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def tables():
    return script("tables")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_stored_results(path, tables):
    text = path.read_text(encoding="utf-8")
    advice = "run `python notebooks/tables.py` and commit what it writes"
    assert tables.with_tables(text) == text, advice


def test_every_table_stands_somewhere_and_numbers_with_a_spread_in_tables_alone(tables):
    assert sorted(PAGES) == sorted(tables.FILES)
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert sorted(re.findall("<!-- table: (.*?) -->", text)) == sorted(tables.TABLES)
    assert text.count("<!-- table: ") == text.count("<!-- end -->")
    prose = re.sub(r"(?s)<!-- table: .*?<!-- end -->|```.*?```", "", text)
    assert re.findall(r"\d ± \d", prose) == []


def test_suites_have_at_least_two_runs(tables):
    for suite in tables.SUITES:
        assert tables.measured(suite).run.nunique() >= 2


def test_pictures_are_what_their_script_draws():
    for name, draw in script("picture").PICTURES.items():
        assert (NOTEBOOKS / f"results/{name}.svg").read_text(encoding="utf-8") == draw()


def test_figures_have_the_numbers_of_the_results(tables):
    assert {*tables.FIGURES} == {"stand-ins", "fleet", "failover"}
    for name, draw in tables.FIGURES.items():
        with Image.open(NOTEBOOKS / f"results/{name}.png") as image:
            assert image.info["Description"] == tables.labels(draw())
