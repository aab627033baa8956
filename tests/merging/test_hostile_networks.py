"""Networks that two hostile readings broke: each was merged or estimated wrongly, or crashed."""

import pytest
import torch
from hostile import CLASSES, batches, methods, moved
from torch import nn

import coin


class Caching(nn.Module):
    """Attention biases that are gathered once in eval mode and kept until `train`, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.cache = {}

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def gathered(self):
        if self.training:
            return self.biases[[0, 1, 2, 1, 0]]
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases[[0, 1, 2, 1, 0]]
        return self.cache["cpu"]

    def forward(self, x):
        return (x + self.gathered()).tanh()


def cached(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), Caching(), nn.Linear(5, CLASSES)).double().eval()


def uncached(network):
    """What the network is without a cache: in training mode, which nothing else in it looks at."""
    other = cached().train()
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_fisher_of_parameters_that_eval_mode_caches(evaluated):
    network, (samples, _) = cached(), batches(4)
    if evaluated:
        with torch.no_grad():
            network(samples[0])
    plain = cached().train()
    expected = torch.stack(
        [torch.autograd.grad(plain(x[None])[0, c], plain[1].biases)[0] ** 2 for x in samples[0] for c in range(CLASSES)]
    )
    found = coin.fisher_diagonal(network, samples)["1.biases"]
    torch.testing.assert_close(found, expected.sum(0) / len(samples[0]))
    assert not network.training
    assert not network[1].training


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.label)
def test_merges_of_networks_that_cache(method):
    """The coded model and the experts answer as they do without a cache, whatever was cached before."""
    experts = [moved(cached(), 1).eval(), moved(cached(), 2).eval()]
    with torch.no_grad():
        answers = [expert(batches(4)[0][0]) for expert in experts]
    made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))[0]
    x = batches(4, seed=1)[0][0]
    torch.testing.assert_close(made(x), uncached(made)(x))
    torch.testing.assert_close(experts[0](batches(4)[0][0]), answers[0])


def test_distillation_of_networks_that_cache():
    experts = [moved(cached(), 1).eval(), moved(cached(), 2).eval()]
    for readout in (False, True):
        made = coin.distill(experts, coin.Code([[0.5, 0.5]]), batches(4), lr=0.01, steps=3, readout=readout)[0]
        assert not torch.equal(made[1].biases, (experts[0][1].biases + experts[1][1].biases) / 2)
        torch.testing.assert_close(made(batches(4)[0][0]), uncached(made)(batches(4)[0][0]))


class Adapted(nn.Module):
    """A LoRA layer that merges into its weight in eval mode, as the first implementations do."""

    def __init__(self):
        super().__init__()
        self.weight, self.merged = nn.Parameter(torch.randn(CLASSES, 4).double(), requires_grad=False), False
        self.a, self.b = (nn.Parameter(torch.randn(*shape).double()) for shape in ((2, 4), (CLASSES, 2)))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        return x @ (self.weight if self.merged else self.weight + self.b @ self.a).T


def test_layers_that_write_to_their_weights_in_train_are_left_alone():
    torch.manual_seed(0)
    network, (samples, _) = nn.Sequential(Adapted()), batches(4)
    before = [parameter.clone() for parameter in network.parameters()]
    found = coin.fisher_diagonal(network, samples)
    assert all(bool(value.any()) for value in found.values())
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert not network[0].merged
