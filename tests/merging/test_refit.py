"""Refit against regressions written out layer by layer, and what every network and every caller may rely on."""

import re
from copy import deepcopy

import pytest
import torch
from near_experts import (
    ATTENTION,
    NETWORKS,
    ROW,
    SIZES,
    Apply,
    Scale,
    answers,
    assert_answers_close,
    case_of,
    distance,
    experts_of,
    near_experts,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from coin.errors import CoinWarning, ConfigurationError, DataError, StateError
from coin.merging import Experts, Refit
from coin.merging.average import average_parameters
from coin.merging.body import default_memory_mib
from coin.merging.rows import chosen_rows
from coin.merging.units import PROBES, affine_units

RIDGE = 0.03


# The reference: every layer's rows from the inputs anew, maps with their BatchNorm replaced by biased ones.


@torch.no_grad()
def folded_average(networks, row, units):
    """Return the average of networks, a map with its BatchNorm made one map, the BatchNorm an identity."""
    coded = deepcopy(networks[0])
    average = average_parameters([network.state_dict() for network in networks], row)
    coded.load_state_dict(average)
    for name, norm in units:
        if norm is None:
            continue
        module = coded.get_submodule(name)
        module.weight.zero_()
        module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=torch.float64))
        for share, network in zip(row, networks, strict=True):
            own = network.get_submodule(name)
            batchnorm = network.get_submodule(norm)
            scale = batchnorm.weight / torch.sqrt(batchnorm.running_var + batchnorm.eps)
            for channel, factor in enumerate(scale):
                module.weight[channel] += share * factor * own.weight[channel]
            before = 0 if own.bias is None else own.bias
            module.bias += share * (batchnorm.bias + scale * (before - batchnorm.running_mean))
        parent, _, child = norm.rpartition(".")
        setattr(coded.get_submodule(parent), child, nn.Identity())
    return coded


def watched(network, name, x):
    """Return the input and the output of one module, and the network's answer."""
    seen = []

    def watch(module, given, output):
        seen.append((given[0].clone(), output))
        return output.clone()  # which the next layer may write over

    with network.get_submodule(name).register_forward_hook(watch):
        answer = network(x)
    ((given, output),) = seen
    return given, output, answer


def channels_of(module):
    """Return a module's number of channels; a number that scales them all has one."""
    return len(module.weight) if module.weight.ndim > 0 else 1


def by_channel(module, output):
    """Return a module's outputs at all positions, [n, C]."""
    has_channels_first = not isinstance(module, nn.Linear | nn.LayerNorm | Scale)
    if has_channels_first:
        output = output.movedim(1, -1)
    return output.reshape(-1, channels_of(module))


def unit_answers(module, given):
    """Return what each weight of every output multiplies, [n, C, K]: what the module makes of weights of a single 1."""
    rows_of_weight = module.weight.reshape(channels_of(module), -1)
    columns = []
    for k in range(rows_of_weight.shape[1]):
        one = torch.zeros_like(rows_of_weight)
        one[:, k] = 1
        parameters = {"weight": one.view_as(module.weight)}
        if getattr(module, "bias", None) is not None:
            parameters["bias"] = torch.zeros_like(module.bias)
        output = functional_call(module, parameters, (given,))
        columns.append(by_channel(module, output))
    return torch.stack(columns, 2)


def position_weights(coded, name, tasks):
    """Return what a module's positions in a sample weigh: half alike, half by the gradients of ½‖f − mean f‖²."""
    module = coded.get_submodule(name)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return torch.ones(1, dtype=torch.float64)
    total = 0
    for sample in torch.cat(tasks).split(1):
        with torch.enable_grad():
            _, output, logits = watched(coded, name, sample)
            centred = logits - logits.mean(1, keepdim=True)
            (gradient,) = torch.autograd.grad(centred.square().sum() / 2, output)
        total = total + by_channel(module, gradient).square().sum(1)
    return 0.5 + 0.5 * total / total.mean()


def ridge_step(a, r, w, intercept):
    """Return the step of one output's weights and its bias: a [n, K], r [n], w [n]."""
    w = w / w.sum()
    mean_a = w @ a if intercept else torch.zeros_like(a[0])
    mean_r = w @ r if intercept else torch.zeros_like(r[0])
    centred = a - mean_a
    covariance = centred.T @ (w[:, None] * centred)
    penalty = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=a.dtype)
    step = torch.linalg.solve(covariance + penalty, centred.T @ (w * (r - mean_r)))
    return step, mean_r - step @ mean_a


