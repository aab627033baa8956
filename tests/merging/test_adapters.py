"""Adapters against regressions written out, and bodies with adapters from the fit to a file and to serving."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coin
from coin.coding import uniform
from coin.errors import CoinWarning, ConfigurationError, DataError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.merging import Average, Base, Refit, fit_adapters, merge_networks
from coin.merging.adapter_fit import Moments
from coin.merging.regression import Regression
from coin.merging.units import affine_units
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import Adapted, stored_nbytes, with_adapters
from coin.networks.adapter import AdapterOptions
from coin.networks.delta import balanced, read_factor, round_factor
from coin.networks.kept import kept_parameters
from coin.networks.running import features_and_logits
from coin.networks.small import SmallViT
from coin.serving.servers import NetworkServer, Request, run_together
from coin.statistics.solvers import fit_affine


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def maps():
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 6, bias=False), nn.Linear(6, 4)
    )


def transformer():
    return SmallViT(image_size=8, patch_size=4, depth=1, heads=2, width=8, mlp_width=12, num_classes=4)


INPUTS = {convolutions: (3, 8, 8), maps: (5,), transformer: (3, 8, 8)}


def make_experts(make, count=3, samples=60, apart=0.3):
    """Return experts that lie around one start, in eval mode, and a batch of inputs for each."""
    torch.manual_seed(0)
    start, experts = make(), []
    for _ in range(count):
        experts.append(deepcopy(start).eval())
        for tensor in [*experts[-1].parameters(), *(b for n, b in experts[-1].named_buffers() if "running" in n)]:
            tensor.data += apart * tensor.std().nan_to_num(0.1) * torch.rand_like(tensor)
    scales = torch.linspace(1, 2, count)
    return experts, [[scale * torch.randn(samples, *INPUTS[make])] for scale in scales]


def solved(rows, wanted, weights, penalties):
    """Return the ridge regression of `wanted` [n, O] on `rows` [n, K] by numpy, with penalties (matrix, towards)."""
    root = weights.sqrt()[:, None]
    left = torch.cat([root * rows, *(matrix for matrix, _ in penalties)]).numpy()
    right = torch.cat([root * wanted, *(towards for _, towards in penalties)]).numpy()
    return torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0])


def test_the_matrix_is_fitted_with_an_intercept_for_each_task():
    torch.manual_seed(1)
    tasks, weights = torch.arange(40) % 3, torch.rand(40).double()
    a, r = torch.randn(40, 6).double() + tasks[:, None], torch.randn(40, 4).double() + 3 * tasks[:, None]
    for rows in (a, torch.cat([a, torch.randn(40, 50).double()], 1)):  # fewer unknowns than rows, and more
        step, _ = fit_affine(rows[None], r[None], weights, 0.2, tasks=tasks)
        share, which = weights / weights.sum(), F.one_hot(tasks).double()
        centred = rows - which @ ((which.T * share) @ rows / (which.T @ share)[:, None])
        ridge = 0.2 * (share[:, None] * centred.square()).sum() / rows.shape[1]
        penalty = torch.cat([ridge.sqrt() * torch.eye(rows.shape[1]).double(), torch.zeros(rows.shape[1], 3)], 1)
        expected = solved(torch.cat([rows, which], 1), r, share, [(penalty, torch.zeros(rows.shape[1], 4))])
        torch.testing.assert_close(step[0], expected[:-3].T)


def moments_of(inputs, targets, weights, intercept):
    """Return the moments of inputs [G, n, K] and targets [G, n, O], of one position a sample."""
    return Moments(Regression(inputs, targets, weights[:, None], torch.zeros(len(weights))), intercept)


@pytest.mark.parametrize("samples", [9, 50])  # fewer rows than unknowns, and more
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_a_correction_is_the_reduced_rank_regression_drawn_to_the_experts_own_map(samples, rank):
    torch.manual_seed(2)
    a, z, shares = (
        torch.randn(samples, 12).double() + 1,
        torch.randn(samples, 8).double() - 2,
        torch.rand(samples).double(),
    )
    body, own = torch.randn(12, 8).double(), torch.randn(12, 8).double()
    moments = moments_of(a[None], z[None], shares, intercept=True)
    left, best = moments.low_rank(body[None], own[None], 0.3, rank)
    share = shares / shares.sum()
    centred = a - share @ a
    ridge = 0.3 * (share[:, None] * centred.square()).sum() / 12
    fit = solved(centred, z - share @ z, share, [(ridge.sqrt() * torch.eye(12).double(), ridge.sqrt() * own)])
    metric = centred.T @ (share[:, None] * centred) + ridge * torch.eye(12)
    root = torch.linalg.cholesky(metric).mT
    u, s, v = torch.linalg.svd(root @ (fit - body), full_matrices=False)
    expected = torch.linalg.solve(root, u[:, :rank] * s[:rank] @ v[:rank])
    assert left.shape[1] == min(rank, 8)
    torch.testing.assert_close((left @ left.T @ best).T, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
def test_a_scale_is_a_regression_drawn_to_one(intercept):
    torch.manual_seed(3)
    a, z, shares = torch.randn(2, 30, 5).double() + 1, torch.randn(30, 6).double() + 2, torch.rand(30).double()
    columns = torch.randn(2, 5, 3).double()
    moments = moments_of(a, z.view(30, 2, 3).transpose(0, 1), shares, intercept)
    scale = moments.scale(columns)
    shift = moments.shift(columns, scale)
    share = shares / shares.sum()
    made = (a @ columns).transpose(0, 1).flatten(1)
    variances = share @ (made - share @ made * intercept).square()
    penalty = (0.01 * variances.mean()).sqrt()
    for channel in range(6):
        rows = torch.stack([made[:, channel], torch.ones(30).double()][: 1 + intercept], 1)
        drawn = torch.zeros(1, rows.shape[1]).double()
        drawn[0, 0] = penalty
        found = solved(rows, z[:, [channel]], share, [(drawn, penalty.reshape(1, 1))])
        torch.testing.assert_close(scale[channel], found[0, 0])
        if intercept:
            torch.testing.assert_close(shift[channel], found[1, 0])


@pytest.mark.parametrize("rank", [2, 3])
def test_corrections_are_kept_in_4_bits_and_the_body_is_changed_by_what_is_read_back(rank):
    torch.manual_seed(4)
    layer, left, right = nn.Linear(30, 20), torch.randn(20, rank), torch.randn(rank, 30)
    adapter = coin.Adapter({"weight": {"left": left, "right": right, "scale": torch.full((20, 1), 0.5)}})
    # A scale in a byte; two values of a factor in a byte; of each row the step between its values, and the first.
    assert adapter.nbytes == 20 + 8 + (10 + 15) * rank + 8 * rank
    factors = adapter.changes["weight"].factors(20, 30)
    balance = balanced(left.T, right)
    for factor, kept in ((left.T * balance, factors[0]), (right / balance, factors[1])):
        assert torch.equal(kept, read_factor(round_factor(factor), factor.shape[1]))
        assert (kept - factor).norm() < 0.15 * factor.norm()
    expected = 0.5 * (layer.weight + factors[0].T @ factors[1])
    torch.testing.assert_close(adapter.applied_to(layer).weight, expected)


def test_scales_and_shifts_are_kept_in_a_byte_each():
    torch.manual_seed(5)
    layer, scale, shift = nn.Linear(30, 20), 1 + 0.3 * torch.randn(20), 0.01 * torch.randn(20)
    adapter = coin.Adapter({"weight": {"scale": scale[:, None]}, "bias": {"shift": shift}})
    assert adapter.nbytes == 2 * (20 + 8)
    kept_scale, kept_shift = adapter.changes["weight"].scales(), adapter.changes["bias"](torch.zeros(20))
    for kept, values in ((kept_scale, scale), (kept_shift, shift)):
        assert (kept - values).abs().max() <= 1.001 * (values.max() - values.min()) / 510  # half a step
    changed = adapter.applied_to(layer)
    torch.testing.assert_close(changed.weight, kept_scale[:, None] * layer.weight)
    torch.testing.assert_close(changed.bias, layer.bias + kept_shift)
    assert coin.Adapter({"bias": {"shift": torch.zeros(20)}}).applied_to(layer).bias.equal(layer.bias)


class Gain(nn.Module):
    """A layer with a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.map, self.head, self.gain = nn.Linear(5, 7), nn.Linear(7, 3), nn.Parameter(torch.tensor(1.3))

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
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs[1][0], experts=1), experts[1](inputs[1][0]), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("make", INPUTS)
def test_with_full_rank_a_body_becomes_each_expert(make):
    experts, inputs = make_experts(make, apart=1.0, samples=150)
    adapted = fit_adapters(average_of(experts), experts, inputs, rank=99, ridge=1e-4)
    poor = fit_adapters(average_of(experts), experts, inputs, rank=0)
    for place, (expert, (batch,)) in enumerate(zip(experts, inputs, strict=True)):
        own, _ = features_and_logits(expert, batch)
        with torch.no_grad():
            near, far = (
                float((features_and_logits(each, batch, place)[0] - own).norm() / own.norm())
                for each in (adapted, poor)
            )
        assert near < 0.6 * far, (near, far)  # groups of a convolution and a transformer's positions have no correction


