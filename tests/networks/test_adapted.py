"""Bodies with adapters, whole and packed, beside plain networks of which every parameter is written out in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import nn

import coin
from coin.errors import CoinError, CoinWarning, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.adapter import adapters_state, split_adapters
from coin.networks.kept import kept_parameters
from coin.networks.running import check_as_plain, features_and_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*is held packed but for")


class Mixed(nn.Module):
    """A convolution with a BatchNorm, attention with its own parameter, a tied weight, a module called adapters."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.place = nn.Parameter(torch.randn(1, 16, 8))
        self.adapters = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.adapters.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.norm(self.kernel(x)).flatten(2).mT + self.place
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        hidden = torch.relu(self.adapters(tokens + mixed))
        return self.head(self.second(hidden).mean(1))


class Owning(nn.Sequential):
    """A container with a parameter of its own, an LSTM, and a layer whose weight is in a list, too."""

    def __init__(self):
        lstm = nn.LSTM(8, 40, batch_first=True)
        super().__init__(lstm, nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 5))
        self.prompt = nn.Parameter(torch.randn(4, 40))
        self.held = [self[1].weight]

    def forward(self, x):
        lstm, _, second, head = self
        outputs, _ = lstm(x)
        hidden = outputs[:, -1] + self.prompt.mean(0)
        return head(second(hidden @ self.held[0].T).relu())


class Texts(nn.Module):
    """A classifier of tokens, whose embeddings are nearly all of it."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(2000, 12, padding_idx=0)
        self.map = nn.Linear(12, 12)
        self.out = nn.Linear(12, 2000, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(12, 3)
        if not tied:
            self.out = nn.Identity()

    def forward(self, tokens):
        features = self.map(self.embed(tokens)).relu().mean(1)
        return self.head(self.out(features)[:, :12] + features)


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
    convolutions = [nn.Conv2d(40, 40, 1), nn.Conv2d(40, 40, 3, padding=1), Centred(40, 40, 1)]
    maps = [Scaled(40, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 3)]
    return nn.Sequential(*convolutions, nn.Flatten(), *maps)


LOW_RANK = ("left", "right")
FULL = ("scale", "left", "right")
MIXED = {
    "kernel.weight": FULL,
    "norm.bias": ("shift",),
    "attention.in_proj_weight": FULL,
    "attention.in_proj_bias": ("shift",),
    "attention.out_proj.weight": FULL,
    "second.weight": ("scale",),
}


def at_positions(count, parts):
    weights = ["0.weight", "1.weight", "2.weight", "4.weight", "5.weight"]
    return positions(), torch.randn(count, 40, 1, 1), dict.fromkeys(weights, parts)


def of_texts(changed, tied=False):
    return Texts(tied), torch.randint(0, 2000, (7, 5)), changed


# Each makes a network, inputs, and the parts of each parameter that adapters change.
CASES = {
    "mixed": lambda: (Mixed(), torch.randn(7, 3, 4, 4), MIXED),
    "owning": lambda: (Owning(), torch.randn(5, 5, 8), {"2.weight": FULL}),
    "texts": lambda: of_texts({"map.weight": FULL}),
    "texts, changed": lambda: of_texts({"embed.weight": ("scale",)}),
    "texts, tied": lambda: of_texts({}, tied=True),
    "no position": lambda: at_positions(0, FULL),
    "one position": lambda: at_positions(1, FULL),
    "one position, low-rank": lambda: at_positions(1, LOW_RANK),
    "one position, shifted": lambda: at_positions(1, ("shift", *LOW_RANK)),
    "many positions": lambda: at_positions(100, FULL),
}


def change_of(parameter, parts):
    """Return an expert's change of a parameter, of values that its bytes hold: 0 and 15 sixteenths."""
    rows = len(parameter)
    along = [rows] + [1] * (parameter.ndim - 1)
    columns = parameter[0].numel()
    shapes = {"scale": along, "shift": along, "left": (rows, 2), "right": (2, columns)}
    return {part: torch.randint(2, shapes[part]) * 15 / 16 for part in parts}


class Made:
    """A case's body, the plain network that it stands on, its experts' changes and adapters, and inputs."""

    def __init__(self, case, is_packed=True):
        torch.manual_seed(0)
        network, self.inputs, changed = CASES[case]()
        self.network = network.eval()
        self.changes = [{}]  # the first expert is the body itself
        for _ in range(2):
            change = {
                name: change_of(network.get_parameter(name), changed[name]) for name in changed
            }
            self.changes.append(change)
        self.adapters = [coin.Adapter(change) for change in self.changes]
        self.compressed = coin.compress(network, None, bits=4, base_bits=0)
        self.base = self.compressed.network() if is_packed else network
        own = self.compressed.packed() if is_packed else network
        self.body = coin.Adapted(own, self.adapters)

    @torch.no_grad()
    def expected(self, expert):
        """Return the outputs in float64 with each changed parameter (θ + left right) ⊙ scale + shift."""
        plain = deepcopy(self.base).double()
        for name, change in self.changes[expert].items():
            parameter = plain.get_parameter(name)
            if "left" in change:
                update = change["left"].double() @ change["right"].double()
                parameter += update.view_as(parameter)
            parameter *= change.get("scale", 1)
            parameter += change.get("shift", 0)
        is_real = self.inputs.is_floating_point()
        return plain(self.inputs.double() if is_real else self.inputs)