@torch.no_grad()
def reference(networks, tasks, units, places=None):
    """Refit by the book; `places` are by name of module the positions of every task's samples that are rows."""
    coded = folded_average(networks, ROW, units)
    weights = {name: position_weights(coded, name, tasks) for name, _ in units}
    for name, norm in units:
        module = coded.get_submodule(name)
        rows = []
        residuals = []
        shares = []
        for index, x in enumerate(tasks):
            given, output, _ = watched(coded, name, x)
            _, wanted, _ = watched(networks[index], norm or name, x)
            a = unit_answers(module, given)
            r = by_channel(module, wanted - output)
            positions = len(a) // len(x)
            w = weights[name].expand(len(x), positions).flatten()
            if places is not None and places[name] is not None:
                starts = positions * torch.arange(len(x))[:, None]
                chosen = (starts + places[name][index]).flatten()
                a, r, w = a[chosen], r[chosen], torch.ones(len(chosen), dtype=torch.float64)
            rows.append(a)
            residuals.append(r)
            shares.append(ROW[index] * w / len(w))
        a = torch.cat(rows)
        r = torch.cat(residuals)
        w = torch.cat(shares)
        has_bias = getattr(module, "bias", None) is not None
        steps = [
            ridge_step(a[:, channel], r[:, channel], w, has_bias) for channel in range(a.shape[1])
        ]
        module.weight += torch.stack([step for step, _ in steps]).view_as(module.weight)
        if has_bias:
            module.bias += torch.stack([constant for _, constant in steps])
    return coded


def units_of(kind):
    """Return the names of a network's units, a map or a norm, and of the norm that is folded into each."""
    units = []
    for each in NETWORKS[kind].units:
        name, _, norm = each.partition("+")
        units.append((name, norm or None))
    return units


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_the_regression_of_every_layer_in_turn(kind):
    networks, tasks = case_of(kind)
    units = units_of(kind)
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert_answers_close(made.network, reference(networks, tasks, units), tasks, 1e-9)
    in_units = tuple(f"{module}." for unit in units for module in unit if module)
    names = [name for name, _ in networks[0].named_parameters()]
    averaged = sorted(name for name in names if not name.startswith(in_units))
    assert made.chosen == {"ridge": RIDGE, "averaged": averaged}


@pytest.mark.parametrize("kind", ["convolutions", "layer norm"])
def test_of_many_samples_some_positions_are_rows_that_weigh_alike(kind):
    networks, tasks = case_of(kind, sizes=(150, 250, 200))
    experts = experts_of(networks, tasks)
    method = Refit(RIDGE, head=False)
    made = method.coded_model(experts, ROW)
    body = made.start
    inputs = experts.pooled.inputs()
    rows = chosen_rows(body.network, body.trace.units, inputs, experts.tasks, ROW, 2**40)
    places = {}
    for weight, chosen in rows.places.items():
        of_task = None
        if chosen is not None:
            of_task = [chosen[experts.tasks == task] for task in range(3)]
        places[weight.removesuffix(".weight")] = of_task
    assert sum(each is not None for each in places.values()) > 0
    units = units_of(kind)
    assert_answers_close(made.network, reference(networks, tasks, units, places), tasks, 1e-9)


# Exact properties


@pytest.mark.parametrize("kind", [*NETWORKS, *ATTENTION])
def test_identical_experts_give_themselves(kind):
    networks, tasks = case_of(kind)
    network = networks[0]
    has_head = kind != "no bias"  # which cannot be fitted
    experts = experts_of([network, deepcopy(network), deepcopy(network)], tasks)
    made = Refit(RIDGE, head=has_head).coded_model(experts, ROW)
    assert_answers_close(made.network, network, tasks, 1e-10)


def assert_averaged(made, networks, names):
    """The named parameters of a coded model are the average, and no others."""
    assert made.chosen["averaged"] == sorted(names)
    average = average_parameters([dict(network.named_parameters()) for network in networks], ROW)
    for name, parameter in made.network.named_parameters():
        assert torch.equal(parameter, average[name]) == (name in names), name


@pytest.mark.parametrize("kind", ATTENTION)
def test_of_attention_only_what_is_no_affine_map_keeps_the_average(kind):
    networks, tasks = case_of(kind)
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert_averaged(made, networks, ATTENTION[kind].units)


