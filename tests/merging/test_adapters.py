"""Adapters against regressions written out, and bodies with adapters from the fit to a file and a coded system."""

from copy import deepcopy

import pytest
import torch
from near_experts import answers, assert_same_tensors, distance, perceptron
from torch import nn
from torch.testing import assert_close

import coin
from coin.coding import uniform
from coin.errors import ConfigurationError, DataError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.merging import Average, Refit, extract_lora, fit_adapters, merge_networks
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import stored_nbytes, with_adapters
from coin.networks.running import features_and_logits
from coin.networks.small import SmallViT


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 6, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def maps():
    return nn.Sequential(
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Linear(7, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 6, bias=False),
        nn.Linear(6, 4),
    )


def transformer():
    return SmallViT(4, 8, 4, depth=1, heads=2, width=8, mlp_width=12)


SHAPES = {
    convolutions: (3, 8, 8),
    maps: (5,),
    transformer: (3, 8, 8),
}
every_kind = pytest.mark.parametrize("make", SHAPES)


def make_experts(make, samples=60, apart=0.3):
    """Return three experts that lie around one start, in eval mode, and a batch of inputs for each."""
    torch.manual_seed(0)
    start = make().eval()
    experts = []
    inputs = []
    for place in range(3):
        expert = deepcopy(start)
        for tensor in expert.state_dict().values():
            if tensor.ndim > 0:
                tensor += apart * tensor.std().nan_to_num(0.1) * torch.rand_like(tensor)
        experts.append(expert)
        inputs.append([(1 + place / 2) * torch.randn(samples, *SHAPES[make])])
    return experts, inputs


def average_of(experts):
    return Average().make(coin.Experts(experts), [1 / len(experts)] * len(experts)).network


def features(network, x, expert=None):
    found, _ = features_and_logits(network, x, expert)
    return found.detach()


def feature_error(adapted, expert, place, x):
    own = features(expert, x)
    return float((features(adapted, x, place) - own).norm() / own.norm())


# One unit, by the book


def centred(x):
    return x - x.mean(0)


@pytest.mark.parametrize("samples", [9, 50])  # fewer rows than unknowns, and more
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_correction_is_the_reduced_rank_regression_drawn_to_the_experts_own_map(
    samples, rank, tmp_path
):
    torch.manual_seed(2)
    base = perceptron(12, 8, 3).double()
    network = perceptron(12, 8, 3).double()
    x = torch.randn(samples, 12, dtype=torch.float64) + 1
    made = extract_lora(network, base, [x], rank, tmp_path)
    body = base[0].weight.detach()
    own = network[0].weight.detach()
    a = centred(x)
    z = centred(network[0](x).detach())
    covariance = a.T @ a / samples
    ridge = 0.1 * covariance.diagonal().mean()
    metric = covariance + ridge * torch.eye(12)
    best = torch.linalg.solve(metric, a.T @ z / samples + ridge * own.T).T - body
    root = torch.linalg.cholesky(metric)
    u, s, v = torch.linalg.svd(best @ root, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    expected = torch.linalg.solve(root.T, cut.T).T
    assert_close(made[0].weight - body, expected, rtol=1e-3, atol=1e-4)


def test_scales_and_shifts_are_regressions_drawn_to_one_that_bytes_hold():
    torch.manual_seed(3)
    experts = [perceptron(5, 6, 3) for _ in range(2)]
    x = torch.randn(30, 5) + 1
    adapted = fit_adapters(experts[0], experts, [[x], [x]], rank=0)
    bias = experts[0][0].bias.detach()
    y = answers(experts[0][0], x) - bias
    z = answers(experts[1][0], x)
    variance = centred(y).square().mean(0)
    covariance = (centred(y) * centred(z)).mean(0)
    penalty = 0.01 * variance.mean()
    scale = (covariance + penalty) / (variance + penalty)
    changes = adapted.adapters[1].changes
    kept_scale = changes["0.weight"].scales()
    shift = z.mean(0) - kept_scale * y.mean(0) - bias
    kept_shift = changes["0.bias"](torch.zeros(6))
    for kept, wanted in ((kept_scale, scale), (kept_shift, shift)):
        half_step = (wanted.max() - wanted.min()) / 510
        assert (kept - wanted).abs().max() <= 1.01 * half_step


def test_taps_that_meet_no_image_count_in_the_ridge_as_zeros():
    """On one pixel a 3×3 kernel is a 1×1 one with a ninth of the ridge: the middle tap alone meets it."""
    torch.manual_seed(0)
    narrow = [nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(5, 3)) for _ in range(2)]
    wide = []
    for network in narrow:
        kernel = nn.Conv2d(3, 5, 3, padding=1)
        kernel.weight.data[..., 1:2, 1:2] = network[0].weight.data
        kernel.bias = network[0].bias
        wide.append(nn.Sequential(kernel, *network[1:]))
    inputs = [[torch.randn(40, 3, 1, 1)] for _ in narrow]

    def fitted(networks, ridge):
        adapted = fit_adapters(networks[0], networks, inputs, rank=2, ridge=ridge)
        (refitted,) = merge_networks(Refit(ridge), networks, [[0.5, 0.5]], calibration=inputs)
        return torch.stack([adapted.network(1)[0].weight, refitted[0].weight])

    assert_close(fitted(wide, 0.9)[..., 1:2, 1:2], fitted(narrow, 0.1))


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_inputs_that_are_constant_within_a_task_fit_nothing_but_shifts(size):
    """The round-off of centring is no signal: a correction is then the difference to the expert's own map."""
    torch.manual_seed(0)
    experts = [perceptron(12, 16, 5) for _ in range(2)]
    inputs = [[size * torch.randn(12).expand(200, 12)] for _ in experts]
    adapted = fit_adapters(experts[0], experts, inputs, rank=12)
    made = adapted.network(1)[0]
    assert distance(made, experts[1][0], torch.randn(500, 12)) < 0.2 * size
    assert bool((adapted.adapters[1].changes["0.weight"].scales() == 1).all())


