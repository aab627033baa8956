"""Buffers that are no statistics: masks with infinities, complex ones, and parameters under two names."""

import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.merging import Average, Coin, Experts
from coin.networks import NetworkConfig, load_network, save_network, sources


class Causal(nn.Module):
    """Attention of 4 tokens to those before them, by a mask of −∞; the head's weight has a second name."""

    def __init__(self, num_classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.query, self.embedding, self.head = nn.Linear(5, 5), nn.Linear(5, num_classes), nn.Linear(5, num_classes)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("turn", torch.exp(1j * torch.arange(5) / 3))

    def forward(self, x):
        query = self.query(x)
        query = (query * self.turn).real
        return self.head(((query @ x.mT + self.mask).softmax(-1) @ x).mean(1))


@pytest.fixture
def networks():
    return [Causal(seed=seed) for seed in range(3)]


@pytest.fixture
def calibration():
    return [[torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(seed))] for seed in range(3)]


ROWS = [(0.2, 0.3, 0.5), (0.0, 1 / 3, 2 / 3), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", [Average(), Coin()], ids=lambda method: method.label)
def test_a_mask_of_infinities_that_all_experts_share_stays(networks, calibration, method, row):
    made = method.make(Experts(networks, calibration=calibration), row)
    assert made.network.head.weight is made.network.embedding.weight  # two names of one parameter
    wanted = sum(weight * network.head.weight.detach() for weight, network in zip(row, networks, strict=True))
    if method.name == "average":
        torch.testing.assert_close(made.network.head.weight.detach(), wanted)
    assert torch.equal(made.network.mask, networks[0].mask)
    assert torch.equal(made.network.turn, networks[0].turn)
    with torch.no_grad():
        assert bool(made.network(calibration[0][0]).isfinite().all())


def test_a_nan_in_a_buffer_or_an_infinity_in_one_without_is_refused(networks):
    networks[1].turn[2] = torch.inf
    for name in ("turn", "mask"):
        with pytest.raises(StateError, match=rf"^the coded model of method 'soup' is not finite: tensor '{name}'"):
            Average(label="soup").make(Experts(networks), ROWS[0])
        networks[1].turn[2] = networks[0].turn[2]
        networks[1].mask[2, 1] = torch.nan


def test_a_network_with_a_mask_goes_through_a_file_and_damage_does_not(networks, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.Own.kinds, "causal", Causal)
    config, path = NetworkConfig("causal", 4), tmp_path / "net.safetensors"
    coded = Average().make(Experts(networks), ROWS[0]).network
    save_network(path, coded, config, 3, {})
    loaded = load_network(path)
    assert loaded.provenance["infinite"] == ["mask"]
    assert all(torch.equal(tensor, coded.state_dict()[name]) for name, tensor in loaded.network.state_dict().items())
    before = path.read_bytes()
    coded.mask[0, 0] = torch.nan
    with pytest.raises(StateError, match=r"is not finite: tensor 'mask' holds a NaN or an infinity[^\n]*$"):
        save_network(path, coded, config, 3, {})
    assert path.read_bytes() == before
