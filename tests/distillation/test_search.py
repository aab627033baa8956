"""The walk over learning rates and numbers of steps, on losses whose minimum is known."""

import math

import pytest

from coin.distillation.search import TRIALS, search_grid

GIVEN = [[3e-4, 1e-3, 3e-3], [1e-3], [1e-3, 1e-2]]


def bowl(best_rate, best_steps):
    return lambda rate, steps: math.log(rate / best_rate) ** 2 + math.log2(steps / best_steps) ** 2


def ratio_of(rates):
    return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else math.sqrt(10)


def all_neighbours_tried(pair, rates, tried):
    """Given rates need not be in one exact ratio: 3e-4, 1e-3, 3e-3."""
    (rate, steps), ratio = pair, ratio_of(rates)
    around = [(rate * ratio, steps), (rate / ratio, steps), (rate, 2 * steps), (rate, steps / 2)]
    return all(any(r == pytest.approx(rate, rel=0.2) and s == steps for r, s in tried) for rate, steps in around)


@pytest.mark.parametrize("rates", GIVEN)
@pytest.mark.parametrize(("times", "power"), [(0, 0), (1, 0), (0, -2), (1, 1), (-2, 1), (2, -1)])
def test_it_walks_to_a_minimum_beyond_what_was_given(rates, times, power):
    """The minimum lies `times` grid points beyond the rates' edge, on either side, and at another number of steps."""
    edge = rates[len(rates) // 2] if times == 0 else rates[-1] if times > 0 else rates[0]
    wanted = (edge * ratio_of(rates) ** times, 150 * 2.0**power)
    loss = bowl(*wanted)
    choice = search_grid(loss, rates, 160)
    tried = choice.losses
    assert not choice.at_edge
    assert choice.best == (pytest.approx(wanted[0], rel=0.2), round(160 * 2.0**power))
    assert len(tried) <= TRIALS
    assert all(value == loss(*pair) for pair, value in tried.items())
    assert min(tried, key=tried.get) == choice.best
    assert all_neighbours_tried(choice.best, rates, tried)


@pytest.mark.parametrize("rates", GIVEN)
@pytest.mark.parametrize("loss", [lambda rate, _: 1 / rate, lambda rate, _: rate, lambda _, steps: 1 / steps])
def test_on_a_loss_that_falls_for_ever_it_stops_and_says_so(rates, loss):
    calls = []
    choice = search_grid(lambda *each: calls.append(each) or loss(*each), rates, 100)
    assert choice.at_edge
    assert len(calls) == len(set(calls)) == len(choice.losses) == TRIALS
    assert loss(*choice.best) == min(choice.losses.values())
    assert not all_neighbours_tried(choice.best, rates, choice.losses)


def test_it_begins_in_the_middle_takes_given_rates_as_they_are_and_does_not_halve_a_step():
    calls = []
    search_grid(lambda *each: calls.append(each) or bowl(1e-3, 100)(*each), [2e-4, 1e-3, 3e-3], 100)
    assert calls[0] == (1e-3, 100)
    assert set(calls) == {(1e-3, 100), (2e-4, 100), (3e-3, 100), (1e-3, 50), (1e-3, 200)}
    choice = search_grid(lambda rate, steps: steps + bowl(1e-3, 1)(rate, 1), [1e-3], 4)
    assert (choice.best[1], choice.at_edge) == (1, False)
    assert min(count for _, count in choice.losses) == 1


def test_where_runs_diverge_it_turns_back():
    rates = [3e-4, 1e-3, 3e-3]
    choice = search_grid(lambda rate, steps: math.inf if rate > 1.1e-3 else bowl(1e-2, 100)(rate, steps), rates, 100)
    assert (choice.best, choice.at_edge) == ((1e-3, 100), False)
    assert math.inf in choice.losses.values()
    choice = search_grid(lambda *_: math.inf, rates, 100)
    assert (choice.best, len(choice.losses), choice.at_edge) == ((1e-3, 100), 5, False)