# Bodies


@every_kind
def test_with_full_rank_a_body_becomes_each_expert(make):
    experts, inputs = make_experts(make, apart=1.0, samples=150)
    body = average_of(experts)
    whole = fit_adapters(body, experts, inputs, rank=99, ridge=1e-4)
    poor = fit_adapters(body, experts, inputs, rank=0)
    for place, expert in enumerate(experts):
        (x,) = inputs[place]
        near = feature_error(whole, expert, place, x)
        # Groups of a convolution and a transformer's positions have no correction.
        assert near < 0.6 * feature_error(poor, expert, place, x)


@every_kind
def test_a_mixed_batch_is_answered_as_by_each_plain_network_and_the_body_stays(make):
    experts, inputs = make_experts(make)
    body = experts[0]
    before = deepcopy(body)
    adapted = fit_adapters(body, experts, inputs, rank=2)
    mixed = torch.cat([batch[:4] for (batch,) in inputs])
    who = torch.tensor([2, 1, 0] * 4)
    with torch.no_grad():
        together = adapted(mixed, experts=who)
        alone = torch.stack([adapted.network(place)(mixed) for place in range(3)])
    assert_close(
        together,
        alone[who, torch.arange(12)],
        rtol=1e-3,
        atol=1e-3,
    )
    assert_same_tensors(body, before)


def test_more_rank_is_nearer_and_no_rank_nearer_than_one_network_for_all():
    experts, inputs = make_experts(convolutions, samples=200)
    (whole,) = merge_networks(Refit(), experts, uniform(3), calibration=inputs)
    (x,) = inputs[2]
    errors = [feature_error(whole, experts[2], None, x)]
    for rank in (0, 1, 3):
        method = Refit(adapters={"rank": rank})
        (adapted,) = merge_networks(method, experts, uniform(3), calibration=inputs)
        errors.append(feature_error(adapted, experts[2], 2, x))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", [Refit, Average])
def test_adapters_are_fitted_to_the_rounded_body_and_a_file_holds_both(method, tmp_path):
    torch.manual_seed(1)
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    experts = []
    for _ in range(2):
        expert = build_network(config, 3, seed=0).eval()
        for parameter in expert.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
        experts.append(expert)
    every = coin.Experts(experts, calibration=[[torch.randn(40, 3, 16, 16)] for _ in experts])
    x = every.samples("own")[0].inputs()
    merge = method(adapters={"rank": 2})
    made = merge.coded_model(every, [0.5, 0.5])
    packed = merge.pack(every, [0.5, 0.5], made, 2)
    rounded = with_adapters(packed.network(), packed.adapters)
    of_whole_body = with_adapters(packed.network(), made.adapters)
    assert feature_error(rounded, experts[0], 0, x) < 0.8 * feature_error(
        of_whole_body, experts[0], 0, x
    )
    save_network(tmp_path / "body.safetensors", made.network, config, 3, {}, made.adapters)
    file = load_network(tmp_path / "body.safetensors")
    packed.save(tmp_path / "packed.safetensors")
    again = coin.Compressed.load(tmp_path / "packed.safetensors", experts[0])
    assert again.nbytes == packed.nbytes
    for found, expected in ((file, made), (again, packed)):
        for one, other in zip(found.adapters, expected.adapters, strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(each, other.tensors[name]) for name, each in one.tensors.items())


def test_experts_without_a_share_have_no_adapters():
    experts, inputs = make_experts(maps)
    code = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    made = merge_networks(Refit(adapters={"rank": 1}), experts, code, calibration=inputs)
    for body, row in zip(made, code, strict=True):
        assert [each.nbytes > 0 for each in body.adapters] == [share > 0 for share in row]


