"""BatchNorm: running statistics are re-estimated as the mean over batches, and folding leaves outputs as they are."""

from copy import deepcopy

import pytest
import torch
from closeness import check_equal
from torch import nn

from coin.errors import StateError
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter
from coin.networks.batchnorm import batchnorms, folded, mark_folded, recalibrate

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(13, 2, 6, 6, generator=draw, dtype=torch.float64)
    return list(images.split(5))


@pytest.fixture
def network():
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).double()


def check_statistics(norm, calls):
    """Compare a BatchNorm's statistics with those of its inputs, call by call, weighted by their samples."""
    sizes = torch.tensor([len(x) for x in calls]).double()
    shares = sizes / sizes.sum()
    means = torch.stack([x.mean((0, 2, 3)) for x in calls])
    variances = torch.stack([x.var((0, 2, 3)) for x in calls])
    torch.testing.assert_close(norm.running_mean, shares @ means, **CLOSE)
    torch.testing.assert_close(norm.running_var, shares @ variances, **CLOSE)


@torch.no_grad()
def test_recalibrated_statistics_are_those_of_the_batches_weighted_by_their_samples(
    network, batches
):
    convolution, first, _, _, second, last = network
    first.running_mean.fill_(1e6)  # is forgotten
    assert recalibrate(network, batches) == 13
    inputs = [convolution(batch) for batch in batches]
    check_statistics(first, inputs)
    first.train()
    later = [second(first(x).relu()) for x in inputs]
    check_statistics(last, later)


class ByName(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(input=x)


class Stubborn(nn.BatchNorm2d):
    """A layer that stays in eval mode."""

    def train(self, mode=True):
        return super().train(False)


class Calling(nn.Module):
    """Calls a BatchNorm with what functions make of its inputs, and another one never."""

    def __init__(self, norm, calls):
        super().__init__()
        self.norm = norm
        self.unused = nn.BatchNorm2d(2)
        self.calls = calls

    def forward(self, x):
        return sum(self.norm(call(x)) for call in self.calls)


KINDS = {
    "runs twice": (nn.BatchNorm2d, [lambda x: 3 * x, lambda x: x + 1]),
    "called by name": (ByName, [torch.clone]),
    "stays in eval mode": (Stubborn, [torch.clone]),
    "changes its inputs": (nn.BatchNorm2d, [lambda x: x.sub_(1)]),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_layer_is_recalibrated_however_it_runs(case, batches):
    kind, functions = KINDS[case]
    network = Calling(kind(2), functions).double()
    before = deepcopy(batches)
    unused = deepcopy(network.unused)
    recalibrate(network, batches)
    calls = [function(x.clone()) for x in before for function in functions]
    check_statistics(network.norm, calls)
    torch.testing.assert_close(batches, before, rtol=0, atol=0)
    check_equal(network.unused, unused)


def test_recalibrating_leaves_parameters_modes_momenta_and_gradients_as_found(network, batches):
    network.train()
    network[5].eval()
    network[1].momentum = 0.37
    parameters = deepcopy(list(network.parameters()))
    modes = [module.training for module in network.modules()]

    def breaks_off():
        yield from batches[:2]  # the first has been used when the third is asked for
        raise KeyError

    recalibrate(network, batches)
    with pytest.raises(KeyError):
        recalibrate(network, breaks_off())
    assert [module.training for module in network.modules()] == modes
    assert (network[1].momentum, network[5].momentum) == (0.37, 0.1)
    torch.testing.assert_close(list(network.parameters()), parameters, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_layers_without_running_statistics_are_none():
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    assert not batchnorms(nn.Sequential(nn.GroupNorm(1, 3), untracked))


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [((4, 4, 1), (4, 5)), ((1, 4), (5,)), ((4, 1, 4), (5, 4)), ((1, 1, 1), (3,))],
)
def test_a_batch_of_one_sample_is_joined_to_another(sizes, joined):
    network = nn.BatchNorm1d(3).double()  # of one sample there is no variance at all
    inputs = torch.randn(sum(sizes), 3, dtype=torch.float64)
    assert recalibrate(network, inputs.split(sizes)) == sum(sizes)
    check_statistics(network, inputs[..., None, None].split(joined))


@pytest.mark.parametrize("samples", [0, 1])
def test_with_fewer_than_two_samples_nothing_is_reset(network, batches, samples):
    network(batches[0])
    before = deepcopy(network)
    with pytest.raises(StateError, match="found fewer than two calibration samples"):
        recalibrate(network, [batches[0][:1]] * samples)
    check_equal(network, before)


def with_a_norm(bias, head=()):
    """Return a network in eval mode with a BatchNorm behind a convolution, of any statistics."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3), *head).double().eval()
    norm = network[1]
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    return network


def fold(network):
    state = network.state_dict()
    bias = "0.bias" if "0.bias" in state else None
    network.load_state_dict(state | folded(state, "0.weight", bias, "1", network[1].eps))
    mark_folded(network, {"1": "0.weight"})


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_batchnorm_leaves_the_outputs_as_they_are(batches, bias):
    network = with_a_norm(bias)
    expected = network(batches[0])
    fold(network)
    torch.testing.assert_close(network(batches[0]), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("is_trained", [False, True], ids=["folded", "trained since"])
@pytest.mark.parametrize("name", ["1.weight", "1.bias", "0.weight"])
def test_a_body_answers_as_its_folded_network(batches, name, is_trained):
    network = with_a_norm(False, [nn.Flatten(), nn.Linear(48, 4)])
    fold(network)
    if is_trained:
        recalibrate(network, [3 * batches[0] + 1])
    change = {"scale": torch.tensor([0.5, 1.5, 0.7]), "shift": torch.tensor([0.3, -0.2, 0.9])}
    adapter = Adapter({name: change})
    found = Adapted(network, [adapter])(batches[0], experts=0)
    torch.testing.assert_close(found, adapter.applied_to(network)(batches[0]))