@pytest.mark.parametrize("make", INPUTS)
def test_one_pass_for_mixed_experts_plain_networks_and_each_alone_agree(make):
    experts, inputs = make_experts(make)
    before = deepcopy(experts[0].state_dict())
    adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts[0].state_dict().items())
    mixed, who = torch.cat([batch[:4] for (batch,) in inputs]), torch.arange(3).repeat_interleave(4)
    shuffled = torch.randperm(12)
    with torch.no_grad():
        together = adapted(mixed[shuffled], experts=who[shuffled])
    alone = torch.cat([adapted.network(place)(batch[:4]) for place, (batch,) in enumerate(inputs)])
    torch.testing.assert_close(together, alone[shuffled], rtol=1e-3, atol=1e-3)
    with pytest.raises(StateError, match="expected one; give experts="):
        adapted(mixed)
    headed = adapted.network(1, experts[1].get_submodule(coin.networks.head_name(experts[1])))
    own = coin.networks.linear_heads([experts[1]])[0][0]
    assert torch.equal(coin.networks.linear_heads([headed])[0][0], own)


def test_taps_that_meet_no_image_count_in_the_ridge_as_zeros():
    """Of a 3×3 kernel on one pixel the middle tap alone meets it: as a 1×1 kernel's, with a ninth of the ridge."""
    torch.manual_seed(0)
    narrow = [nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3)) for _ in range(2)]
    wide = [nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), *deepcopy(network[1:])) for network in narrow]
    for network, other in zip(narrow, wide, strict=True):
        other[0].weight.data[..., 1, 1] = network[0].weight.data[..., 0, 0]
        other[0].bias = network[0].bias
    inputs = [[torch.randn(40, 3, 1, 1)] for _ in narrow]

    def fitted(networks, ridge):
        adapted = fit_adapters(networks[0], networks, inputs, rank=2, ridge=ridge)
        corrected = adapted.adapters[1].changes["0.weight"](networks[0][0].weight)
        refitted = merge_networks(Refit(ridge=ridge), networks, [[0.5, 0.5]], calibration=inputs)[0][0].weight
        middle = networks[0][0].kernel_size[0] // 2
        return corrected[..., middle, middle], refitted[..., middle, middle]

    torch.testing.assert_close(fitted(wide, 0.9), fitted(narrow, 0.1))
    corrected, refitted = fitted(wide, 0.1)
    assert not torch.allclose(corrected, fitted(narrow, 0.1)[0], rtol=1e-2)
    assert not torch.allclose(refitted, fitted(narrow, 0.1)[1], rtol=1e-2)


