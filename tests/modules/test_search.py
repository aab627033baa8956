"""The walk over learning rates and numbers of steps, on losses whose minimum is known."""

import math

import pytest

from coin.distillation.search import TRIALS, search_curves, search_grid

GIVEN = [[3e-4, 1e-3, 3e-3], [1e-3], [1e-3, 1e-2]]


def bowl(best_rate, best_steps, sharpness=1.0):
    """A smooth convex loss in the logarithms, with its minimum there."""
    return lambda rate, steps: math.log(rate / best_rate) ** 2 + sharpness * math.log2(steps / best_steps) ** 2


def ratio_of(rates):
    return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else math.sqrt(10)


def neighbours(pair, rates):
    (rate, steps), ratio = pair, ratio_of(rates)
    return [(rate * ratio, steps), (rate / ratio, steps), (rate, 2 * steps), (rate, steps / 2)]


def is_among(pair, tried):
    """Given rates need not be in one exact ratio: 3e-4, 1e-3, 3e-3."""
    return any(rate == pytest.approx(pair[0], rel=0.2) and steps == pair[1] for rate, steps in tried)


@pytest.mark.parametrize("rates", GIVEN)
@pytest.mark.parametrize(("times", "power"), [(0, 0), (1, 0), (0, 1), (0, -2), (1, 1), (-2, 1), (2, -1)])
def test_it_walks_to_a_minimum_beyond_what_was_given(rates, times, power):
    """The minimum lies `times` grid points beyond the rates' edge, on either side, and at another number of steps."""
    edge = rates[len(rates) // 2] if times == 0 else rates[-1] if times > 0 else rates[0]
    wanted = (edge * ratio_of(rates) ** times, 150 * 2.0**power)
    loss = bowl(*wanted)
    choice = search_grid(loss, rates, 160)
    (rate, steps), tried = choice.best, choice.losses
    assert not choice.at_edge
    assert rate == pytest.approx(wanted[0], rel=0.2)
    assert steps == round(160 * 2.0**power)
    assert len(tried) <= TRIALS
    assert all(value == loss(*pair) for pair, value in tried.items())
    assert min(tried, key=tried.get) == (rate, steps)
    for pair in neighbours((rate, steps), rates):
        assert is_among(pair, tried), pair


@pytest.mark.parametrize("rates", GIVEN)
@pytest.mark.parametrize(
    "loss",
    [lambda rate, steps: 1 / rate, lambda rate, steps: rate, lambda rate, steps: 1 / steps],
    ids=["faster", "slower", "longer"],
)
def test_on_a_loss_that_falls_for_ever_it_stops_and_says_so(rates, loss):
    calls = []
    choice = search_grid(lambda *each: calls.append(each) or loss(*each), rates, 100)
    assert choice.at_edge
    assert len(calls) == len(set(calls)) == len(choice.losses) == TRIALS
    assert loss(*choice.best) == min(choice.losses.values())
    assert not all(is_among(each, choice.losses) for each in neighbours(choice.best, rates))


def test_it_begins_in_the_middle_and_given_rates_are_taken_as_they_are():
    calls = []
    search_grid(lambda *each: calls.append(each) or bowl(1e-3, 100)(*each), [2e-4, 1e-3, 3e-3], 100)
    assert calls[0] == (1e-3, 100)
    assert set(calls) == {(1e-3, 100), (2e-4, 100), (3e-3, 100), (1e-3, 50), (1e-3, 200)}


def test_a_single_step_has_no_half():
    choice = search_grid(lambda rate, steps: steps + bowl(1e-3, 1)(rate, 1), [1e-3], 4)
    assert (choice.best[1], choice.at_edge) == (1, False)
    assert min(count for _, count in choice.losses) == 1


def test_where_runs_diverge_it_turns_back():
    def loss(rate, steps):
        return math.inf if rate > 1.1e-3 else bowl(1e-2, 100)(rate, steps)

    choice = search_grid(loss, [3e-4, 1e-3, 3e-3], 100)
    assert (choice.best, choice.at_edge) == ((1e-3, 100), False)
    assert math.inf in choice.losses.values()
    choice = search_grid(lambda *_: math.inf, [3e-4, 1e-3, 3e-3], 100)
    assert (choice.best, len(choice.losses), choice.at_edge) == ((1e-3, 100), 5, False)


def test_with_a_constant_rate_the_points_of_the_given_runs_are_compared():
    def losses(rate, every):
        return [rate * abs(steps - 60) + 1 if rate < 1 else math.nan for steps in range(every, 101, every)]

    choice = search_curves(losses, [1e-3, 1e-2, 1.0], 100)
    assert (choice.best, choice.at_edge) == ((1e-3, 60), True)
    assert len(choice.losses) == 20
    assert not search_curves(losses, [1e-4, 1e-3, 1.0], 100).losses.keys() & {(1.0, 10)}
    assert search_curves(lambda *_: [math.inf], [1e-3], 5).losses == {}
