"""Random numbers, and the generators that are left alone."""

import torch
from torch import nn

from coin.merging import Experts, UserMethod
from coin.networks import NetworkConfig, build_network
from coin.networks.weights import with_own_head


def test_what_draws_from_a_seed_leaves_every_generator_as_it_was(monkeypatch):
    seeds = []  # of all GPUs
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(5)
    assert seeds == [5]
    experts = Experts([nn.Linear(4, 3), nn.Linear(4, 3)], calibration=[[torch.ones(2, 4)]] * 2)
    before = torch.get_rng_state()
    network = build_network(NetworkConfig("small_resnet", 8, options={"width": 2}), 3, seed=7)
    with_own_head(network, network.state_dict(), seed=7)
    UserMethod(lambda experts, calibration: nn.Linear(4, 3)).make(experts, [0.5, 0.5])
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == [5]