def test_equal_experts_need_no_adapters():
    experts, inputs = make_experts(convolutions, count=1)
    experts = [experts[0], deepcopy(experts[0])]
    adapted = fit_adapters(experts[0], experts, [inputs[0], inputs[0]])
    own, _ = features_and_logits(experts[0], inputs[0][0])
    found, _ = features_and_logits(adapted, inputs[0][0], 1)
    torch.testing.assert_close(found, own, rtol=1e-2, atol=1e-3)


def test_more_rank_is_nearer():
    experts, inputs = make_experts(convolutions, samples=200)
    errors = []
    for rank in (0, 1, 3):
        adapted = merge_networks(Refit(adapters={"rank": rank}, label="it"), experts, uniform(3), calibration=inputs)[0]
        with torch.no_grad():
            own, found = (features_and_logits(each, inputs[2][0], 2)[0] for each in (experts[2], adapted))
        errors.append(float((own - found).norm() / own.norm()))
    assert errors == sorted(errors, reverse=True)
    whole = merge_networks(Refit(), experts, uniform(3), calibration=inputs)[0]
    own, found = (features_and_logits(each, inputs[2][0])[0] for each in (experts[2], whole))
    assert errors[0] < float((own - found).norm() / own.norm())


def test_rounding_is_made_up_for_and_a_file_holds_body_and_adapters(tmp_path):
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    torch.manual_seed(1)
    experts = [build_network(config, 3, seed=0).eval() for _ in range(2)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
    inputs = [[torch.randn(40, 3, 16, 16)] for _ in experts]
    for method in (Refit, Average):
        how = {"adapters": {"rank": 2}, "compress": {"bits": 2}}
        made = merge_networks(method(**how), experts, uniform(2), calibration=inputs)
        (packed,) = made.compressed[f"{method.name}+rank2-2bit"]
        rounded = with_adapters(packed.network(), packed.adapters)
        bare = with_adapters(packed.network(), made[0].adapters)  # those that were fitted to the whole body
        own, *each = (features_and_logits(net, inputs[0][0], 0)[0] for net in (experts[0], rounded, bare))
        assert (each[0] - own).norm() < 0.8 * (each[1] - own).norm()
        one = method(**how).coded_model(coin.Experts(experts, calibration=inputs), [0.5, 0.5])
        path = tmp_path / "body.safetensors"
        save_network(path, one.network, config, 3, {"what": "a body"}, one.adapters)
        file = load_network(path)
        assert file.nbytes == stored_nbytes(made[0])
        again = with_adapters(file.network, file.adapters)
        packed.save(tmp_path / "packed.safetensors")
        unpacked = coin.Compressed.load(tmp_path / "packed.safetensors", experts[0])
        assert unpacked.nbytes == packed.nbytes
        read = with_adapters(unpacked.network(), unpacked.adapters)
        for left, right in ((again, made[0]), (read, rounded)):
            who = torch.tensor([1, 0, 1])
            assert torch.equal(left(inputs[0][0][:3], experts=who), right(inputs[0][0][:3], experts=who))
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    server = NetworkServer(path, 3, features=True)
    requests = [Request(path, 1, images[:1]), Request(path, 0, images[1:]), Request(path, 1, images)]
    for request, found in zip(requests, run_together(lambda path: server, requests), strict=True):
        torch.testing.assert_close(found.features, server(request.images, request.expert).features)


def test_a_coded_system_asks_the_body_for_whoever_is_lost(tmp_path):
    experts, inputs = make_experts(convolutions, samples=80)
    made = merge_networks(Refit(adapters={"rank": 3}), experts, uniform(3), calibration=inputs)
    system = coin.Coded(uniform(3), experts, made, names="abc")
    system.fit_decoder(inputs[0], [0, 1, 2], "expert_head")
    batch = inputs[1][0][:20]
    decoded = system.decode(batch, ["c", "b"])
    for place, expert in enumerate((2, 1)):
        head = coin.networks.linear_heads([experts[expert]])[0]
        expected = F.linear(features_and_logits(system.coded[0], batch, expert)[0], *head)
        torch.testing.assert_close(decoded[place], expected)
    promises = system.accept(
        0.2, inputs=[torch.cat([i[0] for i in inputs])], tasks=torch.arange(3).repeat_interleave(80)
    )
    assert len(promises) == 3
    tests = [[(batch, expert(batch).argmax(1))] for expert, (batch,) in zip(experts, inputs, strict=True)]
    table = coin.evaluate(system, tests)
    assert table["decoder"].tolist() == ["expert_head"] * 3
    assert table["nda"].min() > 0.9
    assert table["residual"].isna().all()
    heads = 4 * 3 * (4 * 6 + 4) + 3 * 8  # with their class counts
    kept = stored_nbytes(made[0]) + heads
    assert table["memory_mib"].tolist() == [kept / 2**20] * 3
    largest = 4 * max(parameter.numel() for parameter in experts[0].parameters())  # is made while its layer runs
    held = nbytes(made[0].state_dict().values()) + heads
    assert held == kept
    assert table["resident_mib"].tolist() == [(held + largest) / 2**20] * 3
    system.save(tmp_path / "system.safetensors")
    again = coin.Coded.load(tmp_path / "system.safetensors", experts)
    assert torch.equal(again.decode(batch, ["c", "b"]), decoded)
    code = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]  # the last expert has no adapter beside the first body
    made = merge_networks(Refit(adapters={"rank": 1}), experts, code, calibration=inputs)
    coin.Coded(code, experts, made).save(tmp_path / "rows.safetensors")
    again = coin.Coded.load(tmp_path / "rows.safetensors", experts)
    with torch.no_grad():
        for body, one in zip(made, again.coded, strict=True):
            assert torch.equal(body(batch, experts=2), one(batch, experts=2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "found {} for adapters, expected {rank: 16}"),
        ({"rank": -1}, "found rank=-1"),
        ({"rank": 1, "ridge": 0}, "found ridge=0"),
        ({"bits": 4}, "found .*bits.* for adapters, expected {rank: 16}"),
        (16, "found 16 for adapters, expected {rank: 16}"),
    ],
)
def test_wrong_options_are_one_line(options, told):
    experts, inputs = make_experts(maps)
    with pytest.raises(ConfigurationError, match=told):
        merge_networks(Average(adapters=options), experts, uniform(3), calibration=inputs)


