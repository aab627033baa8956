"""Networks that are held while they fit."""

from collections import Counter

import pytest
import torch
from torch import nn

from coin.evaluation.cache import NetworkCache
from coin.networks.adapted import resident_nbytes


@pytest.fixture
def loaded():
    """How often each network was loaded."""
    return Counter()


@pytest.fixture
def loads(loaded):
    """What loads eight networks of 0.3 MiB."""

    def load(place):
        loaded[place] += 1
        return nn.Linear(300, 262, bias=False)

    return [lambda place=place: load(place) for place in range(8)]


# In how many MiB, which networks are asked for one after another, how often each is loaded.
HELD = {
    "all fit": (None, [[0], [1], [2], [3], [0], [1]], {0: 1, 1: 1, 2: 1, 3: 1}),
    "three fit": (1, [[0], [1], [2], [1], [3], [3], [0], [1]], {0: 2, 1: 2, 2: 1, 3: 1}),
    "none is kept": (0, [[0], [0], [1], [0]], {0: 2, 1: 1}),
    "those that are needed stay": (0, [[0, 1, 2], [2, 3], [2, 3]], {0: 1, 1: 1, 2: 1, 3: 1}),
}


@pytest.mark.parametrize("name", HELD)
def test_a_network_is_loaded_again_only_where_not_all_fit(name, loads, loaded):
    memory_mib, places, expected = HELD[name]
    cache = NetworkCache(loads, memory_mib)
    assert resident_nbytes(cache.networks([7])[7]) == 300 * 262 * 4
    cache = NetworkCache(loads, memory_mib)
    loaded.clear()
    for needed in places:
        assert list(cache.networks(needed)) == needed
    assert loaded == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_loaded_in_a_test_loop_serves_outside_of_it(mode, loads):
    with mode():
        network = NetworkCache(loads).networks([0])[0]
    assert not network.training
    inputs = torch.ones(4, 300, requires_grad=True)
    network(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0], network.weight.sum(0))


def test_a_network_that_is_held_keeps_its_type_where_it_moves(loads):
    cache = NetworkCache(loads)
    cache.hold(0, nn.Linear(2, 2).double())
    cache.move(torch.device("cpu"))
    assert cache.networks([0])[0].weight.dtype == torch.float64
