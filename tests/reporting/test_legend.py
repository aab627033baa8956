from dataclasses import replace

import pandas as pd
import pytest

from coin.reporting import summarise
from coin.reporting.plots import nda_against_cost, nda_by_method

SHORT = ("linear", "ridge", "feature_ridge")
LONG = ("ridge-own", "feature_ridge-stages", "feature_ridge-64", "feature_ridge-stages-64-random-own")


@pytest.mark.parametrize("plot", [nda_by_method, nda_against_cost])
@pytest.mark.parametrize(("more", "columns"), [((), 3), (LONG, 2)])
def test_legends_keep_within_the_figure(measure, plot, more, columns):
    rows = measure(0)[0]
    rows += [replace(row, decoder=name) for row in rows if row.decoder == "ridge" for name in more]
    summary = summarise(pd.DataFrame([vars(row) for row in rows]))
    figure = plot(summary[summary["task"] == "mean"])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert legend._ncols <= columns
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().height > 100
    assert {text.get_text() for text in legend.get_texts()} >= {*SHORT, *more}
