"""The report of a sweep, from its table alone."""

from collections.abc import Callable
from dataclasses import replace
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import choose, write_report
from coin.reporting.results import write_frame, write_results
from coin.reporting.sweeps import read_sweep_table, sweep_frame, sweep_text
from tests.reporting.conftest import FEW, frame

Write = Callable[..., Path]


@pytest.fixture
def write_sweep(tmp_path: Path, measure) -> Write:
    """Return a function that writes the table of a sweep over these values, one point each, and returns its folder."""

    def write(points: list[dict[str, Any]], with_folders: bool = False) -> Path:
        folder = tmp_path / "kinds"
        frames = []
        for index, values in enumerate(points):
            seed, samples = int(values["seeds"].strip("[]")), values.get("calibration.samples_per_task", 50)
            rows = measure(seed, experiment=f"kinds-{index:03d}", samples=samples, methods=FEW)[0]
            frames.append(pd.concat([pd.DataFrame([values] * len(rows)), frame(*rows)], axis=1))
            if with_folders:
                write_results(folder / f"kinds-{index:03d}" / f"seed-{seed}", rows, {"name": "kinds"})
        write_frame(folder / "sweep.csv", pd.concat(frames, ignore_index=True))
        return folder

    return write


def grid() -> list[dict[str, Any]]:
    every = product(("exact", "categorical"), (0.01, 0.1), ("[0]", "[1]"))
    return [dict(zip(("calibration.fisher_kind", "expert.lr", "seeds"), values, strict=True)) for values in every]


def test_points_that_differ_in_seeds_alone_are_one_experiment(write_sweep: Write):
    sweep = read_sweep_table(write_sweep([*grid(), *grid()[:1]]))
    assert sweep is not None
    assert sweep.name == "kinds"
    labels = [f"fisher_kind {kind}, lr {lr}" for kind in ("exact", "categorical") for lr in ("0.01", "0.1")]
    assert list(sweep.options.index) == labels
    assert sweep.options.iloc[1].to_dict() == {"fisher_kind": "exact", "lr": "0.1"}
    # The point that is there twice counts once.
    assert sweep.frame["experiment"].value_counts(sort=False).to_dict() == dict.fromkeys(labels, 2 * 16)


def test_long_values_and_like_names_are_told_apart(write_sweep: Write):
    methods = [f'[{{"class_path": "Coin", "init_args": {{"damping": {damping}}}}}]' for damping in (0.1, 0.2)]
    points = [{"methods": m, "expert.lr": 1, "base.lr": 2, "a.task": "x", "seeds": "[0]"} for m in methods]
    folder = write_sweep(points)
    sweep = read_sweep_table(folder)
    assert sweep is not None
    others = {"expert.lr": "1", "base.lr": "2", "a.task": "x"}  # a column of results is called task
    assert sweep.options.to_dict("records") == [{"methods": f"#{i}", **others} for i in (0, 1)]
    assert sweep.legend.to_numpy().tolist() == [["methods", f"#{i}", value] for i, value in enumerate(methods)]
    assert list(dict.fromkeys(sweep_text(sweep)["methods"])) == ["#0", "#1"]
    assert unescape(write_report(folder).read_text(encoding="utf-8")).count(methods[1]) == 1


def test_a_sweep_over_seeds_alone_is_one_experiment(write_sweep: Write):
    folder = write_sweep([{"seeds": f"[{seed}]"} for seed in (0, 1)], with_folders=True)
    page = write_report(folder).read_text(encoding="utf-8")
    assert choose(folder)[1] in unescape(page)
    (folder / "sweep.csv").rename(folder / "other.csv")
    with pytest.raises(FileError, match=r"a sweep or several experiments; name one of them, such as .*/kinds-000$"):
        choose(folder)
    (folder / "other.csv").rename(folder / "sweep.csv")
    assert "coin: sweep kinds" in page


def test_a_sweep_over_options_has_a_figure_for_each_and_one_table(write_sweep: Write):
    points = [point | {"calibration.samples_per_task": p} for point in grid() for p in (50, 400)]
    folder = write_sweep(points)
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    plots = {item.name for item in (path.parent / "plots").iterdir()}
    assert plots == {f"nda_against_{name}.png" for name in ("fisher_kind", "lr", "calibration-samples_per_task")}
    assert text.count(">categorical</td>") == 2 * 2 * 3  # two rates and two P; two methods and the survivors
    assert "coin sweep kinds.yaml" in text
    assert choose(folder)[1] in unescape(text)
    rows, sentence = choose(folder, accuracy=0.5)
    assert sentence.startswith(f"Keep {rows['name'].iloc[0]} with ")
    assert rows["name"].str.fullmatch(r"fisher_kind \w+, lr [\d.]+, calibration\.samples_per_task \d+: \w+").all()
    assert ">memory MiB</th>" in text
    frame = pd.read_csv(folder / "sweep.csv", keep_default_na=False)
    chosen = frame[(frame["calibration.fisher_kind"] == "exact") & (frame["expert.lr"] == 0.1)]
    chosen = chosen[(chosen.method == "coin") & (chosen.decoder == "ridge") & (chosen.samples_per_task == 400)]
    by_seed = chosen.groupby("seed")["nda"].apply(lambda values: values.astype(float).mean())
    assert f">{100 * by_seed.mean():.2f} ± {100 * by_seed.std(ddof=1):.2f}</td>" in text


def test_the_table_has_a_line_a_point_and_method(tmp_path: Path, measure):
    points = []
    for lr, seed in ((0.1, 0), (0.1, 1), (0.01, 0)):
        folder = tmp_path / f"p-{lr}-{seed}"
        write_results(folder, [replace(row, experiment=folder.name) for row in measure(seed, methods=FEW)[0]], {})
        points.append(({"expert.lr": lr, "seeds": [seed]}, [folder]))
    own = sweep_frame(points)
    assert own is not None
    assert list(own.columns[:3]) == ["expert.lr", "seeds", "experiment"]
    write_frame(tmp_path / "sweep.csv", own)
    sweep = read_sweep_table(tmp_path)
    assert sweep is not None
    table = sweep_text(sweep)
    assert list(table) == ["lr", "method", "ridge", "feature_ridge", "linear"]
    assert list(table["lr"]) == ["0.1"] * 3 + ["0.01"] * 3
    assert list(table["method"]) == ["none", "average", "coin"] * 2
    own = own[(own["expert.lr"] == 0.1) & (own["method"] == "coin") & (own["decoder"] == "ridge")]
    by_seed = own.groupby("seed")["nda"].mean()
    assert table["ridge"][2] == f"{100 * by_seed.mean():.2f} ± {100 * by_seed.std(ddof=1):.2f}"
    assert table["linear"][0] == "–"