def test_a_compressed_body_is_run_with_its_adapters_and_counted_as_it_is_kept():
    experts, inputs = make_experts(maps)
    refit = Refit(adapters={"rank": 1}, compress={"bits": 4})
    (packed,) = merge_networks(refit, experts, uniform(3), calibration=inputs).compressed["refit+rank1-4bit"]
    system = coin.Coded(uniform(3), experts, [packed])
    system.fit_decoder(inputs[0], [0, 1, 2], "expert_head")
    assert system.nbytes == packed.nbytes < sum(t.nbytes for t in experts[0].state_dict().values())
    body = with_adapters(packed.network(), packed.adapters)
    with torch.no_grad():
        features = features_and_logits(body, inputs[2][0], 2)[0]
    head = coin.networks.linear_heads([experts[2]])[0]
    torch.testing.assert_close(system.decode(inputs[2][0], [2])[0], F.linear(features, *head))
    tests = [[(batch, expert(batch).argmax(1))] for expert, (batch,) in zip(experts, inputs, strict=True)]
    heads = 4 * sum(tensor.numel() for tensor in head) + 8  # with its class count
    table = coin.evaluate(system, tests)
    assert table["memory_mib"].tolist() == [(packed.nbytes + 3 * heads) / 2**20] * 3
    working = 4 * max(kept.shape.numel() for _, _, kept in kept_parameters(system.coded[0].body))
    held = nbytes(system.coded[0].state_dict().values())  # vectors and scales are held in float32
    assert packed.nbytes <= held < 1.6 * packed.nbytes  # of rows of four to six values
    assert table["resident_mib"].tolist() == [(held + working + 3 * heads) / 2**20] * 3
    for kind, erased in (("ridge", [0]), ("linear", [0, 1])):
        with pytest.raises(ConfigurationError, match=f"the decoder {kind} cannot read a body with adapters"):
            system.fit_decoder(inputs[0], erased, kind)
    assert set(coin.evaluate(system, tests, decoders=["linear"])["decoder"]) == {"expert_head"}
    with pytest.raises(ConfigurationError, match=r"found no tasks .*, expected of which .*; give tasks="):
        system.accept(0.2, inputs=inputs[0], erased=[0])


