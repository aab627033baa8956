"""The figure stays legible: all text inside, both axes labelled, one colour a method; also with many of everything."""

import math

import pytest
from matplotlib.text import Text

from coin.reporting import standins
from coin.reporting.choice import undominated
from coin.reporting.figures import as_png, method_colour, nda_against_memory
from tests.reporting.conftest import frame, measured, row


def kept(methods):
    """Return stand-ins, with so many more methods."""
    rows = [*measured(0), *measured(1)]
    for number in range(methods):
        names = {"method": f"method_number_{number}", "memory_mib": 11 * 1.3**number}
        rows += [row(0.857 - number / 1000, seed=seed, **names) for seed in range(2)]
    return standins(frame(rows))


def drawn(stand_ins, network_mib=math.nan):
    """Return the figure of all stand-ins."""
    return nda_against_memory(stand_ins, undominated(stand_ins), network_mib)


def texts(figure):
    """Return what is written in a figure, but for ticks: beyond the limits there are labels too, unseen."""
    (axes,) = figure.axes
    ticks = {*axes.xaxis.get_ticklabels(), *axes.yaxis.get_ticklabels()}
    found = set(figure.findobj(Text)) - ticks
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("methods", [0, 21])
def test_everything_is_inside_the_figure_and_every_axis_says_what_it_is(methods):
    figure = drawn(kept(methods))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in texts(figure):
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    assert axes.get_window_extent().height > 150
    assert "in MiB" in axes.get_xlabel()
    assert "NDA" in axes.get_ylabel()


def test_the_legend_names_all_the_best_first():
    stand_ins = kept(3)
    (legend,) = drawn(stand_ins).legends
    best_first = stand_ins.sort_values("nda_mean", ascending=False, kind="stable")
    stars = undominated(best_first).map({True: "* ", False: "  "})
    share = (100 * best_first.nda_mean).map("{:.1f}".format)
    expected = share + stars + best_first.method + ", " + best_first.decoder
    assert [text.get_text() for text in legend.get_texts()] == expected.tolist()
    assert {*stars} == {"* ", "  "}


def test_what_has_the_tables_star_is_filled():
    stand_ins = kept(3)
    (axes,) = drawn(stand_ins).axes
    fills = {each.get_label(): each.lines[0].get_markerfacecolor() for each in axes.containers}
    assert {label for label, fill in fills.items() if fill != "white"} == {
        label for label in fills if "*" in label
    }


def test_memory_is_in_networks_where_their_size_is_given():
    stand_ins = kept(0)
    (axes,) = drawn(stand_ins, 11.0).axes
    assert "in networks" in axes.get_xlabel()
    sizes = sorted(container.lines[0].get_xdata()[0] for container in axes.containers)
    assert sizes == pytest.approx(sorted(stand_ins.memory_mib / 11.0))


def test_a_method_has_one_colour():
    names = ("average", "coin", "distillation", "none", "refit", "replica-3bit")
    assert len({method_colour(name) for name in names}) == len(names)
    assert method_colour("coin") == method_colour("coin-recalibrate")
    assert as_png(drawn(kept(0)), 50).startswith(b"\x89PNG")