def check_close(found, expected):
    """Compare float32 outputs with float64 ones: sums of some hundred products, a few layers deep."""
    size = float(expected.abs().amax()) if expected.numel() else 1.0
    tolerance = 1000 * torch.finfo(torch.float32).eps * size
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def mixed():
    return Made("mixed")


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_a_body_answers_as_each_expert_written_out(case, is_packed):
    made = Made(case, is_packed)
    for expert, adapter in enumerate(made.adapters):
        expected = made.expected(expert)
        plain = made.body.network(expert)
        check_close(made.body(made.inputs, experts=expert), expected)
        check_close(plain(made.inputs), expected)
        check_close(adapter.applied_to(made.base)(made.inputs), expected)
        assert [*plain.state_dict()] == [*made.network.state_dict()]


def test_parameters_of_containers_and_rnns_are_whole_and_cannot_be_changed():
    with pytest.warns(CoinWarning, match="packed but for .*, of containers or RNNs") as caught:
        made = Made("owning")
    whole = {"prompt", "0.weight_ih_l0", "0.weight_hh_l0"}
    names = {name for name, _, _ in kept_parameters(made.body.body)}
    assert names == made.compressed.rounded.keys() - whole
    for name in whole:
        assert f"'{name}'" in str(caught[0].message)
        change = coin.Adapter({name: {"scale": torch.ones(1)}})
        with pytest.raises(StateError, match=f"'{name}' cannot be changed, expected no parameter"):
            coin.Adapted(made.network, [change])


@torch.no_grad()
def test_a_mixed_batch_keeps_its_order(mixed):
    experts = torch.tensor([2, 0, 1, 1, 0, 2, 0])
    of_each = torch.stack([mixed.expected(expert) for expert in range(3)])
    expected = of_each[experts, torch.arange(7)]
    check_close(mixed.body(mixed.inputs, experts=experts), expected)
    check_close(mixed.body(x=mixed.inputs, experts=experts), expected)
    _, logits = features_and_logits(mixed.body, mixed.inputs, experts)
    check_close(logits, expected)
    assert mixed.body(mixed.inputs[:0], experts=experts[:0]).shape == (0, 5)


NO_INDEX = r"for the experts, expected an index, or indices \[7\], int64"
WRONG = {
    "a truth value": (True, NO_INDEX),
    "a list": ([0, 1], NO_INDEX),
    "floats": (torch.zeros(7), NO_INDEX),
    "too few": (torch.zeros(3).long(), NO_INDEX),
    "none": (None, "expected one; give experts="),
    "too large": (3, "found expert 3, expected 0 to 2"),
    "one too small": (torch.tensor([0, 0, 0, -1, 0, 0, 0]), "found expert -1, expected 0 to 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_names_no_experts_is_refused_in_a_line(mixed, case):
    experts, message = WRONG[case]
    with pytest.raises(CoinError, match=message):
        mixed.body(mixed.inputs, experts=experts)


def test_threads_do_not_see_one_another_s_experts(mixed):
    expected = [mixed.body.network(expert)(mixed.inputs) for expert in range(3)]
    barrier = threading.Barrier(3)

    def wait(*_):
        barrier.wait(60)

    mixed.body.body.norm.register_forward_hook(wait)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda expert: mixed.body(mixed.inputs, experts=expert), range(3))
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
def test_a_body_is_an_ordinary_module(is_packed):
    made = Made("mixed", is_packed)
    other = deepcopy(made.body)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(made.body.state_dict())
    expected = made.expected(1)
    check_close(other(made.inputs, experts=1), expected)
    wide = other.double()(made.inputs.double(), experts=1)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)
    other.to("meta")
    assert {tensor.device.type for tensor in other.state_dict().values()} == {"meta"}
    assert other(made.inputs.double().to("meta"), experts=1).shape == (7, 5)


@torch.no_grad()
def test_a_body_is_exported(mixed):
    program = torch.export.export(mixed.body, (mixed.inputs,), {"experts": 1}, strict=False)
    found = program.module()(mixed.inputs, experts=1)
    torch.testing.assert_close(found, mixed.body(mixed.inputs, experts=1))


@pytest.mark.parametrize(
    ("case", "largest"), [("mixed", 8 * 27), ("texts", 12 * 12), ("texts, tied", 2000 * 12)]
)
def test_in_memory_are_the_tensors_and_the_largest_parameter_that_is_made(case, largest):
    made = Made(case)
    packed = made.compressed.packed()
    held = nbytes(packed.state_dict(keep_vars=True).values())
    assert resident_nbytes(packed) == held + 4 * largest
    rounded = made.compressed.rounded.values()
    saved = sum(each.rows.nbytes - each.nbytes for each in rounded)
    assert stored_nbytes(packed) == held - saved
    assert resident_nbytes(made.network) == stored_nbytes(made.network)


