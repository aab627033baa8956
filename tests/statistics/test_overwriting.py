"""Activations that overwrite their inputs: where they may, and that nothing else changes."""

import pytest
import torch
from torch import nn

from coin.merging import Experts, Refit
from coin.networks.small import SmallViT
from coin.statistics.guard import activations_in_place, can_overwrite, evaluating


class Reread(nn.Module):
    """What its activation reads is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.act, self.head = nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.map(x)
        return self.head(inner + self.act(inner))  # type: ignore[no-any-return]


def plain(*activations: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    maps = [each for activation in activations for each in (nn.Linear(6, 6), activation)]
    return nn.Sequential(*maps, nn.Linear(6, 3))


NETWORKS = {
    "plain": (plain(nn.GELU(), nn.SiLU(), nn.PReLU()), True),
    "read again": (Reread(), False),
    "over the samples": (plain(nn.Softmax(dim=0)), False),
    "no activation that is a module": (plain(nn.Identity()), False),
    "shared": (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), plain(nn.Tanh())), True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_may_overwrite_where_nothing_else_reads_their_inputs(name: str) -> None:
    network, expected = NETWORKS[name]
    assert can_overwrite(network, torch.randn(2, 6)) == expected


def test_the_pass_is_the_same_and_the_network_as_before() -> None:
    network, inputs = plain(nn.GELU(), nn.Softplus()), torch.randn(37, 6)
    with evaluating(network, gradients=False):
        expected, kept = network(inputs), inputs.clone()
        with activations_in_place(network):
            torch.testing.assert_close(network(inputs), expected)
        assert inputs.equal(kept)
        assert network(inputs).equal(expected)
    assert all("forward" not in vars(module) for module in network.modules())


def test_a_refit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = []
    for seed in range(2):
        torch.manual_seed(seed)
        experts.append(SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12).double())
    calibration = [list(torch.randn(40, 3, 8, 8, dtype=torch.float64).split(16)) for _ in experts]

    def refitted() -> nn.Module:
        return Refit("own", head=False).make(Experts(experts, calibration=calibration), [0.5, 0.5]).network

    assert can_overwrite(experts[0], calibration[0][0][:2])
    found = refitted()
    monkeypatch.setattr("coin.merging.units.can_overwrite", lambda *_: False)
    for name, values in refitted().state_dict().items():
        torch.testing.assert_close(values, found.state_dict()[name], rtol=1e-9, atol=1e-9, msg=name)
