"""What every method keeps to, on networks of several kinds."""

import re
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import CoinError, CoinWarning, ConfigurationError, NumericalError, StateError
from coin.merging import Average, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.networks import BatchNormPolicy
from coin.networks.heads import replace_head
from coin.networks.small import SmallViT
from coin.statistics import fisher_sums, gram_sums

WEIGHTS = (0.2, 0.3, 0.5)


def head():
    return nn.Flatten(), nn.Linear(16, 3)


def small_vit():
    network = SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12)
    replace_head(network, 3)
    return network


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (2, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), *head()), (2, 4, 4)),
    "batchnorm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), *head()), (2, 4, 4)),
    "vit": (small_vit, (3, 8, 8)),
}
# With the relative tolerance to which a method solves what it solves.
METHODS = {
    "average": (Average(), 1e-12),
    "coin": (Coin(), 1e-10),
    "coin undamped": (Coin(damping=0), 1e-10),
    "regmean": (RegMean(), 1e-10),
    "regmean linear": (RegMean("linear", alpha=0.5), 1e-10),
    "head_fit": (HeadFit(), 1e-8),
    "refit": (Refit(), 1e-8),
}
every_method = pytest.mark.parametrize("name", METHODS)
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "vit" else ()) for kind in NETWORKS]
every_network = pytest.mark.parametrize("kind", KINDS)


def setup(kind, dtype=torch.float64):
    """An initialisation, three experts a little way from it in every parameter, and each one's calibration batches."""
    make, shape = NETWORKS[kind]
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    initial = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(dtype)
        experts = [deepcopy(initial) for _ in WEIGHTS]
        for expert in experts:
            for parameter in expert.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(dtype)
        for buffer in (buffer for expert in experts for buffer in expert.buffers() if buffer.ndim):
            buffer += 0.1 * torch.rand(buffer.shape, generator=draw).to(dtype)
    tasks = [torch.randn(20, *shape, generator=draw).to(dtype) * (1 + index) for index in range(3)]
    return initial, experts, [task.split(15) for task in tasks]


def parameters_of(network):
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def assert_parameters_close(found, expected, tolerance):
    for key, tensor in parameters_of(expected).items():
        torch.testing.assert_close(
            found.get_parameter(key).detach(), tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


@every_network
@every_method
def test_identical_experts_merge_to_themselves(kind, name):
    initial, (expert, *_), calibration = setup(kind)
    experts = Experts([expert, deepcopy(expert), deepcopy(expert)], initial=initial, calibration=calibration)
    coded = METHODS[name][0].coded_model(experts, WEIGHTS).network
    if "refit" in name and kind == "batchnorm":  # which is folded in: other parameters of the same function
        answers = [experts.run(network, experts.pooled).logits for network in (coded, expert)]
        torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-10)
    else:
        assert_parameters_close(coded, expert, 1e-10)


@every_network
@every_method
def test_permuting_experts_with_their_weights_changes_nothing(kind, name):
    initial, networks, calibration = setup(kind)
    method, tolerance = METHODS[name]
    one, two = (
        method.coded_model(
            Experts([networks[i] for i in order], initial=initial, calibration=[calibration[i] for i in order]),
            [WEIGHTS[i] for i in order],
        )
        for order in ((0, 1, 2), (2, 0, 1))
    )
    assert_parameters_close(one.network, two.network, tolerance)
    if kind != "linear":  # whose residuals are rounding, as then are choices by them
        residuals = [made.chosen.get("held_out_residual", {}) for made in (one, two)]
        assert residuals[1] == pytest.approx(residuals[0], rel=1e-6)