@pytest.mark.parametrize("kind", ["convolutions", "layer scale", "vit"])
def test_the_order_of_the_experts_does_not_matter(kind):
    networks, tasks = case_of(kind, sizes=(40, 60, 50))
    one = Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)
    turned = experts_of(networks[::-1], tasks[::-1])
    other = Refit(RIDGE).coded_model(turned, ROW[::-1])
    assert_answers_close(one.network, other.network, tasks, 1e-9)


def test_an_expert_that_has_no_share_of_the_row_is_not_run():
    networks, tasks = case_of("convolutions")
    experts = experts_of(networks, tasks)
    ran = []
    networks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    made = Refit(RIDGE, head=False).coded_model(experts, (0.4, 0.0, 0.6))
    assert not ran
    without = experts_of(networks[::2], tasks[::2])
    other = Refit(RIDGE, head=False).coded_model(without, (0.4, 0.6))
    assert_answers_close(made.network, other.network, tasks, 1e-9)


def test_a_convolution_whose_taps_meet_no_image_stays_finite():
    layer = nn.Conv1d(2, 2, 2, padding=1, dilation=2)
    layers = layer, nn.Flatten(), nn.Linear(2, 3)
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (2, 1))
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert bool(answers(made.network, torch.cat(tasks)).isfinite().all())


def test_bfloat16_is_fitted_in_float32():
    """Regressions in bfloat16 itself, of 8 bits, were far off."""
    networks, tasks = case_of("layer norm")
    made = Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW).network
    halves = [deepcopy(network).bfloat16() for network in networks]
    found = Refit(RIDGE).coded_model(experts_of(halves, tasks), ROW).network
    assert found[0].weight.dtype == torch.bfloat16
    assert distance(found.double(), made, torch.cat(tasks)) < 0.05


# Passes and memory


@pytest.mark.parametrize(
    ("kind", "head"), [("convolutions", True), ("convolutions", False), ("vit", False)]
)
def test_every_network_runs_once_and_passes_are_counted(kind, head):
    networks, tasks = case_of(kind)
    experts = experts_of(networks, tasks)
    Refit(RIDGE, head=head).coded_model(experts, ROW)
    samples = sum(SIZES)
    of_head = 4 * samples if head else 0  # the experts and the coded model
    of_positions = 3 * samples if kind == "vit" else 0  # a forward and a backward pass
    assert experts.passes == PROBES + 2 * samples + of_head + of_positions


def test_samples_that_do_not_fit_the_memory_are_left_out_with_a_warning():
    networks, tasks = case_of("convolutions", sizes=(800, 900, 700))
    experts = experts_of(networks, tasks)
    message = r"method 'refit' fits its layers on (\d+) of 2400 calibration samples, which need memory_mib=(\d+)"
    with pytest.warns(CoinWarning, match=message) as told:
        Refit(RIDGE, head=False, memory_mib=2).coded_model(experts, ROW)
    found = re.search(message, str(told[0].message))
    samples = int(found[1])
    needed = int(found[2])
    assert experts.passes == PROBES + 2 * samples
    assert 2 / needed == pytest.approx(samples / 2400, rel=0.2)


def test_experts_run_once_for_every_layer_where_their_outputs_do_not_fit():
    """Two layers whose outputs for 100 samples take 38 MiB each; at least 64 MiB of outputs are held."""
    width = 100_000
    pool = Apply(lambda x: x.view(len(x), 10, -1).mean(2))
    network = nn.Sequential(Scale(width), Scale(width), pool, nn.Linear(10, 3))
    networks = [network, deepcopy(network)]
    networks[1][0].weight.data.uniform_()
    calibration = [[torch.randn(50, width)] for _ in networks]
    made = []
    for memory_mib, groups in ((8192, 1), (200, 2)):
        experts = Experts(networks, calibration=calibration)
        method = Refit(head=False, memory_mib=memory_mib)
        made.append(method.coded_model(experts, (0.5, 0.5)).network)
        assert experts.passes == PROBES + (groups + 1) * 100
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_bound_on_activations_is_a_share_of_what_is_free_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    assert default_memory_mib(torch.device("cuda", 0)) == 3 << 10
    assert default_memory_mib(torch.device("cpu")) == 8192


# What is refused


@pytest.mark.parametrize("row", [(1.0, 0.0, 0.0), ROW])
def test_a_task_with_a_share_and_no_samples_is_refused(row):
    networks, tasks = case_of("two layers")
    experts = experts_of(networks, [tasks[0][:0], *tasks[1:]])
    message = r"found no calibration samples of task 0, .* share in .* raise memory_mib"
    with pytest.raises(DataError, match=message):
        Refit(RIDGE, head=False).coded_model(experts, row)


