"""Tensors and layers that two hostile readings broke: complex ones, buffers that follow from weights, odd layers."""

import pytest
import torch
from hostile import CLASSES, batches, moved
from torch import nn

import coin
from coin.errors import CoinWarning, ConfigurationError, HeadError, StateError


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
    if method.label == "ties":  # every entry goes the way on which both agree, or that of the larger
        assert 0 < (made.turn - average).abs().max() < 1
        torch.testing.assert_close(made.turn.imag, average.imag)
    else:
        torch.testing.assert_close(made.turn, average)


def test_methods_that_need_real_gradients_say_so():
    experts = [moved(Turning().double(), seed) for seed in (1, 2)]
    with pytest.raises(ConfigurationError, match="parameter 'turn' is complex, expected real ones"):
        coin.merge_networks(coin.Coin(), experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))


def spectral(wrap, seed):
    torch.manual_seed(seed)
    layers = [wrap(nn.Linear(4, 6)), nn.Tanh(), wrap(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, CLASSES)]
    network = nn.Sequential(*layers).double().train()
    for _ in range(30):  # power iterations
        network(torch.randn(2, 4).double())
    return network.eval()


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("method", [coin.Average(), coin.Refit("mix"), coin.HeadFit()], ids=lambda each: each.label)
def test_layers_of_spectral_norm_one_have_it_after_a_merge(wrap, method):
    """Averaged u and v are no singular vectors: norms were 6.0 and 13.6."""
    experts = [spectral(wrap, 1), spectral(wrap, 2)]
    made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))[0]
    made(batches(4)[0][0])
    for layer in (made[0], made[2]):
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1)
    same = coin.merge_networks(method, [experts[0]] * 2, coin.Code([[0.5, 0.5]]), calibration=batches(4))[0]
    torch.testing.assert_close(same(batches(4)[0][0]), experts[0](batches(4)[0][0]))


def test_other_parametrisations_whose_buffers_differ_are_refused():
    experts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        layer.weight = torch.linalg.qr(torch.randn(4, 4)).Q
        experts.append(nn.Sequential(layer, nn.Linear(4, CLASSES)))
    with pytest.raises(StateError, match="remove_parametrizations on the experts first") as caught:
        coin.merge_networks(coin.Average(), experts, coin.Code([[0.5, 0.5]]))
    assert "\n" not in str(caught.value)


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


def test_refit_of_a_batchnorm_without_bias():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm.register_parameter("bias", None)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES)
    )
    experts = [moved(network.double(), 1).eval(), moved(network.double(), 2).eval()]
    x, residuals = torch.cat([batch for task in batches(3, 6, 6) for batch in task]), []
    for method in (coin.Average(batchnorm="average"), coin.Refit("mix")):
        made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(3, 6, 6))[0]
        residuals.append(float((made(x) - sum(expert(x) for expert in experts) / 2).norm()))
    assert residuals[1] < residuals[0]


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


@pytest.mark.parametrize("method", [coin.Average(), coin.Refit("mix")], ids=lambda each: each.label)
def test_weights_of_several_tensors_with_and_without_a_spectral_norm(method):
    """Every method crashed on them for want of one tensor of which the weight is made."""
    wrap, norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    for make in (wrap, lambda layer: norm(wrap(layer))):
        experts = [spectral(make, 1), spectral(make, 2)]
        made = coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))[0]
        if make is not wrap:
            assert float(torch.linalg.matrix_norm(made[0].weight, 2)) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_head_whose_weight_is_computed_is_not_fitted(wrap):
    """What was fitted was lost at the next pass, but for the bias."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), wrap(nn.Linear(5, CLASSES))).double().eval() for _ in "ab"]
    for method in (coin.HeadFit(), coin.Refit()):
        with pytest.raises(HeadError, match="whose weight is a parameter; name another"):
            coin.merge_networks(method, experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))


def test_pruning_masks_that_differ_are_refused_and_equal_ones_stay():
    experts = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double() for _ in "ab"]
    for expert in experts:
        nn.utils.prune.l1_unstructured(expert[0], "weight", 0.5)
    with pytest.raises(StateError, match=r"the pruning mask '0\.weight_mask' differs between experts"):
        coin.merge_networks(coin.Average(), experts, coin.Code([[0.5, 0.5]]))
    experts[1][0].weight_mask.copy_(experts[0][0].weight_mask)
    made = coin.merge_networks(coin.Average(), experts, coin.Code([[0.5, 0.5]]))[0]
    assert torch.equal(made[0].weight_mask, experts[0][0].weight_mask)
