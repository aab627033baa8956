"""Adapters against regressions written out, and bodies with adapters from the fit to a file and a coded system."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from near_experts import Attention, distance
from torch import nn

import coin
from coin.coding import uniform
from coin.errors import CoinWarning, ConfigurationError, DataError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.merging import Average, Base, Refit, extract_lora, fit_adapters, merge_networks
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import stored_nbytes, with_adapters
from coin.networks.delta import read_factor, round_factor
from coin.networks.running import features_and_logits, linear_heads
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


SHAPES = {convolutions: (3, 8, 8), maps: (5,), transformer: (3, 8, 8)}
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
def test_a_correction_is_the_reduced_rank_regression_drawn_to_the_experts_own_map(samples, rank, tmp_path):
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)).double()
    network = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)).double()
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
    torch.testing.assert_close(made[0].weight - body, expected, rtol=1e-3, atol=1e-4)


def unit_outputs(layer, x):
    """Return a layer's outputs without its bias, [n, C]."""
    with torch.no_grad():
        made = layer(x) - layer.bias.view(-1, *[1] * (x.ndim - 2))
    return made.movedim(1, -1).reshape(-1, made.shape[1])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 6), (5,)),
        (lambda: nn.Conv2d(4, 6, 1, groups=2), (4, 2, 2)),
    ],
    ids=["linear", "groups"],
)
def test_scales_and_shifts_are_regressions_drawn_to_one_that_bytes_hold(layer, shape):
    torch.manual_seed(3)
    experts = [nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(3)) for _ in range(2)]
    inputs = [[torch.randn(30, *shape) + 1] for _ in experts]
    for expert in experts:
        expert(inputs[0][0])
    adapted = fit_adapters(experts[0], experts, inputs, rank=0)
    (x,) = inputs[1]
    y = unit_outputs(experts[0][0], x)
    z = unit_outputs(experts[1][0], x) + experts[1][0].bias.detach()
    variance = centred(y).square().mean(0)
    covariance = (centred(y) * centred(z)).mean(0)
    penalty = 0.01 * variance.mean()
    changes = adapted.adapters[1].changes
    scale = (covariance + penalty) / (variance + penalty)
    found_scale = changes["0.weight"].scales()
    half_step = (scale.max() - scale.min()) / 510
    assert (found_scale - scale).abs().max() <= 1.01 * half_step
    shift = z.mean(0) - found_scale * y.mean(0) - experts[0][0].bias.detach()
    found_shift = changes["0.bias"](torch.zeros(6))
    half_step = (shift.max() - shift.min()) / 510
    assert (found_shift - shift).abs().max() <= 1.01 * half_step


@pytest.mark.parametrize("rank", [2, 3])
def test_corrections_are_kept_in_4_bits_and_the_body_is_changed_by_what_is_read_back(rank):
    torch.manual_seed(4)
    layer = nn.Linear(30, 20)
    left = torch.randn(20, rank)
    right = torch.randn(rank, 30)
    scale = torch.full((20, 1), 0.5)
    adapter = coin.Adapter({"weight": {"left": left, "right": right, "scale": scale}})
    # A scale in a byte; two values of a factor in a byte; of each row the step between its values, and the first.
    assert adapter.nbytes == 20 + 8 + (10 + 15) * rank + 8 * rank
    found_left, found_right = adapter.changes["weight"].factors(20, 30)
    assert torch.equal(found_right, read_factor(round_factor(found_right), 30))
    product = found_left.T @ found_right
    assert (product - left @ right).norm() < 0.2 * (left @ right).norm()
    torch.testing.assert_close(adapter.applied_to(layer).weight, 0.5 * (layer.weight + product))


def kernels_of_one_tap():
    """Return networks with 1×1 kernels, and the same with 3×3 ones, of which on one pixel the middle tap counts."""
    torch.manual_seed(0)
    narrow = []
    wide = []
    for _ in range(2):
        network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))
        other = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), *deepcopy(network[1:]))
        other[0].weight.data[..., 1, 1] = network[0].weight.data[..., 0, 0]
        other[0].bias = network[0].bias
        narrow.append(network)
        wide.append(other)
    return narrow, wide