class Forks(nn.Module):
    """Calls its layers as it was told, or by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.way = "straight"
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        if self.way == "turned":
            return self.head(self.first(self.second(x)))
        if self.way == "again":
            x = self.first(x)
        x = self.first(x)
        is_short = self.way == "short" or (self.way == "by size" and len(x) > 2)
        return self.head(x if is_short else self.second(x))


@pytest.mark.parametrize("way", ["short", "turned", "again"])
def test_an_expert_that_makes_other_calls_is_refused(way):
    networks, tasks = near_experts(Forks, (6,))
    networks[1].way = way
    with pytest.raises(StateError, match=r"^an expert calls other layers than [^\n]*$"):
        Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)


def test_calls_that_depend_on_the_number_of_samples_are_refused():
    networks, tasks = near_experts(Forks, (6,))
    networks[0].way = "by size"
    with pytest.raises(StateError, match="Forks makes other calls on two samples than on three"):
        Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)


class Chunks(nn.Module):
    """A network that runs a batch in chunks of two."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return torch.cat([self.head(self.map(chunk).tanh()) for chunk in x.split(3)])


def test_networks_that_run_in_chunks_are_refused():
    networks, tasks = near_experts(Chunks, (5,))
    message = r"'map\.weight' is called on \d+ rows for \d+ samples.*not in chunks"
    with pytest.raises(StateError, match=message):
        Refit().coded_model(experts_of(networks, tasks), ROW)


def test_a_network_that_mixes_samples_is_refused():
    """Identical experts were 3 to 15 % off."""
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    layers = (
        nn.Conv1d(4, 6, 1),
        norm,
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (4, 3))
    with pytest.raises(StateError, match="gives a sample other outputs beside others than alone"):
        Refit().coded_model(experts_of(networks, tasks), ROW)


def test_gradient_checkpointing_is_to_be_off():
    networks, tasks = case_of("two layers")
    networks[0].grad_checkpointing = True
    with pytest.raises(ConfigurationError, match=r"call set_grad_checkpointing\(False\)"):
        Refit().coded_model(experts_of(networks, tasks), ROW)


# What cannot be refitted


class ComputedBias(nn.Linear):
    """As the queries, keys and values of BEiT, whose keys have none."""

    def forward(self, x):
        zeros = torch.zeros_like(self.bias[2:])
        return F.linear(x, self.weight, torch.cat([self.bias[:2], zeros]))


def test_a_layer_whose_bias_is_computed_keeps_the_average():
    layers = ComputedBias(6, 5), nn.Tanh(), nn.Linear(5, 3)
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (6,))
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert_averaged(made, networks, ["0.bias", "0.weight"])


class Tied(nn.Module):
    """Tokens, with an embedding, positions, and layers that are read in several places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.place = nn.Parameter(torch.zeros(5, 4))
        self.twice = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.once = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.place
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.read(x) * self.read.weight.square().mean()
        return self.head(self.once(x).mean(1))


def test_what_is_shared_or_read_elsewhere_keeps_the_average():
    torch.manual_seed(1)
    networks = [Tied().double() for _ in ROW]
    tasks = [torch.randint(7, (size, 5)) for size in SIZES]
    with pytest.warns(
        CoinWarning, match=r"'refit' leaves \d\d% of the parameters of Tied unfitted"
    ):
        made = Refit().coded_model(experts_of(networks, tasks), ROW)
    averaged = [
        "embedding.weight",
        "place",
        "read.bias",
        "read.weight",
        "twice.bias",
        "twice.weight",
    ]
    assert_averaged(made, networks, averaged)


class Arranged(nn.Module):
    """Tokens [B, T, 4] through two layers, in rows that lie sample by sample or otherwise."""

    def __init__(self, arrange):
        super().__init__()
        self.score = nn.Linear(4, 1)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.arrange = arrange

    def forward(self, x):
        rows = self.arrange(x, self.score)
        hidden = self.second(self.first(rows).tanh()).tanh()
        is_in_time = self.arrange is by_time
        return self.head(hidden.mean(0 if is_in_time else 1))


def by_sample(x, score):
    return x


def by_time(x, score):
    return x.transpose(0, 1)


def by_score(x, score):
    order = score(x).argsort(1)  # of an expert's own: in another network the rows lie otherwise
    return torch.gather(x, 1, order.expand(x.shape))


@pytest.mark.parametrize("arrange", [by_sample, by_time, by_score])
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_rows_that_are_not_of_the_sample_that_they_are_taken_for_are_left_alone(arrange):
    """It took row r for sample r // k and looked at shapes alone."""
    networks, tasks = near_experts(lambda: Arranged(arrange), (3, 4))
    made = Refit(head=False).coded_model(experts_of(networks, tasks), ROW)
    rows = {"first.weight", "first.bias", "second.weight", "second.bias"}
    left = rows & set(made.chosen["averaged"])
    assert left == (set() if arrange is by_sample else rows)


