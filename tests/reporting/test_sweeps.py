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
from coin.files.atomic import write_text
from coin.reporting import choose, write_report
from coin.reporting.choice import named_by_experiment, recommended
from coin.reporting.report import report_summary
from coin.reporting.results import write_frame, write_results
from coin.reporting.summary import stand_ins
from coin.reporting.sweeps import legend, read_sweep_table, sweep_frame
from coin.reporting.tables import sweep_table
from tests.reporting.conftest import BASE, FEW, frame

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
    every = product(("exact", "empirical"), (0.01, 0.1), ("[0]", "[1]"))
    return [dict(zip(("calibration.fisher_kind", "expert.lr", "seeds"), values, strict=True)) for values in every]


def test_points_that_differ_in_seeds_alone_are_one_experiment(write_sweep: Write):
    sweep = read_sweep_table(write_sweep([*grid(), *grid()[:1]]))
    assert sweep is not None
    assert sweep.name == "kinds"
    assert dict(sweep.swept) == {"fisher_kind": ("exact", "empirical"), "lr": ("0.01", "0.1")}
    labels = [f"fisher_kind {kind}, lr {lr}" for kind in ("exact", "empirical") for lr in ("0.01", "0.1")]
    assert list(sweep.options) == labels
    # The point that is there twice counts once.
    assert sweep.frame["experiment"].value_counts(sort=False).to_dict() == dict.fromkeys(labels, 2 * 16)


def test_long_values_and_like_names_are_told_apart(write_sweep: Write):
    methods = [f'[{{"class_path": "Coin", "init_args": {{"damping": {damping}}}}}]' for damping in (0.1, 0.2)]
    points = [{"methods": m, "expert.lr": 1, "base.lr": 2, "a.task": "x", "seeds": "[0]"} for m in methods]
    folder = write_sweep(points)
    sweep = read_sweep_table(folder)
    assert sweep is not None
    others = {"expert.lr": "1", "base.lr": "2", "a.task": "x"}  # a column of results is called task
    assert list(sweep.options.values()) == [{"methods": f"#{i}", **others} for i in (0, 1)]
    assert sweep.swept["methods"] == tuple(methods)
    page = write_report(folder).read_text(encoding="utf-8")
    assert ", [{&#34;class_path&#34;: &#34;Coin&#34;, &#34;init_args&#34;: {&#34;damping&#34;: 0.2}}]" in page
    assert legend(sweep).to_numpy().tolist() == [["methods", f"#{i}", value] for i, value in enumerate(methods)]
    assert "What numbers stand for" in page
    text = pd.read_csv(folder / "sweep.csv", keep_default_na=False, na_values={"residual": ""})
    table = sweep_table(text, list(points[0]), "a sweep")  # in the terminal
    assert list(dict.fromkeys(map(str, table.columns[0].cells))) == ["#0", "#1"]


def test_a_sweep_over_seeds_alone_is_one_experiment(write_sweep: Write):
    folder = write_sweep([{"seeds": f"[{seed}]"} for seed in (0, 1)], with_folders=True)
    page = write_report(folder).read_text(encoding="utf-8")
    assert choose(folder)[1] in unescape(page)
    (folder / "sweep.csv").rename(folder / "other.csv")
    with pytest.raises(FileError, match=r"a sweep or several experiments; name one of them, such as .*/kinds-000$"):
        choose(folder)
    (folder / "other.csv").rename(folder / "sweep.csv")
    assert "coin: sweep kinds" in page
    assert "When one of 2 experts is lost, coin keeps" in page
    assert "seeds 0, 1" in page
    seed = folder / "kinds-001/seed-1"
    write_results(seed, [BASE], {"experts": {"a": "one"}})
    write_text(seed / "experts/a/done.json", '{"key": "other"}')
    with pytest.raises(FileError, match=r"kinds-001/seed-1' are of another expert 'a' than"):
        write_report(folder)


def test_a_sweep_over_options_has_a_figure_for_each_and_one_table(write_sweep: Write):
    points = [point | {"calibration.samples_per_task": p} for point in grid() for p in (50, 400)]
    folder = write_sweep(points)
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    plots = {item.name for item in (path.parent / "plots").iterdir()}
    assert plots == {f"nda_against_{name}.png" for name in ("fisher_kind", "lr", "calibration-samples_per_task")}
    assert "NDA against lr, mean ± spread over seeds; mean over fisher_kind, calibration.samples_per_task." in text
    assert text.count(">empirical</td>") == 2 * 2 * 3  # two rates and two P; two methods and the survivors
    assert "coin sweep kinds.yaml" in text
    assert choose(folder)[1] in unescape(text)
    rows, sentence = choose(folder, accuracy=0.5)
    assert sentence.startswith(f"Keep {rows['name'].iloc[0]} with ")
    assert rows["name"].str.fullmatch(r"fisher_kind \w+, lr [\d.]+, calibration\.samples_per_task \d+: \w+").all()
    assert "<th" in text[text.index("<h2>What to keep</h2>") :]
    assert ">memory MiB</th>" in text
    row = recommended(named_by_experiment(stand_ins(report_summary(folder))))
    assert f"8 experiments. In short: {row['name']} with {row['decoder']} keeps" in text
    frame = pd.read_csv(folder / "sweep.csv", keep_default_na=False)
    chosen = frame[(frame["calibration.fisher_kind"] == "exact") & (frame["expert.lr"] == 0.1)]
    chosen = chosen[(chosen.method == "coin") & (chosen.decoder == "ridge") & (chosen.samples_per_task == 400)]
    by_seed = chosen.groupby("seed")["nda"].apply(lambda values: values.astype(float).mean())
    assert f">{100 * by_seed.mean():.1f} ± {100 * by_seed.std(ddof=1):.1f}</td>" in text


def test_the_table_in_the_terminal_has_a_line_a_point_and_method(tmp_path: Path, measure):
    points = []
    for lr, seed in ((0.1, 0), (0.1, 1), (0.01, 0)):
        folder = tmp_path / f"p-{lr}-{seed}"
        write_results(folder, [replace(row, experiment=folder.name) for row in measure(seed, methods=FEW)[0]], {})
        points.append(({"expert.lr": lr, "seeds": [seed]}, [folder]))
    frame = sweep_frame(points)
    assert list(frame.columns[:3]) == ["expert.lr", "seeds", "experiment"]
    table = sweep_table(frame, ["expert.lr", "seeds"], "a sweep")
    cells = {str(column.header): [str(cell).strip() for cell in column.cells] for column in table.columns}
    assert list(cells) == ["lr", "method", "linear", "ridge", "feature_ridge"]
    assert cells["lr"] == ["0.1"] * 3 + ["0.01"] * 3
    assert cells["method"] == ["none", "average", "coin"] * 2
    own = frame[(frame["expert.lr"] == 0.1) & (frame["method"] == "coin") & (frame["decoder"] == "ridge")]
    by_seed = own.groupby("seed")["nda"].mean()
    assert cells["ridge"][2] == f"{100 * by_seed.mean():.1f} ± {100 * by_seed.std(ddof=1):.1f}"
    assert cells["linear"][0] == "–"
    assert [row.end_section for row in table.rows] == [False, False, True, False, False, False]