@every_network
@every_method
def test_experts_stay_as_they_are_and_give_their_type_and_a_network_of_its_own(kind, name):
    initial, networks, calibration = setup(kind, torch.float32)
    networks = [network.train() for network in networks]
    before = [deepcopy(network.state_dict()) for network in [initial, *networks]]
    experts = Experts(networks, initial=initial, calibration=calibration)
    coded = METHODS[name][0].coded_model(experts, WEIGHTS).network
    assert not coded.training
    assert {tensor.dtype for tensor in coded.parameters()} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in coded.parameters())
    for key, parameter in coded.named_parameters():
        for network in [initial, *networks]:
            assert not torch.equal(parameter, network.get_parameter(key)), key
    with torch.no_grad():
        for parameter in coded.parameters():
            parameter.zero_()
    assert all(module.training for network in networks for module in network.modules())
    for network, state in zip([initial, *networks], before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_fitted_head_on_equal_bodies_is_the_mixture_and_one_that_gives_no_logits_is_refused(bias):
    _, networks, calibration = setup("mlp")
    for network in networks:
        network[0] = deepcopy(networks[0][0])
        if not bias:
            network[2].bias = None
    experts = Experts(networks, calibration=calibration)
    merged, average = (method.make(experts, WEIGHTS).network for method in (HeadFit(), Average()))
    assert_parameters_close(merged, average, 1e-10)
    networks[1][0].weight.data *= 2
    experts = Experts(networks, calibration=calibration)
    fitted, average = (method.make(experts, WEIGHTS).network for method in (HeadFit(), Average()))
    target = sum(w * experts.run(each, experts.pooled).logits for w, each in zip(WEIGHTS, networks, strict=True))
    errors = [(experts.run(each, experts.pooled).logits - target).square().sum() for each in (fitted, average)]
    assert errors[0] < errors[1]
    assert torch.equal(fitted[0].weight, average[0].weight)  # nothing but the head moves
    for network in networks:
        network.append(nn.Softmax(1))
    with pytest.raises(StateError, match=r"^the logits of Sequential are not its head '2' of [^\n]*$"):
        HeadFit().make(Experts(networks, calibration=calibration), WEIGHTS)


# Policies and compression


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items()) and first.keys() == second.keys()


def test_averages_are_of_parameters_and_of_statistics_or_keep_those_of_the_initialisation():
    initial, networks, _ = setup("batchnorm")
    merged = Average(batchnorm="average").make(Experts(networks), WEIGHTS).network
    for name, tensor in merged.state_dict().items():
        every = [network.state_dict()[name] for network in networks]
        if tensor.is_floating_point():
            mean = sum(weight * each for weight, each in zip(WEIGHTS, every, strict=True))
            torch.testing.assert_close(tensor, mean, rtol=1e-14, atol=1e-14)
        else:
            assert tensor == every[0]
    keep = Average(batchnorm=BatchNormPolicy.keep)
    kept = keep.make(Experts(networks, initial=initial), WEIGHTS).network
    assert same(dict(kept.named_buffers()), dict(initial.named_buffers()))
    assert same(dict(kept.named_parameters()), dict(merged.named_parameters()))
    with pytest.raises(ConfigurationError, match="no shared initialisation, which the method or its B"):
        keep.make(Experts(networks), WEIGHTS)
    assert keep.make(Experts(setup("mlp")[1]), WEIGHTS).chosen == {}  # without BatchNorm a policy needs nothing
    for wrong in (Coin, "Coin"):
        with pytest.raises(ConfigurationError, match="expected an object of a method's class"):
            merge_networks(wrong, networks, [WEIGHTS])


@pytest.mark.parametrize("method", [Average, Refit])
def test_compressed_coded_models_stand_beside_the_whole_ones(method):
    _, networks, calibration = setup("batchnorm")
    options = {} if method is Refit else {"batchnorm": "average"}
    packed = method(**options, compress=[{"bits": 8}, {"bits": 2}])
    whole = merge_networks(method(**options), networks, [WEIGHTS], calibration=calibration)
    assert whole.compressed == {}
    code = [WEIGHTS, (0.4, 0.3, 0.3)]
    merged = merge_networks(packed, networks, code, calibration=calibration)
    assert same(merged[0].state_dict(), whole[0].state_dict())
    names = [f"{packed.label}-8bit", f"{packed.label}-2bit"]
    assert list(merged.compressed) == names
    x = torch.cat(calibration[0])
    with torch.no_grad():
        for network, compressed in zip(merged, merged.compressed[names[0]], strict=True):
            assert (compressed.network()(x) - network(x)).norm() < 0.1 * network(x).norm()
    if method is Average:  # Refit rounds rows as short as these to 8 bits
        assert merged.compressed[names[1]][0].nbytes < merged.compressed[names[0]][0].nbytes