def test_one_sample_of_a_task_is_enough():
    experts, inputs = make_experts(maps)
    few = [[batch[:1]] for (batch,) in inputs]
    adapted = fit_adapters(experts[0], experts, few, rank=4)
    assert bool(adapted(few[1][0], experts=1).isfinite().all())


def test_networks_that_are_nothing_but_a_head_have_empty_adapters():
    heads = [nn.Linear(4, 3) for _ in range(2)]
    adapted = fit_adapters(heads[0], heads, [[torch.randn(5, 4)]] * 2)
    assert [each.nbytes for each in adapted.adapters] == [0, 0]


# A coded system whose coded model is a body


@pytest.fixture(params=["whole", "compressed"])
def system(request):
    """Return a system of three experts and one body, its experts, their inputs and what it keeps of the body."""
    experts, inputs = make_experts(convolutions, samples=80)
    method = Refit(adapters={"rank": 3}, compress={"bits": 4})
    made = merge_networks(method, experts, uniform(3), calibration=inputs)
    body = made[0] if request.param == "whole" else made.compressed["refit+rank3-4bit"][0]
    kept = stored_nbytes(body) if request.param == "whole" else body.nbytes
    coded = coin.Coded(uniform(3), experts, [body], names="abc")
    coded.fit_decoder(inputs[0], [0, 1, 2], "expert_head")
    return coded, experts, [batch for (batch,) in inputs], kept


def test_a_body_is_measured_as_it_is_kept(system):
    coded, experts, inputs, kept = system
    tests = [[(x, expert(x).argmax(1))] for expert, x in zip(experts, inputs, strict=True)]
    table = coin.evaluate(coded, tests)
    heads = 3 * (4 * (4 * 6 + 4) + 8)  # with their class counts
    assert table["decoder"].tolist() == ["expert_head"] * 3
    assert table["nda"].min() > 0.9
    assert table["residual"].isna().all()
    assert table["memory_mib"].tolist() == [(kept + heads) / 2**20] * 3
    held = nbytes(coded.coded[0].state_dict().values())
    largest = 4 * max(parameter.numel() for parameter in experts[0].parameters())
    assert table["resident_mib"].tolist() == [(held + largest + heads) / 2**20] * 3


def test_decoders_that_cannot_read_a_body_are_refused(system):
    coded, _, inputs, _ = system
    for kind, erased in (("ridge", [0]), ("linear", [0, 1])):
        with pytest.raises(
            ConfigurationError, match=f"the decoder {kind} cannot read a body with adapters"
        ):
            coded.fit_decoder([inputs[0]], erased, kind)
    with pytest.raises(
        ConfigurationError, match=r"found no tasks .*, expected of which .*; give tasks="
    ):
        coded.accept(0.2, inputs=[inputs[0]], erased=[0])
    with pytest.raises(StateError, match="expected one; give experts="):
        coded.coded[0](inputs[0])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found {} for adapters, expected {rank: 16}"),
        ({"rank": -1}, "found rank=-1"),
        ({"rank": 1, "ridge": 0}, "found ridge=0"),
        ({"rank": 0, "scales": False}, "found rank=0, expected a whole number of at least 1"),
        ({"bits": 4}, "found .*bits.* for adapters, expected {rank: 16}"),
        (16, "found 16 for adapters, expected {rank: 16}"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Average(adapters=options)


def test_a_body_of_another_architecture_and_a_task_without_samples_are_refused():
    experts, inputs = make_experts(maps)
    with pytest.raises(StateError, match=r"'the body' has .*another architecture"):
        fit_adapters(nn.Linear(4, 3), experts, inputs)
    nothing = [inputs[1][0][:0]]
    with pytest.raises(DataError, match="no calibration samples of task 1"):
        fit_adapters(experts[0], experts, [inputs[0], nothing, inputs[2]])


def test_outputs_that_overflow_are_refused():
    experts = [nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)) for _ in range(2)]
    for layer in experts[1][:2]:
        layer.weight.data.mul_(1e30)
    inputs = [[torch.randn(60, 5)] for _ in experts]
    with pytest.raises(
        NumericalError, match="inputs or outputs on calibration data are not finite"
    ):
        fit_adapters(experts[0], experts, inputs, rank=0)


class Gain(nn.Module):
    """A network with a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 7)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.gain * self.map(x).tanh())


def test_a_parameter_without_dimensions_is_changed_as_others_are():
    torch.manual_seed(0)
    base = Gain().eval()
    expert = deepcopy(base)
    expert.gain.data *= 1.5
    inputs = torch.randn(60, 5)
    adapted = fit_adapters(base, [base, expert], [[inputs], [inputs]], rank=2)
    assert adapted.network(1).gain.shape == ()
    assert distance(adapted.network(1), expert, inputs) < distance(base, expert, inputs) / 3