def test_what_has_no_adapters_is_refused_or_left():
    experts, inputs = make_experts(maps)
    with pytest.raises(StateError, match=r"'the body' has .*another architecture"):
        fit_adapters(nn.Linear(4, 3), experts, inputs)
    with pytest.raises(DataError, match="no calibration samples of task 1"):
        fit_adapters(experts[0], experts, [inputs[0], [inputs[1][0][:0]], inputs[2]])
    few = [[batch[:1]] for (batch,) in inputs]  # one sample a task
    adapted = fit_adapters(experts[0], experts, few, rank=4)
    for place, (batch,) in enumerate(few):
        assert torch.isfinite(adapted(batch, experts=place)).all()
    row = [0.5, 0.5, 0.0]
    made = merge_networks(Refit(adapters={"rank": 1}), experts, [row, [0, 0.5, 0.5]], calibration=inputs)
    assert [[each.nbytes > 0 for each in body.adapters] for body in made] == [[True, True, False], [False, True, True]]
    head = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])  # networks that are nothing but a head
    alone = fit_adapters(head[0], list(head), [[torch.randn(5, 4)], [torch.randn(5, 4)]])
    assert [each.nbytes for each in alone.adapters] == [0, 0]
    base = merge_networks(Base(adapters=AdapterOptions(2)), experts, uniform(3), calibration=inputs, initial=experts[0])
    assert isinstance(base[0], Adapted)