class Chosen(nn.Module):
    """Maps with a decision between them that activations make."""

    def __init__(self, choose):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.choose = choose

    def forward(self, x):  # [B, 4, 4]
        chosen = self.choose(self.first(x))
        return self.head(self.second(chosen).tanh().mean(1))


def set_to_zero(x):
    y = x.clone()
    y[x < 0] = 0
    return y


def product(x):
    chosen = torch.eye(4).expand(len(x), 4, 4).ge(x.mean((1, 2), keepdim=True))
    return chosen.type_as(x) @ x


IN_PLACE = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked fill": lambda x: x.masked_fill(x.lt(0), 0),
    "set": set_to_zero,
    "rounded": lambda x: x + (x.round() - x).detach(),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, (x @ x.mT) > -9),
}
PLACED = {
    "index": lambda x: x[(x > -9).all(2)].view(x.shape),
    "gathered": lambda x: x.gather(1, (0 * x).long()),
    "product": product,
    "sorted": lambda x: x.sort(1).values,
}


@pytest.mark.parametrize("name", [*IN_PLACE, *PLACED])
def test_only_what_places_rows_by_activations_keeps_maps_from_being_fitted(name):
    torch.manual_seed(0)
    network = Chosen((IN_PLACE | PLACED)[name]).eval()
    units = {unit.weight for unit in affine_units(network, torch.randn(3, 4, 4)).units}
    behind = {"second.weight"} if name in IN_PLACE else set()
    assert units == {"first.weight", "head.weight"} | behind


class Ordered(nn.Module):
    """Runs its samples in the order of their lengths, as with packed sequences, and puts them back."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort(stable=True)  # by a length, which is of the inputs alone
        rows = self.first(x[order]).tanh()
        return self.head(rows[order.argsort()])


@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_rows_that_inputs_place_are_not_fitted_though_the_first_samples_lie_in_order():
    networks, tasks = near_experts(Ordered, (5,), sizes=(10, 10, 10))
    for task in tasks:
        task[:, 0] = torch.randint(1, 9, (10,))
        task[:4, 0] = 1  # as long as one another
    made = Refit().coded_model(experts_of(networks, tasks), ROW)
    assert made.chosen["averaged"] == ["first.bias", "first.weight"]


class Unbatched(torch.autograd.Function):
    """The identity, whose backward pass goes through NumPy and so takes no batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy().copy())


def test_networks_whose_backward_pass_cannot_be_batched_are_fitted():
    layers = (
        nn.Linear(4, 6),
        Apply(Unbatched.apply),
        nn.Linear(6, 3),
    )
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (4,))
    made = Refit().coded_model(experts_of(networks, tasks), ROW)
    assert made.chosen["averaged"] == []


# The caller


def settings():
    """What of torch's settings the fit changes while it runs."""
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
    )


def breaks(*_):
    raise RuntimeError("broken off")


def test_where_an_expert_breaks_off_the_caller_finds_everything_as_it_was():
    networks, tasks = case_of("linear norm")
    for network in networks:
        network.train()
        network[1].eval()
    states = [deepcopy(network.state_dict()) for network in networks]
    before = settings()
    networks[1][3].register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match=r"^broken off$"):
        Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)
    assert settings() == before
    for network, state in zip(networks, states, strict=True):
        assert [each.training for each in network.modules()] == [True, True, False, True, True]
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_a_callers_context(context):
    networks, tasks = case_of("convolutions")
    wanted = Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW).network
    with context():
        own = [task.clone() for task in tasks]
        found = Refit(RIDGE).coded_model(experts_of(deepcopy(networks), own), ROW).network
    assert_answers_close(found, wanted, tasks, 1e-12)
    found(tasks[0]).sum().backward()  # an ordinary network that can be trained on
