"""The page of an experiment and of a seed: whole, self-contained, and of the files' numbers."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import choose, read_results, write_report
from coin.reporting.results import KEYS, PROMISE_COLUMNS, write_promises, write_results
from coin.reporting.style import as_png
from tests.reporting import conftest

FEW = (*conftest.FEW, ("refit", "keep", (0.95, 0.970, 0.999), 0.3, 4.1, 8400.0))
Make = Callable[..., Path]


class Page:
    """What the tests ask for; every element is closed."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.words = [unescape(word) for word in re.split("<[^>]*>", self.text)]
        self.said = " ".join(" ".join(self.words).split())
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
    folder = make_experiment(seeds=(0, 1, 2), methods=FEW)
    keys = read_results(folder / "seed-2")[list(KEYS)].to_dict("records")
    promises = [[*key.values(), 0.02, 0.95, 400, 149, 0.1, 0.8, 0.75, 0.01] for key in keys]
    write_promises(folder / "seed-2", pd.DataFrame(promises, columns=list(PROMISE_COLUMNS)))
    (folder / "seed-0" / "config.yaml").write_text("name: quickstart\n")
    return folder


def test_a_report_is_whole_and_needs_nothing_from_outside(full: Path):
    path = write_report(full)
    assert path == full / "report.html"
    page = Page(path)
    assert re.findall(r"https?:|url\(", page.text) == []  # no address at all
    titles = ["NDA against memory", "Stand-ins", "NDA by method and decoder", "Task by task", "Experts", "Promises"]
    assert re.findall("<h2>(.*?)</h2>", page.text) == [*titles, "Configuration"]
    assert choose(full)[1] in page.said[: page.said.index(titles[0])]
    assert {item.name for item in (full / "plots").iterdir()} == {"nda_against_memory.png"}
    plot = base64.b64encode((full / "plots/nda_against_memory.png").read_bytes()).decode()
    assert page.sources == [f"data:image/png;base64,{plot}"]
    assert "refit feature_ridge 2 of 2 2.00 80.00 75.00 1.00" in page.said  # promised and found
    # What was run, and how to do it again elsewhere.
    assert "coin run -c quickstart.yaml '--seeds=[0,1,2]'" in page.said
    assert "name: quickstart" in page.said
    assert re.search(r"20\d\d-\d\d-\d\dT.* torch ", page.said)
    assert str(full) not in page.text


def test_the_tables_show_the_numbers_of_the_files(full: Path):
    page = Page(write_report(full))
    rows = pd.concat([read_results(full / f"seed-{seed}") for seed in range(3)])
    linear = rows.groupby(["method", "decoder", "seed"])["nda"].mean()["coin", "linear"]
    assert f"{100 * linear.mean():.2f} ± {100 * linear.std(ddof=1):.2f}" in page.words
    chosen = rows[(rows["method"] == "refit") & (rows["decoder"] == "feature_ridge") & (rows["task"] == "letters")]
    for column in ("decoded_accuracy", "agreement"):
        assert f"{100 * chosen[column].mean():.2f} ± {100 * chosen[column].std(ddof=1):.2f}" in page.words


def test_one_seed_alone_claims_no_spread(make_experiment: Make):
    folder = make_experiment(seeds=(4,), methods=FEW)
    path = write_report(folder / "seed-4")
    assert path == folder / "seed-4" / "report.html"
    page = Page(path)
    assert "nan" not in page.said
    assert re.findall(r"\d ± \d", page.said) == []
    assert "Promises" not in page.said
    assert '"small_resnet"' in page.said  # the configuration of results.json, where there is no config.yaml


HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


def test_hostile_names_are_escaped(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a",), methods=FEW)
    rows = [replace(row, experiment=HOSTILE, task=HOSTILE, erased=HOSTILE) for row in rows]
    rows += [replace(row, method=HOSTILE, decoder=HOSTILE, nda=1.0) for row in rows if row.decoder == "ridge"][1:2]
    write_results(tmp_path, rows, {"name": HOSTILE, HOSTILE: [HOSTILE]})
    assert HOSTILE in Page(write_report(tmp_path)).said  # shown as it stands


def test_larger_erasures_and_undefined_numbers(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a", "b", "c"), methods=FEW)
    own = [row for row in rows if row.task == "a" and row.method == "coin"]
    both = [(f"{a}+{b}", task) for a, b in ("ab", "ac", "bc") for task in (a, b)]
    pairs = [replace(row, erased=lost, task=task, code_row="0+1", nda=0.5) for row in own for lost, task in both]
    unknown = [replace(row, method="ties", nda=float("nan")) for row in rows if row.method == "coin"]
    infinite = [replace(row, method="regmean", residual=float("inf")) for row in rows if row.method == "coin"]
    write_results(tmp_path, rows + pairs + unknown + infinite, {})
    page = Page(write_report(tmp_path))
    assert "2 of 3 lost" in page.said
    assert "50.00*" in page.words


def test_what_cannot_be_reported_is_one_clear_line(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileError, match=r"coin run[^\n]*$"):
            write_report(folder)