def test_shared_weights_and_embeddings_stay_and_attention_is_seen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.map, self.twice = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens):
            x = self.map(self.table(tokens))
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.twice(torch.relu(self.twice(x))).mean(1))

    torch.manual_seed(0)
    experts = [Tied().eval() for _ in range(2)]
    inputs = [[torch.randint(9, (40, 5))] for _ in experts]
    units = {unit.weight for unit in affine_units(experts[0], inputs[0][0]).units}
    with pytest.warns(CoinWarning, match=r"'fit_adapters' leaves \d\d% of the parameters of Tied unfitted"):
        adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    for method in (Average, Refit):
        with pytest.warns(CoinWarning, match=rf"'{method.name}\+rank2' leaves \d\d% of the parameters"):
            merge_networks(method(adapters={"rank": 2}), experts, [[0.5, 0.5]], calibration=inputs)
    changed = set(adapted.adapters[0].changes)
    assert {"map.weight", "map.bias", "attention.in_proj_weight", "attention.out_proj.bias"} <= changed
    assert changed <= units | {name.replace("weight", "bias") for name in units}
    assert not any(name.startswith(("twice", "table", "head")) for name in changed)
    with torch.no_grad():  # where torch's fused attention would hide its projections
        found, own = adapted(inputs[1][0], experts=1), adapted.network(1)(inputs[1][0])
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


class Raw(nn.Module):
    """A network that is called otherwise, wrapped: of a tensor by name it makes the inputs that it wants."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, raw):
        return SimpleNamespace(logits=self.network((raw - 30) / 20))


def test_a_wrapped_network_is_fitted_as_its_own_is(tmp_path):
    """Networks that get raw inputs by name have the bodies of those that get them normalised beforehand."""
    experts, inputs = make_experts(maps, apart=1.0)
    raw = [[30 + 20 * batch] for (batch,) in inputs]
    named = [[{"raw": batch}] for (batch,) in raw]

    direct = [[(batch - 30) / 20] for (batch,) in raw]
    body = average_of(experts).train()  # as one that was just made
    expected = fit_adapters(body, experts, direct, rank=2)
    wrapped = [Raw(expert) for expert in experts]
    found = fit_adapters(Raw(body), wrapped, named, rank=2)
    assert same_tensors(found.body.network, expected.body)
    assert body.training
    assert not found.body.training
    start = deepcopy(experts[0])
    for method in (Average, Base, Refit):
        options = method(adapters={"rank": 2}, compress={"bits": 4})
        one = merge_networks(options, experts, uniform(3), calibration=direct, initial=start)
        two = merge_networks(options, wrapped, uniform(3), calibration=named, initial=Raw(start))
        variants = zip([[*one], *one.compressed.values()], [[*two], *two.compressed.values()], strict=True)
        for expected, found in variants:
            system = coin.Coded(uniform(3), wrapped, found)
            system.fit_decoder(named[0], [0, 1, 2], "expert_head")
            other = coin.Coded(uniform(3), experts, expected)
            other.fit_decoder(direct[0], [0, 1, 2], "expert_head")
            decoded = system.decode(named[1][0], [1])
            assert torch.equal(decoded, other.decode(direct[1][0], [1]))
            system.save(tmp_path / "system.safetensors")
            again = coin.Coded.load(tmp_path / "system.safetensors", wrapped)
            assert torch.equal(again.decode(named[1][0], [1]), decoded)


def average_of(experts):
    """Return a network of the experts' average parameters."""
    return Average().make(coin.Experts(experts), [1 / len(experts)] * len(experts)).network


