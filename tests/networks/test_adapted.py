"""Bodies with adapters, whole and packed, beside plain networks of which every parameter is written out in float64."""

import threading
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.func import functional_call

import coin
from coin.errors import CoinWarning, ConfigurationError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.adapter import adapters_state, split_adapters
from coin.networks.kept import kept_parameters
from coin.networks.running import check_as_plain, features_and_logits


class Mixed(nn.Module):
    """A convolution with a BatchNorm, attention with its own parameter, a tied weight and a head."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.place = nn.Parameter(torch.randn(1, 16, 8))
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.norm(self.kernel(x)).flatten(2).mT + self.place
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        hidden = torch.relu(self.first(tokens + mixed))
        return self.head(self.second(hidden).mean(1))


class Recurrent(nn.Module):
    """An LSTM, and a module that has its weight in a list, too."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 40, batch_first=True)
        self.map = nn.Linear(40, 40)
        self.head = nn.Linear(40, 5)
        self.held = [self.map.weight]

    def forward(self, x):
        outputs, _ = self.lstm(x[..., None])
        return self.head(outputs[:, -1] @ self.held[0].T)


class Container(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
        self.prompt = nn.Parameter(torch.randn(4, 40))

    def forward(self, x):
        return super().forward(x + self.prompt.mean(0))


class Texts(nn.Module):
    """A classifier of tokens, whose embeddings are nearly all of it."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(2000, 12, padding_idx=0)
        self.map = nn.Linear(12, 12)
        self.out = nn.Linear(12, 2000, bias=False) if tied else None
        if tied:
            self.out.weight = self.embed.weight
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        features = self.map(self.embed(tokens)).relu().mean(1)
        if self.out is not None:
            features = features + self.out(features)[:, :12]
        return self.head(features)


class Named(nn.Module):
    """A module is called adapters, and two layers share a bias."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.Linear(40, 40)
        self.other = nn.Linear(40, 40)
        self.head = nn.Linear(40, 3)
        self.other.bias = self.adapters.bias

    def forward(self, x):
        return self.head(self.other(self.adapters(x).relu()).relu())


class Scaled(nn.Linear):
    """A linear layer that runs in a way of its own."""

    def forward(self, x):
        return 3 * super().forward(x)


class Centred(nn.Conv2d):
    """A convolution whose product is its own."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias) + 1


def positions():
    """Layers for single positions, on which low-rank changes are less work than on the weights."""
    layers = [
        nn.Conv2d(40, 40, 1),
        nn.Conv2d(40, 40, 3, padding=1),
        Centred(40, 40, 1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, Scaled(40, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 3))


def tokens():
    return torch.randint(0, 2000, (7, 5))


@dataclass
class Case:
    """A network, what draws its inputs, the parts of each parameter that adapters change, and what is never packed."""

    build: object
    inputs: object
    changed: dict = field(default_factory=dict)
    whole: tuple = ()


FULL = ("scale", "low_rank")
CASES = {
    "mixed": Case(
        Mixed,
        lambda: torch.randn(7, 3, 4, 4),
        {
            "kernel.weight": FULL,
            "norm.bias": ("shift",),
            "attention.in_proj_weight": FULL,
            "attention.in_proj_bias": ("shift",),
            "attention.out_proj.weight": FULL,
            "second.weight": ("scale",),
        },
    ),
    "recurrent": Case(
        Recurrent,
        lambda: torch.randn(5, 40),
        {"head.weight": ("scale",)},
        ("lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    ),
    "container": Case(Container, lambda: torch.randn(5, 40), {"0.weight": FULL}, ("prompt",)),
    "texts": Case(Texts, tokens, {"map.weight": FULL}),
    "texts, changed": Case(Texts, tokens, {"embed.weight": ("scale",)}),
    "texts, tied": Case(lambda: Texts(tied=True), tokens),
    "named": Case(Named, lambda: torch.randn(5, 40), {"adapters.weight": FULL}),
    **{
        f"{count} positions, {name}": Case(
            positions,
            lambda count=count: torch.randn(count, 40, 1, 1),
            dict.fromkeys(["0.weight", "1.weight", "2.weight", "4.weight", "5.weight"], parts),
        )
        for count in (0, 1, 100)
        for name, parts in {
            "plain": ("low_rank",),
            "scaled": FULL,
            "shifted": ("shift", "low_rank"),
        }.items()
    },
}


def parts_of(parameter, parts, draw):
    """Return an expert's change of a parameter, of values that its bytes hold: two, or 0 and 15 sixteenths."""
    rows = len(parameter)
    columns = parameter[0].numel()
    ones = [1] * (parameter.ndim - 1)
    coin_toss = lambda *shape: torch.randint(2, shape, generator=draw).float()  # noqa: E731
    change = {}
    if "scale" in parts:
        change["scale"] = 0.5 + coin_toss(rows, *ones)
    if "shift" in parts:
        change["shift"] = coin_toss(rows, *ones) - 0.5
    if "low_rank" in parts:
        change["left"] = coin_toss(rows, 2) * 15 / 16
        change["right"] = coin_toss(2, columns) * 15 / 16
    return change


@dataclass
class Made:
    """A case's network, the plain network that its bytes of four bits stand for, its experts' changes and inputs."""

    network: nn.Module
    compressed: coin.Compressed
    changes: list
    inputs: torch.Tensor

    @property
    def adapters(self):
        return [coin.Adapter(change) for change in self.changes]

    def bodies(self):
        """Return a whole and a packed body, each with the network of which it is one."""
        whole = coin.Adapted(self.network, self.adapters)
        packed = coin.Adapted(self.compressed.packed(), self.adapters)
        return {"whole": (whole, self.network), "packed": (packed, self.compressed.network())}


def make(name):
    case = CASES[name]
    torch.manual_seed(0)
    network = case.build().eval()
    draw = torch.Generator().manual_seed(1)
    changes = []
    for _ in range(2):
        of_expert = {}
        for key, parts in case.changed.items():
            of_expert[key] = parts_of(network.get_parameter(key), parts, draw)
        changes.append(of_expert)
    changes.append({})  # the last expert is the body itself
    return Made(network, coin.compress(network, None, bits=4, base_bits=0), changes, case.inputs())


@torch.no_grad()
def reference(network, changes, inputs):
    """Return what a network answers in float64 with each changed parameter (θ + left right) ⊙ scale + shift."""
    plain = deepcopy(network).double()
    for name, parts in changes.items():
        parameter = plain.get_parameter(name)
        wide = {part: tensor.double() for part, tensor in parts.items()}
        if "left" in wide:
            update = wide["left"] @ wide["right"]
            parameter += update.view_as(parameter)
        if "scale" in wide:
            parameter *= wide["scale"]
        if "shift" in wide:
            parameter += wide["shift"]
    x = inputs.double() if inputs.is_floating_point() else inputs
    return plain(x)


def check_close(found, expected):
    """Compare float32 outputs with float64 ones: sums of some hundred products, a few layers deep."""
    size = float(expected.abs().amax()) if expected.numel() else 1.0
    tolerance = 1000 * torch.finfo(torch.float32).eps * size
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def mixed():
    return make("mixed")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is held packed but for")
@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_a_body_answers_as_each_expert_written_out(name, kind):
    made = make(name)
    body, base = made.bodies()[kind]
    for expert, changes in enumerate(made.changes):
        expected = reference(base, changes, made.inputs)
        plain = body.network(expert)
        check_close(body(made.inputs, experts=expert), expected)
        check_close(plain(made.inputs), expected)
        check_close(made.adapters[expert].applied_to(base)(made.inputs), expected)
        assert [*plain.state_dict()] == [*made.network.state_dict()]


@pytest.mark.filterwarnings("ignore:.*is held packed but for")
@pytest.mark.parametrize("name", ["mixed", "recurrent", "container", "texts, tied"])
def test_a_body_is_saved_copied_and_its_adapters_given_back(name, tmp_path):
    made = make(name)
    body, _ = made.bodies()["packed"]
    for own, adapter in zip(body.adapters, made.adapters, strict=True):
        torch.testing.assert_close(own.tensors, adapter.tensors, rtol=0, atol=0)
    expert = body.network(0)
    system = coin.Coded([[0.5, 0.5]], [expert, expert], [made.compressed])
    system.save(tmp_path / "system")
    again = coin.Coded.load(tmp_path / "system", [expert, expert])
    expected = system.coded[0](made.inputs)
    torch.testing.assert_close(again.coded[0](made.inputs), expected)
    torch.testing.assert_close(deepcopy(system).coded[0](made.inputs), expected)


@pytest.mark.parametrize("name", ["recurrent", "container"])
def test_what_cannot_be_made_is_whole_and_cannot_be_changed(name):
    made = make(name)
    whole = CASES[name].whole
    with pytest.warns(
        CoinWarning, match="is held packed but for .*, of containers or RNNs"
    ) as caught:
        packed = made.compressed.packed()
    names = {name for name, _, _ in kept_parameters(packed)}
    assert names == made.compressed.rounded.keys() - {*whole}
    for parameter in whole:
        assert (
            f"'{parameter}'" in str(caught[0].message) or parameter not in made.compressed.rounded
        )
        change = coin.Adapter(
            {parameter: {"scale": torch.full((len(packed.get_parameter(parameter)), 1), 2.0)}}
        )
        with pytest.raises(
            StateError,
            match=f"'{parameter}' cannot be changed, expected no parameter of a container",
        ):
            coin.Adapted(made.network, [change])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_a_mixed_batch_keeps_its_order(mixed, kind):
    body, base = mixed.bodies()[kind]
    experts = torch.tensor([2, 0, 1, 1, 0, 2, 0])
    answers = torch.stack([reference(base, changes, mixed.inputs) for changes in mixed.changes])
    expected = answers[experts, torch.arange(7)]
    _, logits = features_and_logits(body, mixed.inputs, experts)
    check_close(body(mixed.inputs, experts=experts), expected)
    check_close(logits, expected)
    assert body(mixed.inputs[:0], experts=experts[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    "experts",
    [1.0, True, [0, 1], torch.zeros(7), torch.zeros(7, 1).long(), torch.zeros(3).long()],
    ids=["a float", "a truth value", "a list", "floats", "a matrix", "too few"],
)
def test_what_names_no_experts_is_refused_in_a_line(mixed, experts):
    body, _ = mixed.bodies()["whole"]
    with pytest.raises(
        ConfigurationError, match=r"for the experts, expected an index, or indices \[7\], int64"
    ):
        body(mixed.inputs, experts=experts)


@pytest.mark.parametrize("experts", [3, -1, torch.tensor([0, 0, 0, 3, 0, 0, 0])])
def test_an_expert_that_there_is_none_of_is_refused(mixed, experts):
    body, _ = mixed.bodies()["whole"]
    with pytest.raises(ConfigurationError, match=r"found expert (3|-1), expected 0 to 2"):
        body(mixed.inputs, experts=experts)
    with pytest.raises(StateError, match="expected one; give experts="):
        body(mixed.inputs)


@torch.no_grad()
def test_threads_do_not_see_one_another_s_experts(mixed):
    body, _ = mixed.bodies()["packed"]
    barrier = threading.Barrier(3)
    expected = [body.network(expert)(mixed.inputs) for expert in range(3)]
    wrong = []

    @torch.no_grad()
    def ask(expert):
        for _ in range(30):
            barrier.wait()
            found = body(mixed.inputs, experts=expert)
            if not torch.allclose(found, expected[expert], rtol=1e-4, atol=1e-4):
                wrong.append(expert)

    threads = [threading.Thread(target=ask, args=(expert,)) for expert in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_a_body_is_an_ordinary_module(mixed, kind):
    body, base = mixed.bodies()[kind]
    other, _ = make("mixed").bodies()[kind]
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(body.state_dict())
    expected = reference(base, mixed.changes[1], mixed.inputs)
    check_close(other(mixed.inputs, experts=1), expected)
    wide = deepcopy(body).double()
    torch.testing.assert_close(
        wide(mixed.inputs.double(), experts=1), expected, rtol=1e-5, atol=1e-5
    )
    moved = deepcopy(body).to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert moved(mixed.inputs.to("meta"), experts=1).shape == (7, 5)


@torch.no_grad()
def test_a_body_is_exported(mixed):
    body, _ = mixed.bodies()["packed"]
    program = torch.export.export(body, (mixed.inputs,), {"experts": 1}, strict=False)
    torch.testing.assert_close(
        program.module()(mixed.inputs, experts=1), body(mixed.inputs, experts=1)
    )


@torch.no_grad()
def test_tensors_by_name_are_the_body_s_too(mixed):
    body, _ = mixed.bodies()["packed"]
    experts = [body.network(expert) for expert in range(3)]
    system = coin.Coded(coin.uniform(3), experts, [body])
    system.fit_decoder([{"x": mixed.inputs}], [0, 1, 2], "expert_head")
    for expert in range(3):
        (answer,) = system.decode({"x": mixed.inputs}, [expert])
        torch.testing.assert_close(answer, experts[expert](mixed.inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "largest"), [("mixed", 8 * 27), ("texts", 12 * 12), ("texts, tied", 2000 * 12)]
)
def test_in_memory_are_the_tensors_and_the_largest_parameter_that_is_made(name, largest):
    made = make(name)
    body = coin.Adapted(made.compressed.packed())
    held = nbytes(body.state_dict(keep_vars=True).values())
    assert resident_nbytes(body) == held + 4 * largest
    assert resident_nbytes(made.network) == stored_nbytes(made.network)


def test_stored_are_tied_tensors_once_and_every_adapter(mixed):
    tensors = {id(each): each for each in (*mixed.network.parameters(), *mixed.network.buffers())}
    once = sum(each.numel() * each.element_size() for each in tensors.values())
    changes = sum(adapter.nbytes for adapter in mixed.adapters)
    assert stored_nbytes(mixed.network) == once
    assert stored_nbytes(coin.Adapted(mixed.network, mixed.adapters)) == once + changes


def test_changes_of_other_forms_are_refused():
    network = nn.Linear(6, 5)
    low_rank = {"left": torch.randn(5, 3), "right": torch.randn(3, 6)}
    narrow = {"left": torch.randn(5, 1), "right": torch.randn(1, 6)}
    for other in (narrow, {**low_rank, "scale": torch.rand(5, 1)}, {"scale": torch.rand(5, 1)}):
        adapters = [coin.Adapter({"weight": low_rank}), coin.Adapter({"weight": other})]
        with pytest.raises(
            StateError, match="found changes of 'weight' of several parts or ranks, expected the"
        ):
            coin.Adapted(network, adapters)


class Reading(nn.Module):
    """A network that reads its second layer in a way of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.second = nn.Linear(40, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        return self.head(self.read(self.first(x).relu()).relu())


class ByList(Reading):
    """It has a weight in a list, too."""

    def __init__(self):
        super().__init__()
        self.held = [self.second.weight]

    def read(self, x):
        return x @ self.held[0].T


class ByParameters(Reading):
    def read(self, x):
        return self.second(x) / sum(parameter.norm() for parameter in self.second.parameters())


class ByFunctionalCall(Reading):
    def read(self, x):
        return functional_call(self.second, {"weight": 2 * self.second.weight}, x)


class ByClass(Reading):
    def read(self, x):
        return self.second(x) if type(self.second) is nn.Linear else x


class Renormed(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class ByWriting(Reading):
    """As EEGNet does."""

    def __init__(self):
        super().__init__()
        self.read = Renormed(40, 40)


@pytest.mark.parametrize("kind", [ByParameters, ByFunctionalCall, ByClass, ByWriting])
def test_a_network_that_would_answer_otherwise_packed_is_refused(kind):
    torch.manual_seed(0)
    packed = coin.compress(kind().eval(), None, bits=4, base_bits=0).packed()
    with pytest.raises(
        StateError, match=rf"{kind.__name__} answers otherwise where .*, expected the same; read"
    ):
        check_as_plain(coin.Adapted(packed), torch.randn(5, 40))


def test_a_change_of_a_weight_that_a_list_holds_too_is_refused():
    change = coin.Adapter({"second.weight": {"scale": 2 * torch.ones(40)}})
    with pytest.raises(StateError, match="ByList answers otherwise where"):
        check_as_plain(coin.Adapted(ByList().eval(), [change]), torch.randn(5, 40))


@pytest.mark.filterwarnings("ignore:method")
@pytest.mark.parametrize(
    "options", [{"compress": {"bits": 4}}, {"adapters": {"rank": 1}, "compress": {"bits": 4}}]
)
def test_a_merge_that_would_answer_otherwise_packed_is_refused(options):
    experts = [ByClass().eval(), ByClass().eval()]
    inputs = [[torch.randn(60, 40)], [torch.randn(60, 40)]]
    with pytest.raises(StateError, match="ByClass answers otherwise where"):
        coin.merge_networks(coin.Average(**options), experts, [[0.5, 0.5]], calibration=inputs)


def test_adapters_in_a_file_are_told_from_a_module_called_adapters():
    made = make("named")
    state = made.network.state_dict() | adapters_state(made.adapters)
    names, adapters = split_adapters(state, 3)
    assert names == [*made.network.state_dict()]
    for found, adapter in zip(adapters, made.adapters, strict=True):
        torch.testing.assert_close(found.tensors, adapter.tensors, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("parts", [("low_rank",), FULL])
@pytest.mark.parametrize("layer", ["0", "5"])
def test_under_autocast_a_change_on_outputs_has_the_type_of_one_on_the_weight(layer, parts):
    network = positions().eval()
    changed = network.get_parameter(f"{layer}.weight")
    draw = torch.Generator().manual_seed(0)
    adapter = coin.Adapter({f"{layer}.weight": parts_of(changed, parts, draw)})
    body = coin.Adapted(network, [adapter])
    shape = changed.shape[1:]

    def run_layer(own, inputs):
        return own.get_submodule(layer)(inputs)

    with torch.autocast("cpu", torch.bfloat16):
        for count in (1, 100):
            assert (
                body.run(run_layer, torch.randn(count, *shape), experts=0).dtype == torch.bfloat16
            )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
@pytest.mark.parametrize("part", ["low_rank", "scale", "shift"])
def test_an_adapter_that_is_not_finite_or_too_large_for_its_bytes_is_refused(value, part):
    wrong = torch.tensor([[1.0, value, 2.0]])
    change = {"left": wrong.T, "right": wrong} if part == "low_rank" else {part: wrong}
    if value == 1e6 and part != "low_rank":  # a float32 holds it
        assert coin.Adapter({"weight": change}).nbytes == 3 + 8
        return
    with pytest.raises(NumericalError, match="a value of an adapter that is not finite or beyond"):
        coin.Adapter({"weight": change})
