"""Networks that are held while they fit."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from coin.evaluation.cache import NetworkCache


class Loads:
    """Loads networks of 0.3 MiB by their places, and counts how often."""

    def __init__(self):
        self.counts = Counter()

    def load(self, place):
        self.counts[place] += 1
        return nn.Linear(300, 262, bias=False)

    def cache(self, memory_mib=None):
        return NetworkCache([partial(self.load, place) for place in range(4)], memory_mib)


# In how many MiB, which networks are asked for one after another, how often each is loaded.
HELD = {
    "all fit": (None, [[0], [1], [2], [3], [0], [1]], {0: 1, 1: 1, 2: 1, 3: 1}),
    "three fit": (1, [[0], [1], [2], [1], [3], [3], [0], [1]], {0: 2, 1: 2, 2: 1, 3: 1}),
    "none is kept": (0, [[0], [0], [1], [0]], {0: 2, 1: 1}),
    "those that are needed stay": (0, [[0, 1, 2], [2, 3], [2, 3]], {0: 1, 1: 1, 2: 1, 3: 1}),
}


@pytest.mark.parametrize("name", HELD)
def test_a_network_is_loaded_again_only_where_not_all_fit(name):
    memory_mib, places, expected = HELD[name]
    loads = Loads()
    cache = loads.cache(memory_mib)
    for needed in places:
        assert list(cache.networks(needed)) == needed
    assert loads.counts == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_loaded_in_a_test_loop_serves_outside_of_it(mode):
    with mode():
        network = Loads().cache().networks([0])[0]
    assert not network.training
    inputs = torch.ones(4, 300, requires_grad=True)
    network(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0], network.weight.sum(0))


def test_a_network_that_is_held_keeps_its_type_where_it_moves():
    cache = Loads().cache()
    cache.hold(0, nn.Linear(2, 2).double())
    cache.move(torch.device("cpu"))
    assert cache.networks([0])[0].weight.dtype == torch.float64