def same_tensors(network, other):
    """Say whether two networks have the same tensors."""
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


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
    body, anywhere = average_of(experts), torch.randn(500, 12)
    adapted = fit_adapters(body, experts, inputs, rank=16)
    for place, expert in enumerate(experts):
        one = adapted.network(place, head=expert[3])
        bare = nn.Sequential(*body[:3], expert[3])
        expected = expert(anywhere)
        difference, without = (float((each(anywhere) - expected).norm()) for each in (one, bare))
        assert difference < 0.3 * without * size
        assert all(bool((change.scales() == 1).all()) for change in adapted.adapters[place].changes.values())


@pytest.mark.parametrize("tasks", [None, torch.arange(2).repeat_interleave(150)])
def test_constant_inputs_have_no_map_whatever_their_means(tasks):
    torch.manual_seed(0)
    constant = 30 * torch.randn(1, 1, 6).expand(1, 300, 6).clone()
    if tasks is not None:
        constant[:, 150:] *= -1  # the mean over all is zero, and each task's is not
    step, _ = fit_affine(constant, torch.randn(1, 300, 2), torch.ones(300), 0.1, tasks=tasks)
    assert not step.any()


class Chunks(nn.Module):
    """A network that runs a batch in chunks."""

    def __init__(self, size):
        super().__init__()
        self.size, self.map, self.head = size, nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return torch.cat([self.head(torch.tanh(self.map(chunk))) for chunk in x.split(self.size)])


@pytest.mark.parametrize("method", [Average(adapters={"rank": 2}), Refit()], ids=lambda method: method.label)
@pytest.mark.parametrize("size", [16, 100])  # less than the experts' batches, and than what is fitted at once
def test_networks_that_run_in_chunks_are_refused_in_a_line_or_answer_right(method, size):
    torch.manual_seed(0)
    experts = [Chunks(size).eval() for _ in range(2)]
    few, many = ([[torch.randn(count, 5)] for _ in experts] for count in (8, 60))
    with pytest.raises(StateError, match=r"'(map|head)\.weight' is called on \d+ rows for \d+ samples.*not in chunks"):
        merge_networks(method, experts, uniform(2), calibration=many)
    made = merge_networks(method, experts, uniform(2), calibration=few)
    if method.adapters is not None:
        x, each = torch.randn(150, 5), torch.arange(150) % 2
        with torch.no_grad():
            found = made[0](x, experts=each)
        for expert in range(2):
            torch.testing.assert_close(found[each == expert], made[0].network(expert)(x[each == expert]))


def test_a_layer_may_have_a_slash_in_its_name(tmp_path):
    torch.manual_seed(0)
    experts = [nn.Sequential() for _ in range(2)]
    for expert in experts:
        expert.add_module("stage/one", nn.Linear(5, 6))
        expert.add_module("head", nn.Linear(6, 4))
    inputs = [[torch.randn(60, 5)] for _ in experts]
    method = Average(adapters={"rank": 2}, compress={"bits": 4})
    made = merge_networks(method, experts, uniform(2), calibration=inputs)
    packed = made.compressed["average+rank2-4bit"][0]
    packed.save(tmp_path / "body.safetensors")
    again = coin.Compressed.load(tmp_path / "body.safetensors", experts[0])
    for adapters in (made[0].adapters, packed.adapters, again.adapters):
        assert [set(each.changes) for each in adapters] == [{"stage/one.weight", "stage/one.bias"}] * 2
    for bodies in (made, [packed]):
        system = coin.Coded(uniform(2), experts, bodies).fit_decoder(inputs[0], [0, 1], "expert_head")
        system.save(tmp_path / "system.safetensors")
        loaded = coin.Coded.load(tmp_path / "system.safetensors", experts)
        assert torch.equal(loaded.decode(inputs[1][0], [1]), system.decode(inputs[1][0], [1]))


def test_outputs_that_overflow_are_told_where_there_are_scales_and_shifts_alone():
    experts, inputs = make_experts(maps)
    for layer in (0, 2):
        experts[1][layer].weight.data.mul_(1e30)
    for expert in experts:
        expert[1] = nn.Identity()
    with pytest.raises(NumericalError, match="inputs or outputs on calibration data are not finite"):
        fit_adapters(experts[0], experts, inputs, rank=0)
