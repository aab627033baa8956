"""Figures stay legible: all text inside, every axis labelled, one colour a method; also with many of everything."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from coin.reporting import summarise
from coin.reporting.figures import nda_against_memory
from coin.reporting.style import as_png, method_colour
from coin.reporting.summary import stand_ins

MANY = 21
Measure = Callable[..., tuple[list, dict]]


def summary_of(measure: Measure, *, methods: int = 0, **options: object) -> pd.DataFrame:
    rows = [row for seed in (0, 1) for row in measure(seed, **options)[0]]
    rows += [
        replace(row, method=f"method_number_{i}", nda=row.nda - i / 1000, memory_mib=1.3**i)
        for row in rows
        if row.method == "average"
        for i in range(methods)
    ]
    return summarise(pd.DataFrame([vars(row) for row in rows]))


def check(figure: Figure) -> None:
    """Everything that is written is inside the figure, and every axis says what it is."""
    figure.draw_without_rendering()
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    # Beyond the limits there are labels too, unseen.
    ticks = {label for axis in axes for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))}
    for text in figure.findobj(Text):
        if text not in ticks and text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text
    assert all(axes.get_window_extent().height > 60 for axes in figure.axes)
    bottom = [a for a in figure.axes if a.xaxis.get_tick_params().get("labelbottom", True) and len(a.get_xticks())]
    assert all(axes.get_xlabel() for axes in bottom)


@pytest.mark.parametrize("methods", [0, MANY])
def test_names_stand_beside_the_points_by_rank_and_do_not_collide(measure: Measure, methods: int):
    kept = stand_ins(summary_of(measure, methods=methods))
    kept.loc[kept["name"] == "none", "memory_mib"] = 0.1
    figure = nda_against_memory(kept, 11.0)
    check(figure)
    assert "in networks" in figure.axes[0].get_xlabel()
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    labels.sort(key=lambda text: -Text.get_window_extent(text).y0)  # without the line to its point
    best = kept.loc[kept["nda_mean"].idxmax()]
    assert labels[0].get_text() == f"{best['name']}, {best['decoder']}  {100 * best['nda_mean']:.1f}"
    numbers = [float(text.get_text().rpartition("  ")[2]) for text in labels]
    assert numbers == sorted(numbers, reverse=True)
    assert {text.get_text().partition(",")[0] for text in labels} == set(kept["name"])  # each with its best decoder
    boxes = [Text.get_window_extent(text) for text in labels]
    assert np.diff(sorted(box.y0 for box in boxes)).min() > 0.85 * boxes[0].height


def test_a_method_has_one_colour(measure: Measure):
    summary = summary_of(measure)
    texts = [text for text in nda_against_memory(stand_ins(summary)).axes[0].texts if isinstance(text, Annotation)]
    beside = {text.get_text().partition(",")[0]: str(text.get_color()) for text in texts}
    assert beside["coin"] == beside["coin-recalibrate"] == method_colour("coin-categorical")
    assert len({beside[name] for name in ("average", "coin", "distillation", "none")}) == 4
    assert method_colour("readout_distillation") != method_colour("distillation")
    assert as_png(nda_against_memory(stand_ins(summary)), 50).startswith(b"\x89PNG")
