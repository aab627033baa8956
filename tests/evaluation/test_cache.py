from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from coin.evaluation.cache import NetworkCache
from coin.networks import load_network
from coin.networks.adapted import resident_nbytes


def test_what_is_held_stays_within_the_bound_and_uses_it(write_experts):
    paths = [Path(path) for path in write_experts([3] * 8).values()]
    cache = NetworkCache([lambda path=path: load_network(path).network for path in paths], memory_mib=1)
    most = 0
    for place in range(len(paths)):
        cache.networks([place])
        total = sum(resident_nbytes(network) for network in cache._held.values())
        assert total <= 2**20
        most = max(most, total)
    one = resident_nbytes(cache.networks([7])[7])
    assert most + one > 2**20


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_loaded_in_a_test_loop_serves_outside_of_it(mode):
    cache = NetworkCache([partial(nn.Linear, 3, 2)])
    with mode():
        (network,) = cache.networks([0]).values()
    assert not network.weight.is_inference()
    inputs = torch.ones(4, 3, requires_grad=True)
    network(inputs).sum().backward()
    assert torch.equal(inputs.grad[0], network.weight.sum(0))
