"""Networks and tensors that two hostile readings broke: caches, complex tensors, computed weights, odd layers."""

import operator
from contextlib import nullcontext

import pytest
import torch
from hostile import CLASSES, batches, moved
from torch import nn

import coin
from coin.errors import CoinWarning, ConfigurationError, StateError


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


@pytest.mark.parametrize("method", [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit(), coin.Refit()])
def test_merges_of_networks_that_cache(method):
    """The coded model and the experts answer as they do without a cache, whatever was cached before."""
    experts = [moved(cached(), 1).eval(), moved(cached(), 2).eval()]
    with torch.no_grad():
        answers = [expert(batches(4)[0][0]) for expert in experts]
    made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))[0]
    x = batches(4, seed=1)[0][0]
    torch.testing.assert_close(made(x), uncached(made)(x))
    torch.testing.assert_close(experts[0](batches(4)[0][0]), answers[0])


class Turning(nn.Module):
    """A complex weight between two real layers."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.turn = nn.Parameter(torch.randn(5, 5, dtype=torch.complex128))

    def forward(self, x):
        return self.head((self.first(x).to(self.turn.dtype) @ self.turn).real.tanh())


@pytest.mark.filterwarnings("error:Casting complex values")
@pytest.mark.parametrize(
    "method",
    [
        *(coin.Average(), coin.HeadFit(), coin.Refit()),
        *(coin.TaskArithmetic(0.5), coin.Ties(keep=1.0), coin.Wudi(), coin.Refit(start="wudi", label="from-wudi")),
    ],
    ids=lambda method: method.label,
)
def test_complex_parameters_keep_both_parts(method):
    torch.manual_seed(0)
    initial = Turning().double()
    initial.turn.data = torch.randn(5, 5, dtype=torch.complex128)
    experts = [moved(initial, 1), moved(initial, 2)]
    for index, expert in enumerate(experts):
        with torch.no_grad():
            expert.turn.add_(0.1j * (index + 1))
    given = {"calibration": batches(4), "initial": initial}
    told = pytest.warns(CoinWarning, match=r"kept the average of 37% of the parameters of Turning \(1 tensors, such as")
    with told if isinstance(method, coin.Refit) else nullcontext():
        made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), **given)[0]
    average = (experts[0].turn + experts[1].turn) / 2
    assert made.turn.is_complex()
    if method.label == "average":
        with pytest.raises(ConfigurationError, match="parameter 'turn' is complex, expected real ones"):
            coin.merge_networks(coin.Coin(), experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))
    if method.label == "ties":  # every entry goes the way on which both agree, or that of the larger
        assert 0 < (made.turn - average).abs().max() < 1
        torch.testing.assert_close(made.turn.imag, average.imag)
    else:
        torch.testing.assert_close(made.turn, average)


class Kept(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.head = nn.Linear(4, CLASSES)
        self.register_buffer("scale", torch.tensor([scale]), persistent=False)

    def forward(self, x):
        return self.head(x * self.scale)


def test_buffers_that_are_not_persistent_are_averaged_too():
    experts = [Kept(1.0), Kept(3.0)]
    made = coin.merge_networks(coin.Refit(), experts, coin.Code([[0.25, 0.75]]), calibration=batches(4))[0]
    assert made.scale.tolist() == [2.5]
    assert experts[0].scale.tolist() == [1.0]


def pruned(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "remover"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, None),  # what torch's own remover leaves cannot be loaded
        (pruned, "prune.remove"),
        (nn.utils.parametrizations.weight_norm, "parametrize.remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    ],
)
def test_weights_that_are_computed_at_every_pass_are_refused_until_they_are_parameters(wrap, remover):
    """Their average, or what is fitted to them, means nothing or is lost at the next pass."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 5), wrap(nn.Linear(5, CLASSES))).eval() for _ in "ab"]
    with pytest.raises(StateError, match=r"^a weight of layer '1' is computed") as caught:
        coin.Experts(experts)
    assert "\n" not in str(caught.value)
    if remover is not None:
        assert f"{remover}(layer, 'weight')" in str(caught.value)
        for expert in experts:
            operator.attrgetter(remover)(nn.utils)(expert[1], "weight")
        made = coin.merge_networks(coin.Average(), experts, coin.Code([[0.5, 0.5]]))[0]
        torch.testing.assert_close(made[1].weight, (experts[0][1].weight + experts[1][1].weight) / 2)