def test_stored_are_tied_tensors_once_and_every_adapter():
    made = Made("mixed", is_packed=False)
    tensors = [*made.network.parameters(), *made.network.buffers()]  # each once
    once = sum(tensor.nbytes for tensor in tensors)
    changes = sum(adapter.nbytes for adapter in made.adapters)
    assert stored_nbytes(made.network) == once
    assert stored_nbytes(made.body) == once + changes


def test_changes_of_other_forms_are_refused():
    low_rank = {"left": torch.randn(5, 3), "right": torch.randn(3, 6)}
    narrow = {"left": torch.randn(5, 1), "right": torch.randn(1, 6)}
    for other in (narrow, {"scale": torch.rand(5, 1)}):
        adapters = [coin.Adapter({"weight": change}) for change in (low_rank, other)]
        with pytest.raises(StateError, match="changes of 'weight' of several parts or ranks"):
            coin.Adapted(nn.Linear(6, 5), adapters)


class Reading(nn.Module):
    """A network that reads its second layer in a way of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.second = nn.Linear(40, 40)
        self.head = nn.Linear(40, 5)
        self.held = [self.second.weight]

    def forward(self, x):
        return self.head(self.read(self.first(x).relu()).relu())


class ByList(Reading):
    def read(self, x):
        return x @ self.held[0].T


class ByParameters(Reading):
    def read(self, x):
        return self.second(x) / sum(parameter.norm() for parameter in self.second.parameters())


class ByClass(Reading):
    def read(self, x):
        return self.second(x) if type(self.second) is nn.Linear else x


class ByWriting(Reading):
    """As EEGNet does."""

    def read(self, x):
        self.second.weight.data = torch.renorm(self.second.weight.data, 2, 0, 0.3)
        return self.second(x)


@pytest.mark.parametrize("kind", [ByParameters, ByClass, ByWriting])
def test_a_network_that_would_answer_otherwise_packed_is_refused(kind):
    torch.manual_seed(0)
    packed = coin.compress(kind().eval(), None, bits=4, base_bits=0).packed()
    message = rf"{kind.__name__} answers otherwise where .*, expected the same; read"
    with pytest.raises(StateError, match=message):
        check_as_plain(coin.Adapted(packed), torch.randn(5, 40))


def test_a_change_of_a_weight_that_a_list_holds_too_is_refused():
    change = coin.Adapter({"second.weight": {"scale": 2 * torch.ones(40)}})
    with pytest.raises(StateError, match="ByList answers otherwise where"):
        check_as_plain(coin.Adapted(ByList().eval(), [change]), torch.randn(5, 40))


@pytest.mark.filterwarnings("ignore:method")
@pytest.mark.parametrize("adapters", [None, {"rank": 1}])
def test_a_merge_that_would_answer_otherwise_packed_is_refused(adapters):
    method = coin.Average(adapters=adapters, compress={"bits": 4})
    experts = [ByClass().eval(), ByClass().eval()]
    inputs = [[torch.randn(60, 40)], [torch.randn(60, 40)]]
    with pytest.raises(StateError, match="ByClass answers otherwise where"):
        coin.merge_networks(method, experts, [[0.5, 0.5]], calibration=inputs)


def test_adapters_are_given_back_and_in_a_file_told_from_a_module_called_adapters(mixed):
    state = mixed.network.state_dict() | adapters_state(mixed.body.adapters)
    names, adapters = split_adapters(state, 3)
    assert names == [*mixed.network.state_dict()]
    found = [adapter.tensors for adapter in adapters]
    expected = [adapter.tensors for adapter in mixed.adapters]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 100])  # on outputs, on the weight
@pytest.mark.parametrize("parts", [LOW_RANK, FULL])
@pytest.mark.parametrize("kind", ["convolution", "map"])
def test_changed_layers_have_outputs_of_autocast_s_type(kind, parts, count):
    layer = nn.Conv2d(40, 40, 1) if kind == "convolution" else nn.Linear(40, 40)
    adapter = coin.Adapter({"0.weight": change_of(layer.weight, parts)})
    body = coin.Adapted(nn.Sequential(layer, nn.Linear(40, 3)), [adapter])
    inputs = torch.randn(count, *layer.weight.shape[1:])
    with torch.autocast("cpu", torch.bfloat16):
        found = body.run(lambda own, x: own[0](x), inputs, experts=0)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("parts", "value"),
    [(LOW_RANK, torch.nan), (LOW_RANK, 1e6), (("scale",), torch.nan), (("shift",), torch.inf)],
)
def test_an_adapter_that_is_not_finite_or_too_large_for_its_bytes_is_refused(parts, value):
    change = dict.fromkeys(parts, torch.tensor([[value]]))
    with pytest.raises(NumericalError, match="a value of an adapter that is not finite or beyond"):
        coin.Adapter({"weight": change})
