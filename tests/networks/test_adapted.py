import threading
from copy import deepcopy

import pytest
import torch
from torch import nn

import coin
from coin.errors import CoinWarning, ConfigurationError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.adapter import adapters_state, split_adapters
from coin.networks.kept import kept_parameters
from coin.networks.running import check_as_plain, features_and_logits


class Network(nn.Module):
    """A convolution with a BatchNorm, attention with its own parameter, a tied weight and a head."""

    def __init__(self):
        super().__init__()
        self.kernel, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.attention, self.place = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(1, 16, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.kernel(x)).flatten(2).mT + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.second(torch.relu(self.first(x))).mean(1))


CHANGED = ("kernel.weight", "attention.in_proj_weight", "attention.out_proj.weight")


def adapter(network, seed):
    torch.manual_seed(seed)
    changes = {"norm.bias": {"shift": torch.randn(8)}, "attention.in_proj_bias": {"shift": torch.randn(24)}}
    for name in CHANGED:
        weight = network.get_parameter(name)
        rows, columns = weight.flatten(1).shape
        scale = 1 + 0.1 * torch.randn(rows, *[1] * (weight.ndim - 1))
        changes[name] = {"scale": scale, "left": 0.3 * torch.randn(rows, 3), "right": 0.3 * torch.randn(3, columns)}
    return coin.Adapter(changes)


@pytest.fixture(scope="module")
def made():
    """A network, three adapters, the whole and the packed body with them, and inputs."""
    torch.manual_seed(0)
    network = Network().eval()
    adapters = [adapter(network, seed) for seed in (1, 2)] + [coin.Adapter()]
    packed = coin.compress(network, None, bits=4, base_bits=0).packed()
    return network, adapters, coin.Adapted(network, adapters), coin.Adapted(packed, adapters), torch.randn(7, 3, 4, 4)


@torch.no_grad()
def test_what_a_layer_makes_when_it_is_called_is_what_one_network_for_each_expert_has(made):
    network, adapters, whole, packed, x = made
    plain = coin.compress(network, None, bits=4, base_bits=0).network()
    for expert, own in enumerate(adapters):
        for body, base in ((whole, network), (packed, plain)):
            found = body(x, experts=expert)
            torch.testing.assert_close(found, own.applied_to(base)(x), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, body.network(expert)(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.network(0)(x), whole.network(1)(x))
    assert [*whole.network(0).state_dict()] == [*network.state_dict()]  # in their order
    assert packed.network(1).second.weight is not packed.network(1).first.bias
    one = packed.network(1)
    assert one.second.weight is one.first.weight
    assert [*plain.state_dict()] == [*network.state_dict()]


@torch.no_grad()
def test_a_mixed_batch_runs_once_for_each_expert_in_it_and_keeps_its_order(made):
    _, _, whole, packed, x = made
    experts = torch.tensor([2, 0, 1, 1, 0, 2, 0])
    for body in (whole, packed):
        runs = []
        hook = body.body.head.register_forward_hook(lambda *call, runs=runs: runs.append(len(call[2])))
        logits, both = body(x, experts=experts), features_and_logits(body, x, experts)
        hook.remove()
        assert runs == [3, 2, 2] * 2
        for place, expert in enumerate(experts.tolist()):
            expected = body.network(expert)(x[place : place + 1])
            torch.testing.assert_close(logits[place : place + 1], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(both[1][place : place + 1], expected, rtol=1e-4, atol=1e-5)
        assert body(x[:0], experts=experts[:0]).shape == (0, 5)
        for wrong in (3, -1, torch.tensor([0, 0, 0, 3, 0, 0, 0])):
            message = r"found expert (3|-1), expected 0 to 2"
            with pytest.raises(ConfigurationError, match=message):
                body(x, experts=wrong)
        with pytest.raises(StateError, match="expected one; give experts="):
            body(x)


@torch.no_grad()
def test_threads_do_not_see_one_another_s_experts(made):
    _, _, _, packed, x = made
    expected, wrong, barrier = [packed.network(expert)(x) for expert in range(3)], [], threading.Barrier(3)

    def ask(expert):
        with torch.no_grad():
            for _ in range(30):
                barrier.wait()
                if not torch.allclose(packed(x, experts=expert), expected[expert], rtol=1e-4, atol=1e-5):
                    wrong.append(expert)

    threads = [threading.Thread(target=ask, args=(expert,)) for expert in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_body_is_an_ordinary_module(made):
    network, _, whole, packed, x = made
    for body in (whole, packed):
        other = coin.Adapted(
            deepcopy(network) if body is whole else coin.compress(Network(), None, bits=4, base_bits=0).packed(),
            [adapter(network, 8), adapter(network, 9), coin.Adapter()],
        ).eval()
        if body is packed:
            assert not torch.equal(other.network(0)(x), packed.network(0)(x))
        other.load_state_dict(body.state_dict())
        assert torch.equal(other.network(0)(x), body.network(0)(x))
        wide = deepcopy(body).double()
        found = wide(x.double(), experts=1)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), body.network(1)(x), rtol=1e-3, atol=1e-3)
        moved = deepcopy(body).to("meta")
        assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}
        assert moved(x.to("meta"), experts=1).shape == (7, 5)
    exported = torch.export.export(packed, (x,), {"experts": 1}, strict=False).module()  # as newer torch does by itself
    torch.testing.assert_close(exported(x, experts=1), packed(x, experts=1))


