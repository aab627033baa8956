"""The page of an experiment and of a seed: whole, self-contained, and of the files' numbers."""

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import choose, read_results, standin_table, standins, write_report
from coin.reporting.figures import as_png
from coin.reporting.results import write_results
from tests.reporting import conftest
from tests.reporting.conftest import BASE

FEW = (*conftest.FEW, conftest.METHODS[1], ("refit", "keep", (0.95, 0.970, 0.999), 0.3, 4.1, 8400.0))
Make = Callable[..., Path]


class Page:
    """What the tests ask for; every element is closed."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.words = [unescape(word) for word in re.split("<[^>]*>", self.text)]
        self.said = " ".join(" ".join(self.words).split())
        self.cells = [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", self.text)]
        self.sources = re.findall(' src="([^"]*)"', self.text)
        assert re.findall(" on[a-z]+=|<script", self.text) == []
        for tag in set(re.findall(r"</(\w+)>", self.text)):
            assert len(re.findall(f"<{tag}[ >]", self.text)) == self.text.count(f"</{tag}>"), tag


@pytest.fixture(autouse=True)
def coarse_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_png, "__defaults__", (20,))


@pytest.fixture
def full(make_experiment: Make) -> Path:
    """Everything that a run leaves."""
    return make_experiment(seeds=(0, 1, 2), methods=FEW)


def test_a_report_is_whole_and_needs_nothing_from_outside(full: Path):
    path = write_report(full)
    assert path == full / "report.html"
    page = Page(path)
    assert re.findall(r"https?:|url\(", page.text) == []  # no address at all
    assert choose(full)[1] in page.said
    assert {item.name for item in (full / "plots").iterdir()} == {"nda_against_memory.png"}
    plot = base64.b64encode((full / "plots/nda_against_memory.png").read_bytes()).decode()
    assert page.sources == [f"data:image/png;base64,{plot}"]
    assert "network: name: small_resnet" in page.said  # what was run
    assert re.search(r"20\d\d-\d\d-\d\dT.* torch ", page.said)
    assert str(full) not in page.text


def test_the_table_is_that_of_the_terminal_with_the_numbers_of_the_files(full: Path):
    page = Page(write_report(full))
    rows = pd.concat([read_results(full / f"seed-{seed}") for seed in range(3)])
    table = standin_table(standins(rows, oracle=True))
    assert [cell for cell in page.cells if cell] == [*table, *table.to_numpy().ravel()]
    linear = rows.groupby(["method", "decoder", "seed"])["nda"].mean()["coin", "linear"]
    assert f"{100 * linear.mean():.2f} ± {100 * linear.std(ddof=1):.2f}" in page.words


def test_one_seed_alone_claims_no_spread(make_experiment: Make):
    folder = make_experiment(seeds=(4,), methods=FEW)
    path = write_report(folder / "seed-4")
    assert path == folder / "seed-4" / "report.html"
    page = Page(path)
    assert "nan" not in page.said
    assert re.findall(r"\d ± \d", page.said) == []


HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


def test_hostile_names_are_escaped(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a",), methods=FEW)
    rows = [replace(row, experiment=HOSTILE, task=HOSTILE, erased=HOSTILE) for row in rows]
    rows += [replace(row, method=HOSTILE, decoder=HOSTILE, nda=1.0) for row in rows if row.decoder == "ridge"][1:2]
    write_results(tmp_path, rows, {"name": HOSTILE, HOSTILE: [HOSTILE]})
    page = Page(write_report(tmp_path))
    assert HOSTILE in page.said  # shown as it stands
    assert page.cells.count(HOSTILE) == 2


def test_an_expert_that_is_never_right_leaves_a_report_without_a_recommendation(tmp_path: Path):
    costs = {"memory_mib": 1.0, "resident_mib": 1.0, "forwards": 1.0, "losses": 1.0}
    good = replace(BASE, **costs)
    never = replace(good, task="b", erased="b", expert_accuracy=0.0, decoded_accuracy=0.0, nda=math.nan)
    write_results(tmp_path, [good, never], {})
    page = Page(write_report(tmp_path))
    assert "Nothing can be recommended: no stand-in has a known NDA and memory." in page.said
    assert "Experts, own accuracy in %: a 90.00, b 0.00." in page.said


def test_what_cannot_be_reported_is_one_clear_line(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileError, match=r"coin run[^\n]*$"):
            write_report(folder)