# Damage

DAMAGED = {
    **{name: METHODS[name][0] for name in ("average", "coin", "coin undamped", "regmean", "head_fit")},
    "regmean undamped": RegMean(alpha=1, damping=0),
}
USES_FISHERS = ("coin", "coin undamped")


def damaged(damage: str) -> Experts:
    """Three experts in float32 with everything that a method may want."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    generator = torch.Generator().manual_seed(7)
    samples = 1 if damage == "one sample a task" else 30
    data = [torch.randn(samples, 6, generator=generator) for _ in networks]
    if damage == "constant inputs":
        data = [torch.ones(samples, 6) for _ in networks]
    if damage == "outputs that overflow":
        networks[1][2].weight.data.fill_(3e38)
        networks[1][0].weight.data.mul_(100)
    fishers = [fisher_sums(network, [x]).mean() for network, x in zip(networks, data, strict=True)]
    grams = [gram_sums(network, [x]).mean() for network, x in zip(networks, data, strict=True)]
    initial = deepcopy(networks[0])
    if damage == "a NaN in an expert":
        networks[1][2].bias.data[0] = torch.nan
    if damage == "no Fisher anywhere":
        fishers = [{key: torch.zeros_like(value) for key, value in fisher.items()} for fisher in fishers]
    return Experts(networks, initial=initial, fishers=fishers, grams=grams, calibration=[[x] for x in data])


SINGULAR = r"the Gram matrix of '\d\.weight' is singular with a damping of 0; raise the method's damping"
OVERFLOW = {
    **dict.fromkeys(USES_FISHERS, (StateError, "the fisher of expert 1 is not finite: tensor '0")),
    "head_fit": (StateError, "the calibration output of expert 1 is not finite: tensor 'logits'"),
}
EVERYWHERE = r"the Fisher of expert 0, 1, 2 is zero everywhere"

# Damage → method → the error or the warning that is due; where there is none, a finite network without a word.
DUE: dict[str, dict[str, tuple[type[Exception], str]]] = {
    "none": {},
    "a NaN in an expert": dict.fromkeys(DAMAGED, (StateError, r"expert 1 is not finite: tensor '2\.bias'")),
    "no Fisher anywhere": dict.fromkeys(USES_FISHERS, (CoinWarning, EVERYWHERE)),
    "constant inputs": {"regmean undamped": (NumericalError, SINGULAR)},
    "one sample a task": {"regmean undamped": (NumericalError, SINGULAR)},
    "outputs that overflow": OVERFLOW,
}


@pytest.mark.parametrize("damage", DUE)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_method_gives_a_finite_network_or_names_the_cause(damage: str, name: str) -> None:
    experts = damaged(damage)
    due, message = DUE[damage].get(name, (None, ""))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CoinWarning)
        if due is not None and issubclass(due, CoinError):
            with pytest.raises(due, match=message) as caught:
                DAMAGED[name].coded_model(experts, WEIGHTS)
            assert "\n" not in str(caught.value)
            return
        coded = DAMAGED[name].coded_model(experts, WEIGHTS).network
    assert all(bool(torch.isfinite(tensor).all()) for tensor in coded.parameters())
    said = [str(each.message) for each in told if issubclass(each.category, CoinWarning)]
    assert [bool(re.search(message, each)) for each in said[:1]] == [True] * (due is not None)