def test_taps_that_meet_no_image_count_in_the_ridge_as_zeros():
    narrow, wide = kernels_of_one_tap()
    inputs = [[torch.randn(40, 3, 1, 1)] for _ in narrow]

    def fitted(networks, ridge):
        adapted = fit_adapters(networks[0], networks, inputs, rank=2, ridge=ridge)
        corrected = adapted.adapters[1].changes["0.weight"](networks[0][0].weight)
        refitted = merge_networks(Refit(ridge), networks, [[0.5, 0.5]], calibration=inputs)[0]
        middle = networks[0][0].kernel_size[0] // 2
        both = torch.stack([corrected.detach(), refitted[0].weight.detach()])
        return both[..., middle, middle]

    torch.testing.assert_close(fitted(wide, 0.9), fitted(narrow, 0.1))
    for one, other in zip(fitted(wide, 0.1), fitted(narrow, 0.1), strict=True):
        assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_inputs_that_are_constant_within_a_task_fit_nothing_but_shifts(size):
    """The round-off of centring is no signal: a correction is then the difference to the expert's own map."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5))
    experts = [deepcopy(base).eval() for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = [[size * torch.randn(12).expand(200, 12)] for _ in experts]
    body = average_of(experts)
    adapted = fit_adapters(body, experts, inputs, rank=16)
    anywhere = torch.randn(500, 12)
    for place, expert in enumerate(experts):
        bare = nn.Sequential(*body[:3], expert[3])
        made = adapted.network(place, head=expert[3])
        without = distance(bare, expert, anywhere)
        assert distance(made, expert, anywhere) < 0.3 * without * size
        for change in adapted.adapters[place].changes.values():
            assert bool((change.scales() == 1).all())


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
    before = deepcopy(experts[0].state_dict())
    adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    for name, tensor in experts[0].state_dict().items():
        assert torch.equal(tensor, before[name])
    mixed = torch.cat([batch[:4] for (batch,) in inputs])
    who = torch.arange(3).repeat_interleave(4)
    order = torch.randperm(12)
    with torch.no_grad():
        together = adapted(mixed[order], experts=who[order])
        alone = [adapted.network(place)(batch[:4]) for place, (batch,) in enumerate(inputs)]
    torch.testing.assert_close(together, torch.cat(alone)[order], rtol=1e-3, atol=1e-3)
    own = experts[1].get_submodule(coin.networks.head_name(experts[1]))
    headed = adapted.network(1, own)
    assert torch.equal(linear_heads([headed])[0][0], own.weight)


def test_equal_experts_need_no_adapters():
    experts, inputs = make_experts(convolutions)
    network = experts[0]
    adapted = fit_adapters(network, [network, deepcopy(network)], inputs[:1] * 2)
    assert feature_error(adapted, network, 1, inputs[0][0]) < 0.01


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
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    torch.manual_seed(1)
    experts = [build_network(config, 3, seed=0).eval() for _ in range(2)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
    inputs = [[torch.randn(40, 3, 16, 16)] for _ in experts]
    x = inputs[0][0]
    code = [0.5, 0.5]
    merge = method(adapters={"rank": 2})
    every = coin.Experts(experts, calibration=inputs)
    made = merge.coded_model(every, code)
    packed = merge.pack(every, code, made, 2)
    rounded = with_adapters(packed.network(), packed.adapters)
    of_whole_body = with_adapters(packed.network(), made.adapters)
    error = feature_error(rounded, experts[0], 0, x)
    assert error < 0.8 * feature_error(of_whole_body, experts[0], 0, x)
    path = tmp_path / "body.safetensors"
    save_network(path, made.network, config, 3, {"what": "a body"}, made.adapters)
    file = load_network(path)
    body = with_adapters(made.network, made.adapters)
    assert file.nbytes == stored_nbytes(body)
    packed.save(tmp_path / "packed.safetensors")
    again = coin.Compressed.load(tmp_path / "packed.safetensors", experts[0])
    assert again.nbytes == packed.nbytes
    who = torch.tensor([1, 0, 1])
    for one, other in (
        (with_adapters(file.network, file.adapters), body),
        (with_adapters(again.network(), again.adapters), rounded),
    ):
        assert torch.equal(one(x[:3], experts=who), other(x[:3], experts=who))


def test_experts_without_a_share_have_no_adapters():
    experts, inputs = make_experts(maps)
    code = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    made = merge_networks(Refit(adapters={"rank": 1}), experts, code, calibration=inputs)
    for body, row in zip(made, code, strict=True):
        assert [each.nbytes > 0 for each in body.adapters] == [share > 0 for share in row]


def test_one_sample_a_task_and_networks_that_are_nothing_but_a_head():
    experts, inputs = make_experts(maps)
    few = [[batch[:1]] for (batch,) in inputs]
    adapted = fit_adapters(experts[0], experts, few, rank=4)
    for place, (batch,) in enumerate(few):
        assert bool(adapted(batch, experts=place).isfinite().all())
    heads = [nn.Linear(4, 3) for _ in range(2)]
    alone = fit_adapters(heads[0], heads, [[torch.randn(5, 4)]] * 2)
    assert [each.nbytes for each in alone.adapters] == [0, 0]


class Tied(nn.Module):
    """Tokens through an embedding, a map, attention and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.map = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.attention = Attention(6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.attention(self.map(self.table(tokens)))
        return self.head(self.twice(torch.relu(self.twice(x))).mean(1))


def test_shared_weights_and_embeddings_stay_and_attention_is_seen():
    torch.manual_seed(0)
    experts = [Tied().eval() for _ in range(2)]
    inputs = [[torch.randint(9, (40, 5))] for _ in experts]
    with pytest.warns(CoinWarning, match=r"'fit_adapters' leaves \d\d% of the parameters of Tied unfitted"):
        adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    changed = {name.rpartition(".")[0] for name in adapted.adapters[0].changes}
    assert changed == {"map", "attention", "attention.out_proj"}
    with torch.no_grad():  # where torch's fused attention would hide its projections
        found = adapted(inputs[1][0], experts=1)
        own = adapted.network(1)(inputs[1][0])
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


class Gain(nn.Module):
    """A network with a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.head(self.gain * self.map(x).tanh())


def test_a_parameter_without_dimensions_is_changed_as_others_are():
    torch.manual_seed(0)
    experts = [Gain().eval()]
    experts.append(deepcopy(experts[0]))
    experts[1].gain.data *= 1.5
    inputs = [[torch.randn(60, 5)] for _ in experts]
    adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    assert adapted.network(1).gain.shape == ()
    assert distance(adapted.network(1), experts[1], inputs[1][0]) < 0.05


class Raw(nn.Module):
    """A network that is called otherwise, wrapped: of a tensor by name it makes the inputs that it wants."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, raw):
        return SimpleNamespace(logits=self.network((raw - 30) / 20))


@pytest.mark.parametrize("method", [Average, Base, Refit])
def test_a_wrapped_network_is_fitted_as_its_own_is(method):
    experts, inputs = make_experts(maps, apart=1.0)
    wrapped = [Raw(expert) for expert in experts]
    named = [[{"raw": 30 + 20 * batch}] for (batch,) in inputs]
    direct = [[(batch[0]["raw"] - 30) / 20] for batch in named]
    options = method(adapters={"rank": 2}, compress={"bits": 4})
    one = merge_networks(options, experts, uniform(3), calibration=direct, initial=experts[0])
    other = merge_networks(options, wrapped, uniform(3), calibration=named, initial=wrapped[0])
    (label,) = one.compressed
    bodies = [(one[0], other[0]), (one.compressed[label][0], other.compressed[label][0])]
    for body, wrapped_body in bodies:
        system = coin.Coded(uniform(3), experts, [body]).fit_decoder(direct[0], [1], "expert_head")
        again = coin.Coded(uniform(3), wrapped, [wrapped_body])
        again.fit_decoder(named[0], [1], "expert_head")
        expected = system.decode(direct[1][0], [1])
        assert torch.equal(again.decode(named[1][0], [1]), expected)


def with_slash():
    network = nn.Sequential()
    network.add_module("stage/one", nn.Linear(5, 6))
    network.add_module("head", nn.Linear(6, 4))
    return network


def test_a_layer_may_have_a_slash_in_its_name(tmp_path):
    torch.manual_seed(0)
    experts = [with_slash() for _ in range(2)]
    inputs = [[torch.randn(60, 5)] for _ in experts]
    method = Average(adapters={"rank": 2}, compress={"bits": 4})
    made = merge_networks(method, experts, uniform(2), calibration=inputs)
    (packed,) = made.compressed["average+rank2-4bit"]
    for body in (made[0], packed):
        system = coin.Coded(uniform(2), experts, [body])
        system.fit_decoder(inputs[0], [0, 1], "expert_head")
        system.save(tmp_path / "system.safetensors")
        loaded = coin.Coded.load(tmp_path / "system.safetensors", experts)
        expected = system.decode(inputs[1][0], [1])
        assert torch.equal(loaded.decode(inputs[1][0], [1]), expected)


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


def test_a_coded_system_asks_the_body_for_whoever_is_lost(system):
    coded, experts, inputs, _ = system
    decoded = coded.decode(inputs[1], ["c", "b"])
    for place, expert in enumerate((2, 1)):
        ((weight, bias),) = linear_heads([experts[expert]])
        own = features(coded.coded[0], inputs[1], expert)
        torch.testing.assert_close(decoded[place], own @ weight.T + bias)
    tasks = torch.arange(3).repeat_interleave(80)
    assert len(coded.accept(0.2, inputs=[torch.cat(inputs)], tasks=tasks)) == 3


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
        with pytest.raises(ConfigurationError, match=f"the decoder {kind} cannot read a body with adapters"):
            coded.fit_decoder([inputs[0]], erased, kind)
    with pytest.raises(ConfigurationError, match=r"found no tasks .*, expected of which .*; give tasks="):
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
    with pytest.raises(NumericalError, match="inputs or outputs on calibration data are not finite"):
        fit_adapters(experts[0], experts, inputs, rank=0)
