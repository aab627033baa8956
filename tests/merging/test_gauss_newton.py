import pytest
import torch
from torch import nn

from coin.data import Calibration, Samples, pooled
from coin.errors import CoinWarning, ConfigurationError, DataError
from coin.merging import Average, Coin, Experts, GaussNewton
from coin.networks import recalibrate

WEIGHTS = (0.2, 0.3, 0.5)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def setup(make=mlp, samples=30, shape=(6,), fisher=True):
    """Three random experts of one architecture, pooled inputs, and arbitrary positive Fishers, all in float64."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double().eval())
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    fishers = [
        {k: torch.rand(v.shape, generator=generator, dtype=torch.float64) * fisher for k, v in n.named_parameters()}
        for n in networks
    ]
    return Experts(networks, fishers=fishers, calibration=[[part] for part in inputs.tensor_split(3)])


def errors_of(experts, network):
    return experts.run(network, experts.pooled).logits - experts.target(WEIGHTS)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (6,)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, groups=1), nn.Flatten()), (2, 4, 4)),
    ],
)
def test_a_network_linear_in_its_parameters_reaches_the_mixture(make, shape):
    experts = setup(make, samples=60, shape=shape)
    assert errors_of(experts, Coin(1e-6).make(experts, WEIGHTS).network).norm() > 0.1
    merged = GaussNewton(max_iterations=40, max_steps=6).make(experts, WEIGHTS).network
    assert errors_of(experts, merged).abs().max() < 1e-7
    average = Average().make(experts, WEIGHTS).network
    for key, tensor in average.named_parameters():
        torch.testing.assert_close(merged.get_parameter(key), tensor, rtol=1e-6, atol=1e-6)


def test_a_deep_network_gets_closer_also_where_it_was_not_fitted():
    experts = setup(samples=150)
    methods = [Coin(1e-6), *(GaussNewton(max_steps=steps, tolerance=0) for steps in (1, 3))]
    errors = [float(errors_of(experts, each.make(experts, WEIGHTS).network)[-30:].norm()) for each in methods]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.5 * errors[0]


def test_without_any_fisher_the_metric_is_the_identity():
    experts = setup(fisher=False)
    with pytest.warns(CoinWarning, match=r"^the Fisher of expert 0, 1, 2 is zero everywhere"):
        merged = GaussNewton().make(experts, WEIGHTS).network
    before = errors_of(experts, Average().make(experts, WEIGHTS).network).norm()
    assert errors_of(experts, merged).norm() < before


@pytest.mark.parametrize("policy", ["auto", "average", "recalibrate"])
def test_batchnorm_stays_as_the_start_has_it(policy):
    def make():
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
        recalibrate(network, [torch.randn(20, 6, dtype=torch.float64)])
        return network

    experts = setup(make)
    start = Coin(batchnorm=policy).make(experts, WEIGHTS)
    merged = GaussNewton(max_steps=1, batchnorm=policy).make(experts, WEIGHTS)
    renamed = {"held_out_error": "held_out_error_of_start"}
    assert merged.chosen == {renamed.get(name, name): value for name, value in start.chosen.items()}
    assert not torch.equal(merged.network[3].weight, start.network[3].weight)
    for name, buffer in start.network.named_buffers():
        assert torch.equal(merged.network.get_buffer(name), buffer), name


def of_samples(count):
    return Experts([nn.Linear(2, 2)], calibration=[[torch.zeros(count, 2)]])


def test_a_fifth_is_held_out():
    assert [of_samples(count).split[1].num_samples for count in (10, 3, 2)] == [2, 1, 1]
    with pytest.raises(DataError, match="found 1 calibration samples, expected at least 2"):
        of_samples(1).split  # noqa: B018


SIZES = [(20,) * 5, (5,) * 5, (10,) * 10, (40, 20, 20, 10, 10), (40, 20), (35, 5)]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_task_is_fitted_and_held_out_in_its_share(sizes):
    """Of an experiment's calibration data as of a library's lists of batches."""
    images = torch.zeros(max(sizes), 1, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(max(sizes), dtype=torch.int64)
    stored = pooled([Calibration.of(Samples.of(images[:size], labels[:size]), 4) for size in sizes]).part
    batches = [torch.full((size, 2), float(index)).split(4) for index, size in enumerate(sizes)]
    experts = Experts([nn.Linear(2, 2) for _ in sizes], calibration=batches)
    assert {len(batch) for batch in experts.pooled} == {4, sum(sizes) % 4 or 4}
    assert torch.equal(torch.cat(list(experts.pooled))[:, 0], stored.float())
    training = torch.arange(sum(sizes)) < sum(sizes) - max(1, round(0.2 * sum(sizes)))
    for split, mask in zip(experts.split, (training, ~training), strict=True):
        assert torch.equal(torch.cat(list(split))[:, 0], stored[mask].float())
    for index, size in enumerate(sizes):
        assert int((stored[~training] == index).sum()) == size // 5
        assert int((stored[training] == index).sum()) == size - size // 5


def test_passes_are_those_of_outputs_and_products():
    """Of a step with one product: 3 + 2 for it, 3 for the step itself, and one for the outputs before and after."""
    experts = setup(samples=150)
    GaussNewton(max_steps=1, max_iterations=1).make(experts, WEIGHTS)
    assert experts.passes == 150 * (len(WEIGHTS) + 1 + 3 + 2 + 3 + 1)


def test_two_samples_still_make_a_network():
    merged = GaussNewton().make(setup(samples=2), WEIGHTS).network
    assert all(torch.isfinite(tensor).all() for tensor in merged.parameters())


def test_options_and_requirements():
    for options in ({"max_steps": 0}, {"max_iterations": 0}, {"tolerance": 1.0}, {"ridge": 0.0}, {"damping": -1.0}):
        with pytest.raises(ConfigurationError):
            GaussNewton(**options)
    experts = setup()
    fishers = experts.statistic(GaussNewton().fisher("own"))
    with pytest.raises(ConfigurationError, match="found no calibration inputs, which the merge needs"):
        GaussNewton().make(Experts(experts.networks, fishers=fishers), WEIGHTS)