def test_what_is_in_memory_is_the_tensors_and_what_making_the_largest_parameter_takes(made):
    network, _, _, packed, _ = made
    working = 4 * 8 * 27  # the kernel
    assert resident_nbytes(packed) == nbytes(packed.state_dict(keep_vars=True).values()) + working
    assert resident_nbytes(network) == nbytes(network.state_dict(keep_vars=True).values())


@torch.no_grad()
def test_tensors_by_name_are_the_body_s_too(made):
    network, adapters, _, packed, x = made
    experts = [packed.network(expert) for expert in range(3)]
    body = coin.Adapted(coin.compress(network, None, bits=4, base_bits=0).packed(), adapters)
    system = coin.Coded(coin.uniform(3), experts, [body])
    system.fit_decoder([{"x": x}], [0, 1, 2], "expert_head")
    for expert in range(3):
        answer = system.decode({"x": x}, [expert])[0]
        torch.testing.assert_close(answer, experts[expert](x), rtol=1e-4, atol=1e-4)


class Recurrent(nn.Module):
    """An LSTM, and a module that has its weight in a list, too."""

    def __init__(self):
        super().__init__()
        self.lstm, self.map, self.head = nn.LSTM(1, 40, batch_first=True), nn.Linear(40, 40), nn.Linear(40, 5)
        self.held = [self.map.weight]

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1] @ self.held[0].T)


