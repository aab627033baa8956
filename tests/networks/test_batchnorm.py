"""BatchNorm: running statistics are re-estimated as the mean over batches, and folding leaves outputs as they are."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter
from coin.networks.batchnorm import batchnorms, folded, mark_folded, recalibrate

SIZES = (5, 5, 3)


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 6, 6, generator=draw, dtype=torch.float64) for size in SIZES]


@pytest.fixture
def network():
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).double()


def weighted(values, sizes=SIZES):
    """Return the mean of batches' values, weighted by their samples."""
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)


def check_statistics(norm, inputs, sizes=SIZES):
    """Compare a BatchNorm's statistics with those of its inputs, batch by batch."""
    means = [x.mean((0, 2, 3)) for x in inputs]
    variances = [x.var((0, 2, 3), unbiased=True) for x in inputs]
    torch.testing.assert_close(norm.running_mean, weighted(means, sizes), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, weighted(variances, sizes), rtol=1e-12, atol=1e-12)


def normalised(x, norm):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt()


@torch.no_grad()
def test_recalibrated_statistics_are_those_of_the_batches_weighted_by_their_samples(
    network, batches
):
    first = network[1]
    first.running_mean.fill_(1e6)  # is forgotten
    assert recalibrate(network, batches) == sum(SIZES)
    inputs = [network[0](batch) for batch in batches]
    later = [network[4](normalised(x, first).relu()) for x in inputs]
    check_statistics(first, inputs)
    check_statistics(network[5], later)
    assert first.num_batches_tracked.item() == 3


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(3 * x) + self.norm(x + 1)


class ByName(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(input=x)


class Stubborn(nn.BatchNorm2d):
    """A layer that stays in eval mode."""

    def train(self, mode=True):
        return super().train(False)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.unused = nn.BatchNorm2d(2)
        self.unused.running_mean.fill_(7.0)

    def forward(self, x):
        return self.norm(x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(x.sub_(1))


KINDS = {
    "runs twice": (Twice, lambda x: torch.cat([3 * x, x + 1])),
    "called by name": (lambda: nn.Sequential(ByName(2)), lambda x: x),
    "stays in eval mode": (lambda: nn.Sequential(Stubborn(2)), lambda x: x),
    "one never runs": (Unused, lambda x: x),
    "changes its inputs": (InPlace, lambda x: x - 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_recalibrated_however_it_runs(kind, batches):
    build, read = KINDS[kind]
    network = build().double()
    before = deepcopy(batches)
    recalibrate(network, batches)
    norm = batchnorms(network)[0]
    if kind == "runs twice":  # each call counts: it had the statistics of the second one
        calls = [call for x in before for call in (3 * x, x + 1)]
        check_statistics(norm, calls, [size for size in SIZES for _ in range(2)])
    else:
        check_statistics(norm, [read(x) for x in before])
    torch.testing.assert_close(batches, before, rtol=0, atol=0)
    if kind == "one never runs":
        assert network.unused.running_mean.tolist() == [7.0, 7.0]


def test_recalibrating_leaves_parameters_modes_momenta_and_gradients_as_found(network, batches):
    network.train()
    network[5].eval()
    network[1].momentum = 0.37
    parameters = {
        name: parameter.detach().clone() for name, parameter in network.named_parameters()
    }
    modes = [module.training for module in network.modules()]

    def breaks_off():
        yield from batches[:2]  # the first has been used when the third is asked for
        raise KeyError

    recalibrate(network, batches)
    with pytest.raises(KeyError):
        recalibrate(network, breaks_off())
    assert [module.training for module in network.modules()] == modes
    assert (network[1].momentum, network[5].momentum) == (0.37, 0.1)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.grad is None


def test_layers_without_running_statistics_are_none():
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    assert not batchnorms(nn.Sequential(nn.GroupNorm(1, 3), untracked))


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        ((4, 4, 1), (4, 5)),
        ((4, 1), (5,)),
        ((1, 4), (5,)),
        ((4, 1, 4), (5, 4)),
        ((1, 1, 1), (3,)),
        ((1, 1, 4), (2, 4)),
    ],
)
def test_a_batch_of_one_sample_is_joined_to_another(sizes, joined):
    network = nn.BatchNorm1d(3).double()  # of one sample there is no variance at all
    inputs = torch.randn(sum(sizes), 3, dtype=torch.float64)
    assert recalibrate(network, inputs.split(sizes)) == sum(sizes)
    parts = [part[..., None, None] for part in inputs.split(joined)]
    check_statistics(network, parts, joined)


@pytest.mark.parametrize("samples", [0, 1])
def test_with_fewer_than_two_samples_nothing_is_reset(network, batches, samples):
    network.train()
    network(batches[0])
    before = deepcopy(network.state_dict())
    with pytest.raises(StateError, match="found fewer than two calibration samples"):
        recalibrate(network, [batches[0][:1]] * samples)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


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
    torch.testing.assert_close(network(batches[0]), expected, rtol=1e-12, atol=1e-12)


CHANGES = {
    "none": {},
    "weight": {
        "1.weight": {
            "scale": torch.tensor([0.5, 1.5, 0.7]),
            "shift": torch.tensor([0.3, -0.2, 0.9]),
        }
    },
    "bias": {
        "1.bias": {"scale": torch.tensor([0.5, 1.5, 0.7]), "shift": torch.tensor([0.3, -0.2, 0.9])}
    },
}


@torch.no_grad()
@pytest.mark.parametrize("is_trained", [False, True], ids=["folded", "trained since"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_body_answers_as_its_folded_network(batches, case, is_trained):
    network = with_a_norm(False, [nn.Flatten(), nn.Linear(48, 4)])
    fold(network)
    if is_trained:
        recalibrate(network, [3 * batches[0] + 1])
    adapter = Adapter(CHANGES[case])
    found = Adapted(network, [adapter])(batches[0], experts=0)
    torch.testing.assert_close(found, adapter.applied_to(network)(batches[0]))
