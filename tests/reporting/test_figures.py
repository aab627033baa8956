"""The figure stays legible: all text inside, both axes labelled, one colour a method; also with many of everything."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from coin.reporting import standins
from coin.reporting.figures import as_png, method_colour, nda_against_memory
from tests.reporting.conftest import frame

Measure = Callable[..., tuple[list, dict]]


def kept_of(measure: Measure, methods: int = 0) -> pd.DataFrame:
    rows = [row for seed in (0, 1) for row in measure(seed)[0]]
    rows += [
        replace(row, method=f"method_number_{i}", nda=row.nda - i / 1000, memory_mib=1.3**i)
        for row in rows
        if row.method == "average"
        for i in range(methods)
    ]
    return standins(frame(*rows))


def check(figure: Figure) -> None:
    """Everything that is written is inside the figure, and every axis says what it is."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    # Beyond the limits there are labels too, unseen.
    ticks = {label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()}
    for text in figure.findobj(Text):
        if text not in ticks and text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text
    assert axes.get_window_extent().height > 150
    assert axes.get_xlabel()
    assert axes.get_ylabel()


@pytest.mark.parametrize("methods", [0, 21])
def test_all_are_named_by_rank(measure: Measure, methods: int):
    kept = kept_of(measure, methods)
    kept.loc[kept["method"] == "none", "memory_mib"] = 0.1
    figure = nda_against_memory(kept, 11.0)
    check(figure)
    assert "in networks" in figure.axes[0].get_xlabel()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(kept)
    best = kept.loc[kept["nda_mean"].idxmax()]
    assert texts[0] == f"{100 * best['nda_mean']:.1f}  {best['method']}, {best['decoder']}"
    numbers = [float(text.partition(" ")[0]) for text in texts]
    assert numbers == sorted(numbers, reverse=True)


def test_a_method_has_one_colour(measure: Measure):
    names = ("average", "coin", "distillation", "none", "refit", "replica-3bit")
    assert len({method_colour(name) for name in names}) == len(names)
    assert method_colour("coin") == method_colour("coin-recalibrate")
    assert as_png(nda_against_memory(kept_of(measure)), 50).startswith(b"\x89PNG")
