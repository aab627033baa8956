"""Every table of measured numbers in the README and the docs is the stored results' in notebooks/results."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
README = NOTEBOOKS.parent / "README.md"
PAGES = [README, *sorted(NOTEBOOKS.glob("docs/*.md"))]


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(NOTEBOOKS), *sys.path])
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("tables")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_stored_results(path: Path, tables: ModuleType) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run `python notebooks/tables.py` and commit what it writes"


def test_every_table_stands_somewhere(tables: ModuleType) -> None:
    assert sorted(PAGES) == sorted(tables.FILES)
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert sorted(re.findall("<!-- table: (.*?) -->", text)) == sorted(tables.TABLES)
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_numbers_with_a_spread_stand_in_tables_alone(tables: ModuleType) -> None:
    for path in PAGES:
        prose = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.findall(r"\d ± \d", prose) == []


def test_simulations_have_twenty_seeds_and_eight_experts_five(tables: ModuleType) -> None:
    assert set(tables.simulated("stragglers", 3).seeds) == {20}
    rows = tables.measured("experts")
    assert rows[rows.groupby("experiment").task.transform("nunique") == 8].seed.nunique() == 5


def test_with_features_refit_is_ahead_with_few_samples_and_distillation_with_many(tables: ModuleType) -> None:
    rows = tables.measured("samples")
    assert set(rows.samples_per_task) == {25, 100, 200, 400, 1600}
    for count, own in rows.groupby("samples_per_task"):
        refit, distilled = (tables.ndas(own, method, "feature_ridge").mean() for method in ("refit", "distillation"))
        assert count == 200 or (refit > distilled) == (count < 200)


def test_pictures_are_what_their_script_draws() -> None:
    for name, draw in script("picture").PICTURES.items():
        assert (NOTEBOOKS / f"results/{name}.svg").read_text(encoding="utf-8") == draw()


def test_the_readmes_figure_has_the_numbers_of_the_results(tables: ModuleType) -> None:
    (path,) = re.findall(r"!\[.*?\]\((\S+stand-ins\.png)\)", README.read_text(encoding="utf-8"))
    with Image.open(NOTEBOOKS.parent / path) as image:
        said = image.info["Description"]
    assert said == tables.labels(tables.figure())
    assert said.count(";") == len(tables.DRAWN) - 1
