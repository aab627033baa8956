"""The report of a sweep, from its table alone or with its points' folders."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from coin.reporting.frames import write_frame
from coin.reporting.sources import read_sources

from coin.errors import FileError
from coin.reporting import write_report, write_results
from coin.reporting.sweeps import as_numbers, read_sweep_table

FEW = (
    ("none", "", (None, 0.56, 0.91), float("nan"), 0.0, 0.0),
    ("average", "auto:average", (0.857, 0.966, 0.9835), 0.61, 0.0, 0.0),
    ("coin", "auto:recalibrate", (0.867, 0.960, 0.984), 0.58, 4.1, 8400.0),
)
Write = Callable[..., Path]


@pytest.fixture
def write_sweep(tmp_path: Path, measure) -> Write:
    """Return a function that writes the table of a sweep over these values, one point each, and returns its folder."""

    def write(points: list[dict[str, object]], with_folders: bool = False) -> Path:
        folder = tmp_path / "kinds"
        frames = []
        for index, values in enumerate(points):
            seed, samples = (
                int(str(values["seeds"]).strip("[]")),
                int(str(values.get("calibration.samples_per_task", 50))),
            )
            rows = [
                replace(row, experiment=f"kinds-{index:03d}") for row in measure(seed, samples=samples, methods=FEW)[0]
            ]
            frame = pd.DataFrame([vars(row) for row in rows])
            for place, (key, value) in enumerate(values.items()):
                frame.insert(place, key, value)
            frames.append(frame)
            if with_folders:
                write_results(folder / f"kinds-{index:03d}" / f"seed-{seed}", rows, {"name": "kinds"})
        write_frame(folder / "sweep.csv", pd.concat(frames, ignore_index=True))
        return folder

    return write


def grid(kinds: tuple[str, ...] = ("exact", "empirical"), seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, object]]:
    return [
        {"calibration.fisher_kind": kind, "expert.lr": lr, "seeds": f"[{seed}]"}
        for kind in kinds
        for lr in (0.01, 0.1)
        for seed in seeds
    ]


def test_points_that_differ_in_seeds_alone_are_one_part(write_sweep: Write):
    sweep = read_sweep_table(write_sweep([*grid(), *grid()[:1]]))
    assert sweep is not None
    assert sweep.name == "kinds"
    assert sweep.full
    assert dict(sweep.swept) == {"fisher_kind": ("exact", "empirical"), "lr": ("0.01", "0.1"), "seeds": ("[0]", "[1]")}
    assert [group.label for group in sweep.groups] == [
        "fisher_kind exact, lr 0.01", "fisher_kind exact, lr 0.1", "fisher_kind empirical, lr 0.01",
        "fisher_kind empirical, lr 0.1",
    ]  # fmt: skip
    # The point that is there twice counts once.
    assert [len(group.frame) for group in sweep.groups] == [2 * 16] * 4
    assert not read_sweep_table(write_sweep(grid()[:-2])).full  # type: ignore[union-attr]


def test_long_values_and_like_names_are_told_apart(write_sweep: Write):
    methods = [f'[{{"class_path": "Coin", "init_args": {{"damping": {damping}}}}}]' for damping in (0.1, 0.2)]
    points = [{"methods": m, "expert.lr": 1, "base.lr": 2, "seeds": "[0]"} for m in methods]
    sweep = read_sweep_table(write_sweep(points))
    assert sweep is not None
    assert [dict(group.options) for group in sweep.groups] == [
        {"methods": f"#{i}", "expert.lr": "1", "base.lr": "2"} for i in (0, 1)
    ]
    assert sweep.swept["methods"] == tuple(methods)


def test_values_are_numbers_only_where_all_of_them_are():
    assert as_numbers(pd.Series(["1e-3", "0.1"])).tolist() == [0.001, 0.1]
    assert as_numbers(pd.Series(["1", "none"])).tolist() == ["1", "none"]


def test_a_sweep_over_samples_is_an_experiment_with_several_p(write_sweep: Write):
    points = [{"seeds": f"[{seed}]", "calibration.samples_per_task": p} for seed in (0, 1) for p in (50, 400)]
    folder = write_sweep(points, with_folders=True)
    (source,) = read_sources([folder])
    assert source.name == "kinds"
    assert [str(seed.relative_to(folder)) for seed in source.seeds] == ["kinds-001/seed-0", "kinds-003/seed-1"]
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "coin: sweep kinds" in page
    assert "With more calibration samples" in page
    assert "Every point has a report" not in page
    plots = {item.name for item in (folder / "plots").iterdir()}
    assert {"nda_against_samples.svg", "nda_by_method.png", "nda_against_cost.png"} <= plots


def test_a_sweep_over_options_has_a_figure_for_each_and_one_table(write_sweep: Write):
    folder = write_sweep(grid())
    path = write_report([folder])
    text = path.read_text(encoding="utf-8")
    plots = {item.name for item in (path.parent / "plots").iterdir()}
    assert plots == {f"kinds-nda_against_{name}.{kind}" for name in ("fisher_kind", "lr") for kind in ("png", "svg")}
    assert "NDA against lr, mean ± spread over seeds; mean over fisher_kind." in text
    assert "Every point has a report of its own" in text
    assert text.count('<td class="text">empirical</td>') == 2 * 3  # two rates; two methods and the survivors
    assert "coin sweep SWEEP.yaml" in text
    frame = pd.read_csv(folder / "sweep.csv", keep_default_na=False)
    chosen = frame[(frame["calibration.fisher_kind"] == "exact") & (frame["expert.lr"] == 0.1)]
    chosen = chosen[(chosen.method == "coin") & (chosen.decoder == "ridge")]
    by_seed = chosen.groupby("seed")["nda"].apply(lambda values: values.astype(float).mean())
    assert f"{100 * by_seed.mean():.2f} ± {100 * by_seed.std(ddof=1):.2f}" in text


def test_a_sweep_stands_beside_an_experiment(write_sweep: Write, make_experiment):
    sweep, other = write_sweep(grid(("exact",), (0,))), make_experiment(seeds=(0,), methods=FEW)
    text = write_report([sweep, other]).read_text(encoding="utf-8")
    assert "2 experiments compared" in text
    assert "Sweep kinds" in text
    assert "kinds fisher_kind exact, lr 0.1: 1 of 2 lost" in text
    assert text.count(": figures</summary>") == 1  # the experiment's; points have reports of their own


def test_damaged_tables_are_one_clear_line(write_sweep: Write):
    folder = write_sweep(grid())
    (folder / "sweep.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(FileError, match=r"sweep\.csv' has no column 'experiment'"):
        write_report([folder])
