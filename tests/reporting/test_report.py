import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import (
    Examples,
    read_confusions,
    read_results,
    write_examples,
    write_layers,
    write_report,
    write_results,
)
from coin.reporting.sources import read_sources

FEW = (
    ("none", "", (None, 0.56, 0.91), float("nan"), 0.0, 0.0),
    ("average", "auto:average", (0.857, 0.966, 0.9835), 0.61, 0.0, 0.0),
    ("coin", "auto:recalibrate", (0.867, 0.960, 0.984), 0.58, 4.1, 8400.0),
)
VOID = {"meta", "link", "br", "img", "hr", "use", "path"}
Make = Callable[..., Path]


class Page(HTMLParser):
    """Collects what the tests ask for, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.identifiers: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("href", "src", "action", "data") and value is not None:
                self.links.append(value)
            if name == "id" and value is not None:
                self.identifiers.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def layers_of(*variants: tuple[str, str]) -> pd.DataFrame:
    """Two layers each; policies change no parameters."""
    rows = [
        {
            "method": method, "batchnorm": policy, "code_row": "0", "layer": layer,
            "fisher_share": None if method == "average" else share, "distance": 0.0 if method == "average" else far,
        }
        for method, policy in variants
        for layer, share, far in (("stem", 0.1, 0.2), ("head", 0.9, 0.3))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def full(make_experiment: Make) -> Path:
    folder = make_experiment(seeds=(0, 1), methods=FEW, with_confusions=True)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    answers = np.array([0, 1, 1])
    examples = Examples(
        images, answers, np.array([0, 0, 1]), answers, ("cat", "dog"), ("mnist", "mnist", "letters"), (5, 2, 9),
        "coin (BatchNorm: average)", "ridge", "the last ones",
    )  # fmt: skip
    write_examples(folder / "seed-0", examples)
    write_layers(folder / "seed-1", layers_of(("average", "auto"), ("coin", "auto"), ("coin", "recalibrate")))
    return folder


def test_a_report_is_whole_and_needs_nothing_from_outside(full: Path):
    path = write_report([full])
    assert path == full.resolve() / "report.html"
    text, parsed = page(path)
    # No address at all: neither a request nor a namespace.
    assert "http:" not in text
    assert "https:" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert "script" not in parsed.tags
    local = {link[1:] for link in parsed.links if link.startswith("#")}
    local |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert local <= set(parsed.identifiers)
    assert len(set(parsed.identifiers)) == len(parsed.identifiers)
    words = " ".join(parsed.words)
    for expected in (
        "What was run", "What the numbers say", "Normalised decoding accuracy", "Experts", "Layer by layer",
        "Examples", "Task mnist lost",
        "Task letters lost", "the last ones", "How to reproduce",
        "Expert's answer against decoded answer", "97.5 %", "small_resnet", "torch",
    ):  # fmt: skip
        assert expected in words, expected
    assert "prefers-color-scheme: dark" in text
    assert text.count('class="differs"') == 1
    plots = path.parent / "plots"
    assert {item.stem for item in plots.iterdir()} >= {
        "nda_by_method", "nda_against_cost", "nda_against_residual", "nda_per_task", "layers", "confusion_linear_mnist",
    }  # fmt: skip
    assert {item.suffix for item in plots.iterdir()} == {".png", ".svg"}
    for item in plots.glob("*.png"):
        assert item.read_bytes().startswith(b"\x89PNG")
        drawing = ElementTree.parse(item.with_suffix(".svg")).getroot()
        assert drawing[0].attrib["fill"] == "#ffffff"  # a file by itself has no page to take its colour from
        assert {"".join(text.itertext()) for text in drawing.iter("{http://www.w3.org/2000/svg}text")}

    # Policies change no parameters: COIN's Fisher and its distances are drawn once each.
    layers = (plots / "layers.svg").read_text(encoding="utf-8")
    assert (layers.count(">coin</text>"), layers.count(">average</text>")) == (2, 1)
    assert "recalibrate" not in layers
    assert layers.index(">stem</text>") < layers.index(">head</text>")


def test_the_table_shows_the_numbers_of_the_files(make_experiment: Make):
    folder = make_experiment(seeds=(0, 1), methods=FEW)
    _, parsed = page(write_report([folder]))
    rows = pd.concat([read_results(folder / f"seed-{seed}") for seed in (0, 1)])
    chosen = rows[(rows["method"] == "coin") & (rows["decoder"] == "linear")]
    by_seed = chosen.groupby("seed")["nda"].mean()
    assert f"{100 * by_seed.mean():.2f} ± {100 * by_seed.std(ddof=1):.2f}" in parsed.words


def test_one_seed_alone(make_experiment: Make):
    folder = make_experiment(seeds=(4,), methods=FEW)
    path = write_report([folder / "seed-4"])
    assert path == folder.resolve() / "seed-4" / "report.html"
    _, parsed = page(path)
    words = " ".join(parsed.words)
    assert "One seed only" in words
    assert "nan" not in words
    assert "Layer by layer" not in words


def test_several_experiments_and_several_p(make_experiment: Make, tmp_path: Path):
    folders = [make_experiment(f"p{p}", seeds=(0,), methods=FEW, samples=p) for p in (50, 1000)]
    path = write_report(folders)
    assert path == tmp_path.resolve() / "runs" / "report.html"
    _, parsed = page(path)
    words = " ".join(parsed.words)
    assert "2 experiments compared" in words
    assert "p50: 1 of 2 lost" in words
    assert "p1000: 1 of 2 lost" in words
    names = {item.name for item in (path.parent / "plots").iterdir()}
    assert {"nda_by_experiment.png", "nda_against_samples.png", "p50-nda_by_method.png"} <= names
    assert "50, 1000" not in words  # each has a column of its own in what was run
    again = write_report([folders[0], folders[0]], tmp_path / "elsewhere")
    assert again == tmp_path / "elsewhere" / "report.html"
    assert "compared" not in again.read_text(encoding="utf-8")  # one folder given twice is one experiment


def test_experiments_of_one_name_stay_apart(make_experiment: Make):
    folder = make_experiment("same", seeds=(0, 1), methods=FEW)
    sources = read_sources([folder / "seed-0", folder / "seed-1"])
    assert [source.name for source in sources] == [f"same ({folder / 'seed-0'})", f"same ({folder / 'seed-1'})"]


def test_confusions_are_summed_over_seeds(make_experiment: Make):
    folder = make_experiment(seeds=(0, 1), methods=FEW, with_confusions=True)
    (source,) = read_sources([folder])
    key = "coin|auto|ridge|letters|letters"
    wanted = sum(read_confusions(folder / f"seed-{seed}")[key] for seed in (0, 1))
    np.testing.assert_array_equal(source.confusions["ridge", "letters"]["coin"], wanted)
    assert "none" not in source.confusions["ridge", "letters"]


HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


def test_hostile_names_are_escaped(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a",), methods=FEW)
    rows = [replace(row, experiment=HOSTILE, task=HOSTILE, erased=HOSTILE) for row in rows]
    rows += [replace(row, method=HOSTILE, decoder=HOSTILE) for row in rows if row.decoder == "ridge"][1:2]
    write_results(tmp_path, rows, {"name": HOSTILE, HOSTILE: [HOSTILE]})
    images = np.zeros((1, 2, 2, 3), np.uint8)
    zero = np.array([0])
    write_examples(tmp_path, Examples(images, zero, zero, zero, (HOSTILE,)))
    write_layers(tmp_path, layers_of((HOSTILE, HOSTILE)).assign(layer=HOSTILE).drop_duplicates("layer"))
    text, parsed = page(write_report([tmp_path]))
    assert "<script" not in text.lower()
    assert "script" not in parsed.tags
    assert HOSTILE in "".join(parsed.words)  # shown as it stands, and no mathematics made of it


def test_larger_erasures_and_undefined_numbers(tmp_path: Path, measure):
    rows, _ = measure(0, tasks=("a", "b", "c"), methods=FEW)
    pairs = [
        replace(row, erased=erased, task=task, code_row="0+1", nda=0.5)
        for row in rows
        if row.task == "a" and row.method == "coin"
        for erased in ("a+b", "a+c", "b+c")
        for task in erased.split("+")
    ]
    unknown = [replace(row, method="ties", nda=float("nan")) for row in rows if row.method == "coin"]
    write_results(tmp_path, rows + pairs + unknown, {})
    _, parsed = page(write_report([tmp_path]))
    words = " ".join(parsed.words)
    assert "2 of 3 lost" in words
    assert "NDA is not defined" in words
    assert "50.00" in words


def test_only_references_still_make_a_report(tmp_path: Path, measure):
    rows, _ = measure(0, methods=FEW[:1])
    write_results(tmp_path, rows, {})
    _, parsed = page(write_report([tmp_path]))
    assert "not tested" in " ".join(parsed.words)


@pytest.mark.parametrize("folders", [[], ["nothing"]])
def test_nothing_to_report_is_one_clear_line(tmp_path: Path, folders: list[str]):
    with pytest.raises(FileError, match=r"coin re|coin run") as caught:
        write_report([tmp_path / name for name in folders])
    assert "\n" not in str(caught.value)


def test_a_damaged_optional_file_is_an_error_not_a_gap(full: Path):
    (full / "seed-0" / "examples.npz").write_bytes(b"nothing")
    with pytest.raises(FileError, match=r"examples\.npz"):
        write_report([full])
    assert not (full / "report.html").exists()


def test_a_method_with_a_p_of_its_own_hides_no_other(make_experiment: Make, measure):
    folder = make_experiment(seeds=(0,), methods=FEW)
    rows, _ = measure(0, methods=FEW)
    own = [replace(row, method="distillation-7000", samples_per_task=7000) for row in rows if row.method == "coin"]
    write_results(folder / "seed-0", rows + own, {"name": "quickstart"})
    text, parsed = page(write_report([folder]))
    words = " ".join(parsed.words)
    assert "NDA by method and decoder, P = 200 and 7000" in words
    figure = (folder / "plots/nda_by_method.svg").read_text(encoding="utf-8")
    assert "coin" in figure
    assert "distillation-7000" in figure
    opened = [part for part in text.split("<details")[1:] if part.startswith(" open") and " lost, P = " in part]
    assert "P = 200" in opened[0]


def test_an_infinite_residual_still_makes_a_report(tmp_path: Path, measure):
    rows = [replace(row, residual=float("inf")) if row.method == "coin" else row for row in measure(0, methods=FEW)[0]]
    write_results(tmp_path, rows, {})
    assert write_report([tmp_path]).is_file()
