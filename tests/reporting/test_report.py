"""The page of an experiment and of a seed: whole, self-contained, and of the files' numbers."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import read_results, write_report
from coin.reporting.extras import PROMISE_COLUMNS, Examples, write_examples, write_promises
from coin.reporting.results import KEYS, write_results
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
        self.found = {
            name: list(map(unescape, re.findall(f' {name}="([^"]*)"', self.text))) for name in ("href", "src", "id")
        }
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
    answers = np.array([0, 1, 1])
    decoded = {"refit|keep|feature_ridge": np.array([0, 0, 1]), "coin|auto|feature_ridge": np.array([1, 0, 1])}
    images = np.zeros((3, 4, 4, 3), np.uint8)
    examples = Examples(images, answers, answers, decoded, ("cat", "dog"), ("mnist", "mnist", "letters"))
    write_examples(folder / "seed-0", examples)
    keys = read_results(folder / "seed-2")[list(KEYS)].to_dict("records")
    promises = [[*key.values(), 0.02, 0.95, 400, 149, 0.1, 0.8, 0.75, 0.01] for key in keys]
    write_promises(folder / "seed-2", pd.DataFrame(promises, columns=list(PROMISE_COLUMNS)))
    (folder / "seed-0" / "config.yaml").write_text("name: quickstart\n")
    (folder / "seed-1/wandb/offline-run-1").mkdir(parents=True)
    (folder / "summary.csv").touch()
    return folder


def test_a_report_is_whole_and_needs_nothing_from_outside(full: Path):
    path = write_report(full)
    assert path == full / "report.html"
    page = Page(path)
    assert re.findall(r"https?:|url\(", page.text) == []  # no address at all
    assert len(set(page.found["id"])) == len(page.found["id"])
    assert {link[1:] for link in page.found["href"] if link.startswith("#")} == set(page.found["id"])
    beside = [link for link in page.found["href"] if not link.startswith(("#", "data:"))]
    assert {"summary.csv", "seed-0/results.csv", "seed-2/promise.csv"} <= set(beside)
    assert all((full / link).is_file() for link in beside)
    titles = "What to keep", "Examples", "Methods and decoders", "Task by task", "Experts", "How to reproduce"
    assert re.findall("<h2>(.*?)</h2>", page.text) == list(titles)
    first = page.text[: page.text.index("<h2>")]
    assert "When one of 2 experts is lost, refit keeps 9" in first
    assert re.search("above 9.*NDA: how often the answer for a lost expert is right ÷", first, re.DOTALL)
    assert first.count("<img") == 1  # what is kept
    assert {item.name for item in (full / "plots").iterdir()} == {"nda_against_memory.png"}
    plot = base64.b64encode((full / "plots/nda_against_memory.png").read_bytes()).decode()
    assert f"data:image/png;base64,{plot}" in page.found["src"]
    assert "Keep refit with feature_ridge (9" in page.said  # what coin choose says of 98 %
    assert "1 of 2 for refit, 2 of 2 for coin" in page.said  # examples that differ, of the best method and coin
    assert page.text.count('class="differs"') == 3
    assert re.search(r"refit 2 of 2 2\.00 80\.00 75\.00 1\.00", page.said)  # promised and found
    # What was run, and how to do it again elsewhere.
    assert "coin run -c quickstart.yaml '--seeds=[0,1,2]' --output=runs" in page.said
    assert str(full) not in page.text
    (config,) = [link for link in page.found["href"] if link.startswith("data:text/yaml")]
    assert base64.b64decode(config.partition(",")[2]) == b"name: quickstart\n"
    assert "find . -name 'offline-run-*' -exec wandb sync {} +" in page.said
    for words in ("mnist (MNIST5k)", "small_resnet, inputs of size 32", "[[0.5, 0.5]]", "torch ", "seeds 0, 1, 2"):
        assert words in page.said, words
    assert re.search(r"date 20\d\d-\d\d-\d\d \d\d:\d\d", page.said)


def test_the_tables_show_the_numbers_of_the_files(full: Path):
    page = Page(write_report(full))
    rows = pd.concat([read_results(full / f"seed-{seed}") for seed in range(3)])
    nda = rows.groupby(["method", "decoder", "seed"])["nda"].mean()
    linear = nda["coin", "linear"]
    assert f"{100 * linear.mean():.2f} ± {100 * linear.std(ddof=1):.2f}" in page.words
    gain = nda["refit", "feature_ridge"] - nda["coin", "feature_ridge"]
    assert f"{-100 * gain.mean():+.2f} ± {100 * gain.std(ddof=1):.2f}" in page.words
    chosen = rows[(rows["method"] == "refit") & (rows["decoder"] == "feature_ridge") & (rows["task"] == "letters")]
    for column in ("decoded_accuracy", "agreement"):
        assert f"{100 * chosen[column].mean():.2f} ± {100 * chosen[column].std(ddof=1):.2f}" in page.words
    # On a phone there are the method and its best decoder.
    methods = page.text[page.text.index("<h2>Methods and decoders</h2>") :]
    head = methods[methods.index("<thead>") : methods.index("</thead>")]
    narrow = [name for kind, name in re.findall(r'class="(wide)?">([^<]*)</th>', head) if not kind]
    assert narrow == ["method", "NDA", "decoder"]


def test_one_seed_alone_claims_no_spread(make_experiment: Make):
    folder = make_experiment(seeds=(4,), methods=FEW)
    path = write_report(folder / "seed-4")
    assert path == folder / "seed-4" / "report.html"
    page = Page(path)
    assert "One seed only" in page.said
    assert "nan" not in page.said
    assert re.findall(r"\d ± \d", page.said) == []
    assert not re.search("(Examples|Differences)</h", page.text)


HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


def test_hostile_names_are_escaped(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a",), methods=FEW)
    rows = [replace(row, experiment=HOSTILE, task=HOSTILE, erased=HOSTILE) for row in rows]
    rows += [replace(row, method=HOSTILE, decoder=HOSTILE, nda=1.0) for row in rows if row.decoder == "ridge"][1:2]
    write_results(tmp_path, rows, {"name": HOSTILE, HOSTILE: [HOSTILE]}, wandb_url="https://wandb.ai/me")
    zero = np.array([0])
    decoded = {f"{HOSTILE}|auto|{HOSTILE}": zero}
    write_examples(tmp_path, Examples(np.zeros((1, 2, 2, 3), np.uint8), zero, zero, decoded, (HOSTILE,), (HOSTILE,)))
    page = Page(write_report(tmp_path))
    assert HOSTILE in page.said  # shown as it stands
    assert "https://wandb.ai/me" in page.found["href"]
    assert f"is {HOSTILE} expert: {HOSTILE}" in page.said


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
    assert "for: ties." in page.said
    assert "50.00" in page.words


def test_what_cannot_be_reported_is_one_clear_line(full: Path, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileError, match=r"coin run[^\n]*$"):
            write_report(folder)
    (full / "seed-0" / "examples.npz").write_bytes(b"nothing")  # an error, not a gap
    with pytest.raises(FileError, match=r"examples\.npz"):
        write_report(full)
    assert not (full / "report.html").exists()


def test_it_says_what_every_method_chose(make_experiment: Make, measure):
    folder = make_experiment(seeds=(0, 1), methods=FEW)
    for seed, policy in enumerate(("average", "recalibrate")):
        chosen = {"batchnorm": policy, "fisher_data": "own", "held_out_error": {"own/average": 0.5}}
        every = {"coin": chosen, "distillation": {"lr": 0.0003, "steps": 400}, "ties": {}}
        made = [{"label": label, "chosen": own} for label, own in every.items()]
        write_results(folder / f"seed-{seed}", measure(seed, methods=FEW)[0], {}, methods=made)
    page = Page(write_report(folder))
    said = page.said[page.said.rindex("What was chosen") : page.said.rindex("How to reproduce")]
    assert "coin batchnorm: average, recalibrate; fisher_data: own distillation lr: 0.0003; steps: 400" in said
    assert "held_out_error" not in said
    assert "ties" not in said
