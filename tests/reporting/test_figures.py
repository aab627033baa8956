"""Figures stay legible: all text inside, every axis labelled, no two series alike; also with many of everything."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from coin.reporting import summarise
from coin.reporting.canvas import colour, marker
from coin.reporting.details import confusion_matrices, layer_profile
from coin.reporting.plots import (
    nda_against_cost,
    nda_against_option,
    nda_against_residual,
    nda_against_samples,
    nda_by_experiment,
    nda_by_method,
    nda_per_task,
)

SHORT = ("linear", "ridge", "feature_ridge")
LONG = ("ridge-own", "feature_ridge-stages", "feature_ridge-64", "feature_ridge-stages-64-random-own")
MANY = 21
Measure = Callable[..., tuple[list, dict]]


def summary_of(
    measure: Measure, *, decoders: tuple[str, ...] = (), methods: int = 0, **options: object
) -> pd.DataFrame:
    rows = measure(0, **options)[0]
    rows += [replace(row, decoder=name) for row in rows if row.decoder == "ridge" for name in decoders]
    rows += [
        replace(row, method=f"method_number_{i}") for row in rows if row.method == "average" for i in range(methods)
    ]
    return summarise(pd.DataFrame([vars(row) for row in rows]))


def means_of(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary["task"] == "mean"]


def check(figure: Figure) -> None:
    """Everything that is written is inside the figure, and every axis says what it is."""
    figure.draw_without_rendering()
    ticks = {
        label
        for axes in figure.axes
        for label in (*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both"))
    }
    for text in figure.findobj(Text):
        # Ticks beyond an axis' limits have labels that are not drawn.
        if text not in ticks and text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
    assert all(axes.get_window_extent().height > 60 for axes in shown)
    bottom = [a for a in shown if a.xaxis.get_tick_params().get("labelbottom", True) and len(a.get_xticks())]
    assert figure.get_supxlabel() or all(axes.get_xlabel() for axes in bottom)


@pytest.mark.parametrize("plot", [nda_by_method, nda_against_cost, nda_against_residual])
def test_few_decoders_share_a_panel_with_a_legend(measure: Measure, plot: Callable[[pd.DataFrame], Figure]):
    figure = plot(means_of(summary_of(measure)))
    check(figure)
    (legend,) = figure.legends
    assert len(figure.axes) == 1
    assert {text.get_text() for text in legend.get_texts()} >= set(SHORT)


@pytest.mark.parametrize("plot", [nda_against_cost, nda_against_residual])
def test_many_methods_and_decoders_have_a_panel_each_and_all_methods_look_different(
    measure: Measure, plot: Callable[[pd.DataFrame], Figure]
):
    summary = summary_of(measure, decoders=LONG, methods=MANY)
    figure = plot(means_of(summary))
    check(figure)
    assert {axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()} == {*SHORT, *LONG}
    (legend,) = figure.legends
    looks = {(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles}
    assert len(looks) == len(legend.get_texts()) == MANY + 4


def test_many_decoders_stand_side_by_side_with_the_best_of_each_marked(measure: Measure):
    summary = summary_of(measure, decoders=LONG)
    figure = nda_by_method(means_of(summary))
    check(figure)
    assert len(figure.axes) == 7
    per_task = nda_per_task(summary[summary["erased"] == summary["task"]])
    check(per_task)
    assert len(per_task.axes) == 14
    # Distillation is the best with the linear decoder, and the only one in its panel that is drawn as a diamond.
    first = figure.axes[0]
    diamonds = [line for line in first.get_lines() if line.get_marker() == "D" and len(line.get_xdata())]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert [names[int(y)] for line in diamonds for y in line.get_ydata()] == ["distillation"]


def test_lines_over_samples_and_options_tell_all_methods_apart(measure: Measure):
    parts = [summary_of(measure, methods=MANY, samples=samples) for samples in (50, 1000)]
    means = means_of(pd.concat(parts, ignore_index=True))
    figure = nda_against_samples(means)
    check(figure)
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == MANY + 4
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["50", "1000"]
    assert figure.axes[-1].get_xlabel().endswith("(log scale)")


def test_an_option_of_words_has_them_on_its_axis_and_no_lines(measure: Measure):
    means = means_of(pd.concat([summary_of(measure, samples=samples) for samples in (50, 1000)], ignore_index=True))
    figure = nda_against_option(
        means, "kind", means["samples_per_task"].map({50: "exact", 1000: "empirical"}), joined=True
    )
    check(figure)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["exact", "empirical"]
    assert figure.axes[-1].get_xlabel() == "kind"
    assert {container.lines[0].get_linestyle() for container in figure.axes[0].containers} == {"None"}
    cloud = nda_against_option(means, "lr", means["samples_per_task"] / 1e4, joined=False)
    assert {container.lines[0].get_linestyle() for container in cloud.axes[0].containers} == {"None"}


def test_series_have_64_looks():
    assert len({(colour(i), marker(i)) for i in range(64)}) == 64


def test_other_figures_fit_too(measure: Measure):
    parts = [summary_of(measure, experiment=name) for name in ("one", "another")]
    check(nda_by_experiment(means_of(pd.concat(parts, ignore_index=True))))
    counts = np.eye(10, dtype=np.int64)
    check(confusion_matrices({f"a_long-name_of_a_method-{i}": counts for i in range(MANY)}))
    rows = [(f"method-{m}", f"stages.{i}.conv") for m in range(MANY) for i in range(30)]
    layers = pd.DataFrame(rows, columns=["method", "layer"]).assign(batchnorm="average", code_row="0")
    layers["fisher_share"] = [1 / (1 + i) for i in range(len(rows))]
    layers["distance"] = [float(i) for i in range(len(rows))]
    figure = layer_profile(layers)
    check(figure)
    assert [len(axes.get_yticks()) for axes in figure.axes[:2]] == [MANY, MANY]
