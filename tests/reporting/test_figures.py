"""Figures stay legible: all text inside, every axis labelled, one colour a method; also with many of everything."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from coin.reporting import summarise
from coin.reporting.detail_figures import confusion_matrices, layer_profile, training_curves
from coin.reporting.figures import (
    nda_against_cost,
    nda_against_option,
    nda_against_residual,
    nda_against_samples,
    nda_by_experiment,
    nda_by_method,
)
from coin.reporting.style import as_png, method_colour
from coin.reporting.summary import over_tasks

LONG = ("ridge-own", "feature_ridge-stages", "feature_ridge-64", "feature_ridge-stages-64-random-own")
MANY = 21
Measure = Callable[..., tuple[list, dict]]


def means_of(measure: Measure, *, decoders: tuple[str, ...] = (), methods: int = 0, **options: object) -> pd.DataFrame:
    rows = [row for seed in (0, 1) for row in measure(seed, **options)[0]]
    rows += [replace(row, decoder=name) for row in rows if row.decoder == "ridge" for name in decoders]
    rows += [
        replace(row, method=f"method_number_{i}", nda=row.nda - i / 1000, merge_seconds=1.7**i)
        for row in rows
        if row.method == "average"
        for i in range(methods)
    ]
    return over_tasks(summarise(pd.DataFrame([vars(row) for row in rows])))


def check(figure: Figure) -> None:
    """Everything that is written is inside the figure, and every axis says what it is."""
    figure.draw_without_rendering()
    ticks = {  # beyond the limits they are there, unseen
        label
        for axes in figure.axes
        for which in ("major", "minor")
        for label in (*axes.get_xticklabels(which=which), *axes.get_yticklabels(which=which))
    }
    for text in figure.findobj(Text):
        if text not in ticks and text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
    assert all(axes.get_window_extent().height > 60 for axes in shown)
    bottom = [a for a in shown if a.xaxis.get_tick_params().get("labelbottom", True) and len(a.get_xticks())]
    assert all(axes.get_xlabel() for axes in bottom)


def names_of(figure: Figure) -> dict[str, str]:
    """Return the names beside the points, from the top down, with their colours."""
    figure.draw_without_rendering()
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    labels.sort(key=lambda text: -Text.get_window_extent(text).y0)  # without the line to its point
    return {text.get_text(): str(text.get_color()) for text in labels}


@pytest.mark.parametrize("methods", [0, MANY])
@pytest.mark.parametrize("plot", [nda_against_cost, nda_against_residual])
def test_names_stand_beside_the_points_by_rank_and_do_not_collide(measure: Measure, plot: Callable, methods: int):
    means = means_of(measure, methods=methods)
    figure = plot(means)
    check(figure)
    assert len(figure.axes) == 1
    names = names_of(figure)
    decoder = "feature_ridge" if plot is nda_against_cost else "linear"
    assert decoder in figure.axes[0].get_ylabel()
    rows = means[(means["decoder"] == decoder) & ~means["method"].isin(["oracle", "none"])]
    best = rows.loc[rows["nda_mean"].idxmax()]
    assert next(iter(names)).endswith(f"  {100 * best['nda_mean']:.1f} ± {100 * best['nda_std']:.1f}")
    assert len(names) == len(rows) + (plot is nda_against_cost)  # with the survivors alone
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    places = sorted(box.y0 for box in boxes)
    assert np.diff(places).min() > 0.85 * boxes[0].height


def test_what_is_free_stands_at_the_left_end_and_the_floor_is_a_line(measure: Measure):
    rows = [replace(row, decoder_seconds=0.0, nda=0.96) if row.method == "none" else row for row in measure(0)[0]]
    rows = [replace(row, merge_seconds=0.0) if row.method == "average" else row for row in rows]
    means = over_tasks(summarise(pd.DataFrame([vars(row) for row in rows])))
    figure = nda_against_cost(means, "linear")
    check(figure)
    assert "0" in [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert not [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]  # not measured: no room
    dashed = [line for line in nda_against_cost(means).axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [pytest.approx(96.0)]


def test_cost_is_in_seconds_or_in_passes(measure: Measure):
    rows = [replace(row, merge_passes=4000.0, decoder_passes=500.0) for row in measure(0)[0]]
    means = over_tasks(summarise(pd.DataFrame([vars(row) for row in rows])))
    for unit in ("seconds", "passes"):
        axes = nda_against_cost(means, "ridge", unit).axes[0]
        assert axes.get_xlabel().startswith(unit)
        places = {float(x) for line in axes.get_lines() for x in line.get_xdata()}
        assert (4500.0 in places) == (unit == "passes")


def test_a_floor_far_below_takes_no_room(measure: Measure):
    means = means_of(measure)
    means.loc[means["method"] == "none", "nda_mean"] = 0.1
    figure = nda_against_cost(means)
    assert figure.axes[0].get_ylim()[0] > 90
    assert next(name for name in names_of(figure) if name.startswith("none")).endswith("↓")


def test_a_method_has_one_colour_in_every_figure(measure: Measure):
    means = means_of(measure)
    beside = {name.split("  ")[0]: ink for name, ink in names_of(nda_against_cost(means)).items()}
    assert beside["coin"] == beside["coin (recalibrate)"] == method_colour("coin-categorical")
    assert len({beside[name] for name in ("average", "coin", "distillation", "none")}) == 4
    assert method_colour("readout_distillation") != method_colour("distillation")
    dots = nda_by_method(means)
    check(dots)
    axes = dots.axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert order[-1] == "none"
    for container in axes.containers:
        line = container.lines[0]
        assert line.get_color() == beside[order[round(line.get_ydata()[0])]]
    lines = nda_against_samples(pd.concat([means, means.assign(samples_per_task=50)], ignore_index=True))
    assert {each.get_label(): each.lines[0].get_color() for each in lines.axes[0].containers}.items() <= beside.items()


def test_lines_over_samples_and_options(measure: Measure):
    parts = [means_of(measure, methods=MANY, samples=samples) for samples in (50, 1000)]
    means = pd.concat(parts, ignore_index=True)
    figure = nda_against_samples(means)
    check(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["decoder linear", "decoder feature_ridge"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["50", "1000"]
    assert figure.axes[-1].get_xlabel().endswith("(log scale)")
    words = nda_against_option(means, "kind", means["samples_per_task"].map({50: "exact", 1000: "a" * 40}))
    check(words)
    assert [label.get_text() for label in words.axes[-1].get_xticklabels()] == ["exact", "a" * 15 + "…"]
    cloud = nda_against_option(means, "lr", means["samples_per_task"] / 1e4, joined=False)
    for unjoined in (words, cloud):
        assert {container.lines[0].get_linestyle() for container in unjoined.axes[0].containers} == {"None"}


def test_many_decoders_and_experiments(measure: Measure):
    check(nda_by_method(means_of(measure, decoders=LONG)))
    parts = [means_of(measure, experiment=name) for name in ("one", "another" * 6)]
    figure = nda_by_experiment(pd.concat(parts, ignore_index=True))
    check(figure)
    first, second = figure.axes
    assert "none" not in [label.get_text() for label in first.get_yticklabels()]  # not measured with this decoder
    assert "none" in [label.get_text() for label in second.get_yticklabels()]


def test_confusions_have_the_classes_names_on_their_axes():
    counts = np.diag([5, 0, 3]) + np.eye(3, k=1, dtype=np.int64)
    figure = confusion_matrices({"refit": counts, "coin": counts}, ["cat", "dog", "a long name of a class"])
    check(figure)
    left, right, _ = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["cat", "dog", "a long name of …"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["cat", "dog", "a long name of …"]
    np.testing.assert_allclose(left.images[0].get_array()[0], [5 / 6, 1 / 6, 0])
    check(confusion_matrices({"coin": np.eye(200, dtype=np.int64)}, [f"class {i}" for i in range(200)]))


def test_layers_are_drawn_once_for_the_same_numbers():
    rows = [(f"method-{m}", f"stages.{i}.conv") for m in range(MANY) for i in range(60)]
    layers = pd.DataFrame(rows, columns=["method", "layer"]).assign(batchnorm="auto", code_row="0")
    layers["fisher_share"] = [1 / (1 + i) for i in range(len(rows))]
    layers["distance"] = [float(i) for i in range(len(rows))]
    same = layers[layers["method"] == "method-0"].assign(batchnorm="recalibrate")
    figure = layer_profile(pd.concat([layers, same], ignore_index=True))
    check(figure)
    assert [len(axes.get_yticks()) for axes in figure.axes[:2]] == [MANY, MANY]
    assert len(layer_profile(layers.assign(fisher_share=float("nan"))).axes) == 2  # one panel and its bar
    layer_profile(layers.assign(fisher_share=float("nan"), distance=float("nan"))).draw_without_rendering()


def test_training_has_a_line_a_seed_and_kind():
    epochs = pd.DataFrame({"epoch": [0, 0, 1, 1], "train/accuracy": [0.5, None, 0.7, None]})
    epochs["val/accuracy"] = [None, 0.6, None, 0.8]
    curves = pd.concat([epochs.assign(task=task, seed=seed) for task in "abcd" for seed in (0, 1)], ignore_index=True)
    figure = training_curves(curves)
    check(figure)
    lines = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([50, 70])] * 2 + [pytest.approx([60, 80])] * 2
    assert list(lines[0].get_xdata()) == [1, 2]
    assert as_png(figure, 50).startswith(b"\x89PNG")