class Container(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
        self.prompt = nn.Parameter(torch.randn(4, 40))

    def forward(self, x):
        return super().forward(x + self.prompt.mean(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is held packed but for")
@pytest.mark.parametrize("kind", [Recurrent, Container, Tied])
def test_odd_networks_answer_packed_as_they_do_unpacked(kind, tmp_path):
    torch.manual_seed(0)
    network, x = kind().eval(), torch.randn(5, 40)
    compressed = coin.compress(network, None, bits=4, base_bits=0)
    expected = compressed.network()(x)
    assert not torch.equal(expected, network(x))
    whole = {Recurrent: r"'lstm.weight_hh_l0'\], of", Container: "'prompt'", Tied: None}[kind]
    if whole is None:
        packed = compressed.packed()
    else:
        before = deepcopy(compressed.base.state_dict())
        with pytest.warns(CoinWarning, match=rf"{kind.__name__} is held packed but for .*{whole}"):
            packed = compressed.packed()
        assert all(torch.equal(tensor, before[name]) for name, tensor in compressed.base.state_dict().items())
        packed_names = [name for name, _, _ in kept_parameters(packed)]
        assert packed_names == (["map.weight", "head.weight"] if kind is Recurrent else ["0.weight", "2.weight"])
    torch.testing.assert_close(packed(x), expected)
    system = coin.Coded(coin.uniform(2), [network, deepcopy(network)], [compressed])
    system.fit_decoder([x], [0], "linear").save(tmp_path / "system")
    again = coin.Coded.load(tmp_path / "system", system.experts)
    assert torch.equal(again.coded[0](x), system.coded[0](x))
    assert torch.equal(deepcopy(system).coded[0](x), system.coded[0](x))


class Reading(nn.Module):
    """A network that reads its second layer in a way of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 5)

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
        return torch.func.functional_call(self.second, {"weight": 2 * self.second.weight}, x)


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


@pytest.mark.filterwarnings("ignore:method")
@pytest.mark.parametrize("kind", [ByParameters, ByFunctionalCall, ByClass, ByWriting])
def test_a_network_that_would_answer_otherwise_packed_is_refused(kind):
    torch.manual_seed(0)
    message = rf"{kind.__name__} answers otherwise where .*, expected the same; read"
    packed = coin.compress(kind().eval(), None, bits=4, base_bits=0).packed()
    with pytest.raises(StateError, match=message):
        check_as_plain(coin.Adapted(packed), torch.randn(5, 40))
    if kind is ByWriting:  # of the average of two weights whose rows are short enough nothing is written
        return
    experts, inputs = [kind().eval() for _ in range(2)], [[torch.randn(60, 40)] for _ in range(2)]
    for method in (coin.Average(compress={"bits": 4}), coin.Average(adapters={"rank": 1}, compress={"bits": 4})):
        with pytest.raises(StateError, match=message):
            coin.merge_networks(method, experts, [[0.5, 0.5]], calibration=inputs)


def test_a_change_of_a_weight_that_a_list_holds_too_is_refused():
    body = ByList().eval()
    change = coin.Adapter({"second.weight": {"scale": 2 * torch.ones(40)}})
    with pytest.raises(StateError, match="ByList answers otherwise where"):
        check_as_plain(coin.Adapted(body, [change]), torch.randn(5, 40))


@torch.no_grad()
def test_tied_weights_are_changed_together_and_what_cannot_be_changed_is_refused():
    torch.manual_seed(0)
    network, x = Tied().eval(), torch.randn(5, 40)
    compressed = coin.compress(network, None, bits=4, base_bits=0)
    scale = {"scale": 2 * torch.ones(40, 1)}
    change = coin.Adapter({"first.weight": scale})
    for body, base in ((network, network), (compressed.packed(), compressed.network())):
        adapted = coin.Adapted(body, [change])
        torch.testing.assert_close(adapted.network(0)(x), change.applied_to(base)(x))
        assert adapted.adapters[0].nbytes == change.nbytes
    for body, name in ((Recurrent(), "lstm.weight_hh_l0"), (Container(), "prompt")):
        with pytest.raises(StateError, match=f"'{name}' cannot be changed, expected no parameter of a container or"):
            coin.Adapted(body, [coin.Adapter({name: scale})])


def test_an_expert_without_a_change_answers_as_the_body_and_changes_of_other_forms_are_refused():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    wide = {"scale": 1 + torch.rand(5, 1), "left": torch.randn(5, 3), "right": torch.randn(3, 6)}
    adapters = [
        coin.Adapter({"0.bias": {"shift": torch.randn(5)}}),
        coin.Adapter({"0.weight": wide, "0.bias": {"shift": torch.randn(5)}}),
        coin.Adapter(),
    ]
    adapted, inputs = coin.Adapted(network, adapters), torch.randn(4, 6)
    for place, adapter in enumerate(adapters):
        with torch.no_grad():
            torch.testing.assert_close(adapted(inputs, experts=place), adapter.applied_to(network)(inputs))
        again = adapted.adapters[place].tensors
        assert again.keys() == adapter.tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in adapter.tensors.items())
    parts = [name for name, _ in adapted.named_buffers()]
    assert len(parts) == 4  # three of the weight's and one of the bias's, of all experts together
    assert stored_nbytes(adapted) == stored_nbytes(network) + sum(adapter.nbytes for adapter in adapters)
    narrow = {"left": torch.randn(5, 1), "right": torch.randn(1, 6)}
    for other in (narrow, narrow | {"scale": wide["scale"]}, {"scale": wide["scale"]}):
        with pytest.raises(StateError, match=r"found changes of '0\.weight' of several parts or ranks, expected the"):
            coin.Adapted(network, [adapters[1], coin.Adapter({"0.weight": other})])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (1.0, r"found 1\.0 for the experts, expected an index"),
        (True, "found True for the experts, expected an index"),
        ([0, 1], r"found \[0, 1\] for the experts, expected an index"),
        (torch.zeros(7), r"found tensor\(.* for the experts, expected an index"),
        (
            torch.zeros(7, 1, dtype=torch.long),
            r"for the experts, expected an index, or indices \[7\], int64",
        ),
        (
            torch.zeros(3, dtype=torch.long),
            r"for the experts, expected an index, or indices \[7\], int64",
        ),
    ],
)
def test_what_names_no_experts_is_refused_in_a_line(made, experts, message):
    _, _, body, _, x = made
    with pytest.raises(ConfigurationError, match=message):
        body(x, experts=experts)


def test_tied_tensors_are_stored_once():
    network = Network()
    once = sum(parameter.nbytes for parameter in network.parameters()) + sum(b.nbytes for b in network.buffers())
    assert stored_nbytes(network) == once


class Texts(nn.Module):
    """A classifier of tokens, whose embeddings are nearly all of it."""

    def __init__(self, tied=False, **options):
        super().__init__()
        self.embed = nn.Embedding(2000, 12, **options)
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


@torch.no_grad()
@pytest.mark.parametrize("bits", [3, 4])
def test_of_a_packed_embedding_the_rows_that_are_looked_up_are_made_alone(bits):
    torch.manual_seed(0)
    network = Texts(padding_idx=0).eval()
    packed = coin.Adapted(coin.compress(network, None, bits=bits, base_bits=0).packed())
    plain = packed.network(0)
    tokens = torch.randint(0, 2000, (7, 5))
    kept = {name: own for name, _, own in kept_parameters(packed.body)}
    whole = network.embed.weight.nbytes
    working = 4 * 12 * 12  # the map's weight
    assert resident_nbytes(packed) == nbytes(packed.state_dict(keep_vars=True).values()) + working < 0.5 * whole
    kept["embed.weight"].forward = None  # the whole matrix is not made
    assert torch.equal(packed(tokens), plain(tokens))
    assert torch.equal(packed(tokens[:, 0:1]), plain(tokens[:, 0:1]))
    exported = torch.export.export(packed, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens), plain(tokens))


@torch.no_grad()
def test_an_embedding_that_is_read_whole_too_counts_as_such():
    torch.manual_seed(0)
    network = Texts(tied=True).eval()
    packed = coin.Adapted(coin.compress(network, None, bits=4, base_bits=0).packed())
    tokens = torch.randint(0, 2000, (7, 5))
    torch.testing.assert_close(packed(tokens), packed.network(0)(tokens))
    assert resident_nbytes(packed) > network.embed.weight.nbytes


class Named(nn.Module):
    """A module is called adapters, and two layers share a bias."""

    def __init__(self):
        super().__init__()
        self.adapters, self.other, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)
        self.other.bias = self.adapters.bias

    def forward(self, x):
        return self.head(self.other(self.adapters(x).relu()).relu())


@pytest.mark.filterwarnings("ignore:method")
def test_what_was_saved_of_a_shared_bias_and_a_module_called_adapters_is_loaded(tmp_path):
    torch.manual_seed(0)
    experts, inputs = [Named().eval() for _ in range(2)], [[torch.randn(60, 40)] for _ in range(2)]
    method = coin.Average(adapters={"rank": 2}, compress={"bits": 4})
    made = coin.merge_networks(method, experts, [[0.5, 0.5]], calibration=inputs)
    (packed,) = made.compressed["average+rank2-4bit"]
    system = coin.Coded([[0.5, 0.5]], experts, [packed]).fit_decoder(inputs[0], [0, 1], "expert_head")
    system.save(tmp_path / "system.safetensors")
    again = coin.Coded.load(tmp_path / "system.safetensors", experts)
    assert again.coded[0].body.other.bias is again.coded[0].body.adapters.bias
    assert torch.equal(again.decode(inputs[0][0], [0]), system.decode(inputs[0][0], [0]))
    state = experts[0].state_dict() | adapters_state(packed.adapters)
    names, adapters = split_adapters(state, 2)
    assert names == [*experts[0].state_dict()]
    assert adapters[1].tensors.keys() == packed.adapters[1].tensors.keys()


class Scaled(nn.Linear):
    """A linear layer that runs in a way of its own."""

    def forward(self, x):
        return 3 * super().forward(x)


class Centred(nn.Conv2d):
    """A convolution whose product is its own."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias) + 1


def on_one_position(layers):
    """Layers for single positions, on which updates are less work than on the weights."""
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 3)).eval()


def low_rank(names, **parts):
    factors = {"left": 0.1 * torch.randn(40, 2), "right": torch.randn(2, 40)}
    return coin.Adapter({name: {**factors, **parts} for name in names})


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 0])
def test_on_few_positions_layers_with_updates_with_other_parts_and_without_any_answer_as_plain_ones(samples):
    kinds = (nn.Conv2d(40, 40, 1), nn.Conv2d(40, 40, 1, bias=False), Centred(40, 40, 1), nn.Conv2d(40, 40, 1))
    network = on_one_position([*kinds, nn.Flatten(), Scaled(40, 40), nn.Linear(40, 40)])
    x = torch.randn(samples, 40, 1, 1)
    adapters = [coin.Adapter(), coin.Adapter(), coin.Adapter()]  # the last has none, nor has layer 3
    for adapter in adapters[:2]:
        adapter.changes |= low_rank(["0.weight", "2.weight"]).changes
        adapter.changes |= low_rank(["1.weight", "5.weight"], scale=torch.rand(40)).changes
        adapter.changes |= low_rank(["6.weight"], shift=torch.randn(40)).changes
    for body in (network, coin.compress(network, None, bits=4, base_bits=0).packed()):
        adapted = coin.Adapted(body, adapters)
        for expert in range(3):
            expected = adapted.network(expert)(x)
            torch.testing.assert_close(adapted(x, experts=expert), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("parts", [{}, {"scale": torch.rand(40)}])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_under_autocast_an_update_on_activations_has_the_type_of_one_on_the_weight(kind, parts):
    options = {"kernel_size": 1} if kind is nn.Conv2d else {}
    adapted = coin.Adapted(on_one_position([kind(40, 40, **options)]), [low_rank(["0.weight"], **parts)])
    shape = (40, 1, 1) if kind is nn.Conv2d else (40,)

    def first_layer(body, inputs):
        return body[0](inputs)

    with torch.autocast("cpu", torch.bfloat16):
        few, many = (adapted.run(first_layer, torch.randn(count, *shape), experts=0) for count in (1, 100))
    assert few.dtype == many.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_an_adapter_that_is_not_finite_or_too_large_for_its_bytes_is_refused(value):
    wrong = torch.tensor([[1.0, value, 2.0]])
    message = "found a value of an adapter that is not finite or beyond .*; check the experts"
    with pytest.raises(NumericalError, match=message):
        coin.Adapter({"weight": {"left": wrong.T, "right": wrong}})
    for part in ("scale", "shift"):
        if value == 1e6:
            assert coin.Adapter({"weight": {part: wrong}}).nbytes == 3 + 8
            continue
        with pytest.raises(NumericalError, match=message):
            coin.Adapter({"weight": {part: wrong}})
