"""Tensors and layers that two hostile readings broke: complex ones, buffers that follow from weights, odd layers."""

import operator

import pytest
import torch
from hostile import CLASSES, batches, moved
from torch import nn

import coin
from coin.errors import CoinWarning, ConfigurationError, StateError


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
    made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4), initial=initial)[0]
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


@pytest.mark.parametrize("method", [coin.Average(), coin.Refit()], ids=lambda each: each.label)
def test_buffers_that_are_not_persistent_are_averaged_too(method):
    experts = [Kept(1.0), Kept(3.0)]
    made = coin.merge_networks(method, experts, coin.Code([[0.25, 0.75]]), calibration=batches(4))[0]
    assert made.scale.tolist() == [2.5]
    assert experts[0].scale.tolist() == [1.0]


def test_what_cannot_be_refitted_is_told_where_it_is_much():
    class Untouchable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Parameter(torch.randn(4, 5).double()), nn.Linear(5, CLASSES).double()

        def forward(self, x):
            return self.head((x @ (2 * self.inner)).tanh())

    experts = [moved(Untouchable(), seed) for seed in (1, 2)]
    with pytest.warns(CoinWarning, match=r"'refit' kept the average of 53% of the parameters of Untouchable \(1 tens"):
        coin.merge_networks(coin.Refit(), experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))


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
