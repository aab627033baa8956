import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter
from coin.networks.batchnorm import batchnorms, folded, mark_folded, recalibrate


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)
    ).double()


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 6, 6, generator=draw, dtype=torch.float64) for size in (5, 5, 3)]


def statistics(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)


def test_recalibrated_statistics_are_those_of_the_batches_weighted_by_their_samples(batches):
    net = network()
    first, second = net[1], net[5]
    first.running_mean.fill_(1e6)  # is forgotten
    with torch.no_grad():
        expected = ([], [])
        for batch in batches:
            x = net[0](batch)
            expected[0].append(statistics(x))
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (variance + first.eps).sqrt()
            expected[1].append(statistics(net[4](x.relu())))
    assert recalibrate(net, batches) == 13
    for layer, found in zip((first, second), expected, strict=True):
        shares = torch.tensor([5, 5, 3], dtype=torch.float64) / 13
        means, variances = (shares @ torch.stack(values) for values in zip(*found, strict=True))
        torch.testing.assert_close(layer.running_mean, means, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, variances, rtol=1e-12, atol=1e-12)
        assert layer.num_batches_tracked.item() == 3


def test_a_network_that_changes_its_inputs_leaves_the_batches_as_they_are(batches):
    net = network()
    net.register_forward_pre_hook(lambda module, arguments: (arguments[0].sub_(1),))
    before = [batch.clone() for batch in batches]
    recalibrate(net, batches)
    assert all(map(torch.equal, batches, before))


def test_recalibrating_leaves_parameters_modes_momenta_and_gradients_as_found(batches):
    net = network().train()
    net[5].eval()
    net[1].momentum = 0.37
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]

    def breaks_off():
        yield from batches[:2]  # the first has been used when the third is asked for
        raise KeyError

    recalibrate(net, batches)
    with pytest.raises(KeyError):
        recalibrate(net, breaks_off())
    assert [module.training for module in net.modules()] == modes
    assert (net[1].momentum, net[5].momentum) == (0.37, 0.1)
    assert batchnorms(net)
    assert not batchnorms(nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        *[((4, 4, 1), (4, 5)), ((4, 1), (5,)), ((1, 4), (5,))],
        *[((4, 1, 4), (5, 4)), ((1, 1, 1), (3,)), ((1, 1, 4), (2, 4))],
    ],
)
def test_a_batch_of_one_sample_is_joined_to_another(sizes, joined):
    def flat():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()  # one sample has no variance at all

    torch.manual_seed(2)
    net = flat()
    wanted = flat()
    wanted.load_state_dict(net.state_dict())
    inputs = torch.randn(sum(sizes), 3, dtype=torch.float64)
    assert recalibrate(net, inputs.split(list(sizes))) == sum(sizes)
    recalibrate(wanted, inputs.split(list(joined)))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), wanted.buffers(), strict=True))


def test_with_fewer_than_two_samples_nothing_is_reset(batches):
    net = network().train()
    net(batches[0])
    before = [buffer.clone() for buffer in net.buffers()]
    for few in ([], [batches[0][:1]]):
        with pytest.raises(StateError, match="found fewer than two calibration samples"):
            recalibrate(net, few)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


class Twice(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(3 * x) + self.norm(x + 1)


def test_a_layer_that_runs_twice_in_a_pass_counts_both(batches):
    """It had the statistics of its second call: a variance of 1 in the place of 5."""
    net = Twice(nn.BatchNorm2d(2)).double()
    recalibrate(net, batches)
    shares = torch.tensor([5, 5, 3], dtype=torch.float64) / 26
    mean, variance = (
        sum(share * (statistics(3 * x)[i] + statistics(x + 1)[i]) for share, x in zip(shares, batches, strict=True))
        for i in range(2)
    )
    torch.testing.assert_close(net.norm.running_mean, mean)
    torch.testing.assert_close(net.norm.running_var, variance)


class Stubborn(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


def test_a_layer_that_is_called_by_name_is_recalibrated(batches):
    class ByName(nn.BatchNorm2d):
        def __call__(self, x):
            return super().__call__(input=x)

    plain = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten())
    named = nn.Sequential(ByName(2), nn.Flatten())
    recalibrate(plain.to(batches[0].dtype), batches)
    recalibrate(named.to(batches[0].dtype), batches)
    torch.testing.assert_close(named.state_dict(), plain.state_dict())


def test_a_layer_that_stays_in_eval_mode_is_recalibrated_and_one_that_never_runs_is_not_reset(batches):
    net, usual = nn.Sequential(Stubborn(2)).double(), nn.Sequential(nn.BatchNorm2d(2)).double()
    net.unused = nn.BatchNorm2d(2)
    net.forward = lambda x: net[0](x)
    net.unused.running_mean.fill_(7.0)
    for each in (net.eval(), usual):
        recalibrate(each, batches)
    torch.testing.assert_close(net[0].running_mean, usual[0].running_mean)
    torch.testing.assert_close(net[0].running_var, usual[0].running_var)
    assert not net[0].training
    assert net.unused.running_mean.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_batchnorm_leaves_the_outputs_as_they_are(batches, bias):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)).double().eval()
    norm = net[1]
    for tensor in [norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var]:
        tensor.uniform_(0.5, 2)
    wanted = net(batches[0])
    state = net.state_dict()
    net.load_state_dict(state | folded(state, "0.weight", "0.bias" if bias else None, "1", norm.eps))
    torch.testing.assert_close(net(batches[0]), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_folded_batchnorm_that_was_trained_since_runs_again(batches):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(4)).eval()
    inputs = batches[0].float()
    net(inputs)
    net.load_state_dict(net.state_dict() | folded(net.state_dict(), "0.weight", None, "1", net[1].eps))
    mark_folded(net, {"1": "0.weight"})
    torch.testing.assert_close(Adapted(net)(inputs), net(inputs))
    recalibrate(net, [3 * inputs + 1])
    torch.testing.assert_close(Adapted(net)(inputs), net(inputs))


@torch.no_grad()
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_folded_batchnorm_whose_own_parameters_adapters_change_answers_with_the_change(batches, parameter):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(4)).eval()
    inputs = batches[0].float()
    net(inputs)
    net.load_state_dict(net.state_dict() | folded(net.state_dict(), "0.weight", None, "1", net[1].eps))
    mark_folded(net, {"1": "0.weight"})
    adapter = Adapter({f"1.{parameter}": {"scale": torch.rand(3), "shift": torch.rand(3)}})
    torch.testing.assert_close(Adapted(net, [adapter])(inputs, experts=0), adapter.applied_to(net)(inputs))
