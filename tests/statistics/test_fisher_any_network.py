"""Networks that are not a stack of layers: routed rows, columns read as tokens, unusual forms of usual calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Net, assert_exact, dense_loop, random
from torch import Tensor, nn

from coin.errors import StateError
from coin.statistics import fisher_diagonal, fisher_sums, gram_sums
from coin.statistics.intercept import Interceptor


class Experts(nn.Module):
    """A mixture of experts: every token goes, by its first entry, to one of them."""

    def __init__(self, number: int, gate: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(number))
        self.gate, self.head = gate, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        rows = x.flatten(0, 1)
        chosen = self.gate(rows, len(self.experts))
        mixed = rows.new_zeros(len(rows), 5)
        for index, expert in enumerate(self.experts):
            places = (chosen == index).nonzero().flatten()
            mixed = mixed.index_add(0, places, torch.tanh(expert(rows[places])))
        return self.head(mixed.view(len(x), -1, 5).mean(1))


def by_first_entry(rows: Tensor, number: int) -> Tensor:
    return rows[:, 0].long()


ROUTED = {  # the choices of each sample's tokens
    "one expert a sample": [[0], [1], [0], [1]],
    "an expert is never chosen": [[0, 1], [1, 0], [1, 1], [0, 0]],
    "as many rows as if they were spread evenly": [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]],
    "as many, in other places": [[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]],
    "every sample's tokens alike": [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]],
}


@pytest.mark.parametrize("name", ROUTED)
def test_a_mixture_of_experts(name: str) -> None:
    torch.manual_seed(0)
    chosen = torch.tensor(ROUTED[name])
    x = torch.randn(*chosen.shape, 4)
    x[..., 0] = chosen + 0.5
    never = ("experts.2.weight", "experts.2.bias")
    assert_exact(Experts(3, by_first_entry), x, zero=never)
    assert_exact(Experts(2, by_first_entry), x)


def test_gram_matrices_of_a_mixture_of_experts() -> None:
    """An expert that no token of a batch goes to has no matrix there, and what other batches bring is kept."""
    torch.manual_seed(0)
    network = Experts(3, by_first_entry).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    x[..., 0] = torch.tensor([[0.5] * 3, [1.5] * 3])
    first, second = gram_sums(network, [x[:1]]).values, gram_sums(network, [x[1:]]).values
    assert first.keys() == {"experts.0.weight", "head.weight"}
    assert second.keys() == {"experts.1.weight", "head.weight"}
    both = {**first, **second, "head.weight": first["head.weight"] + second["head.weight"]}
    for batches in ([x], x.split(1)):
        found = gram_sums(network, batches).values
        assert found.keys() == both.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, both[name], rtol=1e-12, atol=0)


def test_a_table_whose_columns_are_read_as_integers() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.tensor([0, 3, 1, 3, 2])[:, None], torch.randn(5, 2)], 1)
    parts = {"embed": nn.Embedding(4, 3), "numbers": nn.Linear(2, 3), "head": nn.Linear(3, CLASSES)}
    assert_exact(Net(lambda n, x: n.head(torch.tanh(n.embed(x[:, 0].long()) + n.numbers(x[:, 1:]))), **parts), x)


class Spelled(nn.Module):
    """One network whose calls name their arguments, or do not."""

    def __init__(self, keywords: bool) -> None:
        super().__init__()
        self.keywords = keywords
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.weight, self.bias = nn.Parameter(torch.randn(CLASSES, 4)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        if not self.keywords:
            y = torch.cat([self.token.expand(len(x), -1, -1), torch.add(torch.mul(x, self.scale), self.shift)], 1)
            return F.linear(torch.tanh(y), self.weight, self.bias).mean(1)
        y = torch.add(input=torch.mul(input=x, other=self.scale), other=self.shift)
        y = torch.cat([self.token.expand(size=(len(x), -1, -1)), y], 1)
        return F.linear(weight=self.weight, bias=self.bias, input=torch.tanh(y)).mean(1)


UNRULED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "options": lambda n, x: torch.addmm(n.bias, torch.add(x, n.shift, alpha=2, out=None), n.weight, beta=2, alpha=3),
    "from the right": lambda n, x: (x + n.shift) @ n.weight + n.bias,
    "a view": lambda n, x: F.linear(x + n.shift, n.weight.T, n.bias),
}


@pytest.mark.parametrize("form", UNRULED)
def test_a_form_of_a_call_that_no_rule_knows(form: str) -> None:
    torch.manual_seed(0)
    parts = {"weight": random(4, CLASSES), "bias": random(CLASSES), "shift": random(4)}
    assert_exact(Net(UNRULED[form], **parts), torch.randn(4, 4))


@pytest.mark.parametrize("keywords", [False, True])
def test_calls_with_keywords(keywords: bool) -> None:
    torch.manual_seed(0)
    network = Spelled(keywords)
    assert_exact(network, torch.randn(4, 3, 4))
    inputs = [torch.randn(4, 3, 4, dtype=torch.float64)]
    assert fisher_sums(network, inputs).passes == 4 * (1 + 2 * CLASSES), "the rules hold, spelled either way"


def overwritten(first: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """An input that is changed in place once it has been used, where its gradient does not need it."""

    def call(net: Net, x: Tensor) -> Tensor:
        h = net.before(x)
        y = first(net, h)
        h.mul_(2)
        return net.head(torch.tanh(y) + h)

    parts = {"before": nn.Linear(4, 4), "shift": random(4), "frozen": nn.Linear(4, 4), "head": nn.Linear(4, CLASSES)}
    parts["frozen"].weight.requires_grad_(False)
    return Net(call, **parts)


def test_a_legal_change_in_place() -> None:
    torch.manual_seed(0)
    assert_exact(overwritten(lambda net, h: h + net.shift), torch.randn(4, 4), zero=("frozen.bias",))
    assert_exact(overwritten(lambda net, h: net.frozen(h)), torch.randn(4, 4), zero=("shift",))


class Tied(nn.Module):
    """A language model's head: the embedding's matrix with a bias of its own."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(CLASSES, 4), nn.Linear(4, 4)
        self.head, self.positions = nn.Linear(4, CLASSES), positions
        self.head.weight = self.embed.weight
        nn.init.normal_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)))
        return self.head(h).mean(1) if self.positions else self.head(h.mean(1))


@pytest.mark.parametrize("positions", [False, True])
def test_tied_embeddings_with_a_bias(positions: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, CLASSES, (4, 5))
    network = Tied(positions)
    assert_exact(network, tokens)
    assert gram_sums(network, [tokens]).values["embed.weight"].shape == (1, 4, 4), "the bias is not its own"


def test_a_complex_buffer() -> None:
    """Rotary positions, that queries and keys are multiplied with."""

    def rotated(net: Net, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * net.turns
        return torch.view_as_real(pairs).flatten(2)

    def call(net: Net, x: Tensor) -> Tensor:  # [B, 5, 4]
        scores = rotated(net, net.queries(x)) @ rotated(net, net.keys(x)).mT
        return net.head((scores.softmax(-1) @ x).mean(1))

    torch.manual_seed(0)
    parts = {"queries": nn.Linear(4, 4), "keys": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, CLASSES)}
    network, x = Net(call, **parts), torch.randn(3, 5, 4)
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
    network.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
    gram_sums(network, [x])
    assert_exact(network, x)


def test_a_complex_parameter_has_no_statistic() -> None:
    network = nn.Linear(4, CLASSES)
    network.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    assert fisher_diagonal(network, [torch.randn(2, 4)]).keys() == {"weight", "bias"}


def test_a_parameter_without_entries() -> None:
    parts = {"none": nn.Parameter(torch.ones(4, 0)), "head": nn.Linear(4, CLASSES)}
    network = Net(lambda net, x: net.head(torch.cat([x, x @ net.none], 1)), **parts)
    assert_exact(network, torch.randn(3, 4), zero=("none",))


@pytest.mark.parametrize("zero", ["head", "branch"])
def test_a_gradient_that_a_weight_of_zero_hides(zero: str) -> None:
    """Rules hold in front of a weight that is still zero; the layers behind it are not left to the slow route."""
    torch.manual_seed(0)
    parts = {"inner": nn.Linear(4, 4), "scale": nn.Parameter(torch.ones(4)), "head": nn.Linear(4, CLASSES)}
    network = Net(lambda net, x: net.head(x + torch.tanh(net.inner(x)) * net.scale), **parts)
    nn.init.zeros_(network.head.weight if zero == "head" else network.scale)
    hidden = ("inner.weight", "inner.bias", *(("scale",) if zero == "head" else ()))
    x = torch.randn(4, 4)
    assert_exact(network, x, zero=hidden)
    assert fisher_sums(network, [x.double()]).passes == 4 * (1 + 2 * CLASSES)


def test_a_new_head_behind_a_normalisation() -> None:
    """Its zeros replaced by ones, the head gave a gradient that the normalisation cancels, but for rounding."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, CLASSES)
    network, x = nn.Sequential(*layers).double(), torch.tensor([[1.0, 0, 0, 0]] * 3).double()
    nn.init.zeros_(layers[2].weight)
    layers[0].weight.data[:] = torch.tensor([1.0, -1] * 4)[:, None]
    nn.init.zeros_(layers[0].bias)
    assert fisher_sums(network, [x]).passes == 3 * (1 + 2 * CLASSES)


class Masked(nn.Module):
    """Self-attention under a mask, with padding or without."""

    def __init__(self, mask: Tensor | None, padded: bool, weights: bool, causal: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head, self.padded, self.weights, self.causal = nn.Linear(4, CLASSES), padded, weights, causal
        self.register_buffer("mask", mask)
        self.later = torch.arange(5) > 0
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5, 4]
        mask = self.mask if self.mask is None or self.mask.ndim == 2 else self.mask.repeat(len(x), 1, 1)
        padding = (x[..., 0] - 1).relu().bool() & self.later if self.padded else None
        y, weights = self.attention(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=self.weights, is_causal=self.causal
        )
        return self.head(y.sin().mean(1)) + (weights.sin().mean((1, 2))[:, None] if self.weights else 0)


CAUSAL = torch.ones(5, 5).triu(1).bool()
MASKS = {
    "none": None,
    "bool": CAUSAL,
    "float": torch.zeros(5, 5).masked_fill(CAUSAL, -torch.inf),
    "bias": torch.arange(25.0).view(5, 5).sin(),
    "heads": torch.stack([CAUSAL, CAUSAL.T]),
    "biased heads": torch.arange(50.0).view(2, 5, 5).sin(),
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention(name: str, padded: bool, weights: bool) -> None:
    torch.manual_seed(0)
    causal = MASKS[name] is CAUSAL  # the hint that torch takes
    network, x = Masked(MASKS[name], padded, weights, causal).double().eval(), torch.randn(4, 5, 4).double()
    assert_exact(network, x, absolute=1e-18)
    assert_attention_is_covered(network, x)


class LeftPadded(nn.Module):
    """Causal self-attention with the padding on the left, whose rows see nothing."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, CLASSES)
        self.register_buffer("mask", CAUSAL)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5, 4]
        padding = x[..., 0] > 9
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attention(x, x, x, attn_mask=self.mask, key_padding_mask=padding, need_weights=False)
        return self.head(y[:, -1] if self.attention.batch_first else y[-1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_rows_that_are_wholly_masked_are_zeros_as_torch_has_them(batch_first: bool) -> None:
    torch.manual_seed(0)
    network, x = LeftPadded(batch_first).double().eval(), torch.randn(4, 5, 4).double()
    x[0, :2, 0] = 10
    x[3] = 10
    expected = network(x)
    assert expected.isfinite().all()
    with Interceptor(dict(network.named_parameters()), lambda call, names, function: function()):
        torch.testing.assert_close(network(x), expected)
    assert_exact(network, x, absolute=1e-18)


def assert_attention_is_covered(network: Masked, x: Tensor) -> None:
    assert fisher_sums(network, [x]).passes == len(x) * (1 + 2 * CLASSES)
    sums = gram_sums(network, [x])
    assert sums.values.keys() == {"attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
    mixed: list[Tensor] = []

    def remember(module: nn.Module, args: object, output: tuple[Tensor, Tensor | None]) -> None:
        mixed.append(output[0])

    handle = network.attention.register_forward_hook(remember)
    network(x)
    handle.remove()
    # The projection is square: its input follows from the attention's output, as torch computes it.
    projection = network.attention.out_proj
    a = torch.linalg.solve(projection.weight, (mixed[0] - projection.bias).detach().flatten(0, 1).T).T
    a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    found, expected = sums.values["attention.out_proj.weight"], (a.T @ a)[None].detach()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_general_route_is_counted() -> None:
    """A network of which one parameter has no rule pays for it: a forward and C backward passes a sample once more."""
    torch.manual_seed(0)
    parts = {"head": nn.Linear(4, CLASSES), "power": nn.Parameter(torch.ones(4))}
    network, x = Net(lambda net, x: net.head(x.abs() ** net.power), **parts), torch.randn(5, 4)
    assert fisher_sums(network, [x]).passes == 2 * 5 * (1 + 2 * CLASSES)
    network.head.requires_grad_(False)  # nothing is left for the rules: their backward passes are not run
    assert fisher_sums(network, [x]).passes == 5 * (1 + 1 + 2 * CLASSES)
    network.power.requires_grad_(False)
    network.head.requires_grad_(True)
    assert fisher_sums(network, [x]).passes == 5 * (1 + 2 * CLASSES)


@pytest.mark.parametrize("layer", ["convolution", "pointwise", "grouped", "linear"])
def test_contributions_that_cancel_are_never_negative(layer: str) -> None:
    """A map of which the inputs at a sample's positions add up to zero, under one and the same cotangent."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "convolution": lambda: nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular", bias=False),
        "pointwise": lambda: nn.Conv2d(2, 8, 1, bias=False),
        "grouped": lambda: nn.Conv2d(2, 8, 1, groups=2, bias=False),
        "linear": lambda: nn.Linear(2, 8, bias=False),
    }
    for seed in range(5):
        torch.manual_seed(seed)
        network = nn.Sequential(layers[layer](), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))
        x = torch.randn(3, 2, 3, 3)
        x -= x.mean((2, 3), keepdim=True)
        if layer == "linear":
            x = x.flatten(2).mT
            network[1] = nn.Identity()
            network[2] = nn.Sequential(Net(lambda net, x: x.mT), nn.AdaptiveAvgPool1d(1))
        for name, value in fisher_diagonal(network, [x]).items():
            assert value.min() >= 0, f"{name} at seed {seed}: {value.min():.1e}"


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_of_one_in_front_of_tokens(normed: bool, frozen: bool) -> None:
    """A patch embedding, a BatchNorm, and tokens: PyTorch's backward of one sample is wrong there, of two right."""

    def call(net: Net, x: Tensor) -> Tensor:
        tokens = net.norm(net.embedding(x)).flatten(2).transpose(1, 2)
        return net.head(tokens.tanh().mean(1))

    torch.manual_seed(0)
    embedding: nn.Module = nn.Conv2d(2, 4, 2, 2)
    embedding = nn.utils.parametrizations.weight_norm(embedding) if normed else embedding
    network = Net(call, embedding=embedding, norm=nn.BatchNorm2d(4), head=nn.Linear(4, CLASSES)).double().eval()
    for values in (network.norm.running_mean, network.norm.weight.data):
        values.normal_()
    network.norm.requires_grad_(not frozen)
    x = torch.randn(3, 2, 6, 6).double()
    expected = dense_loop(network, x, copies=2)
    for pieces in ([x], x.split(1)):
        found = fisher_diagonal(network, pieces)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14, msg=name)


MIXTURES = {  # what a sample's neighbours in the batch add
    "the mean": lambda h: -0.5 * h.mean(0),
    "the one before": lambda h: torch.cat([torch.zeros_like(h[:1]), h[:-1]]),
    "the one after": lambda h: torch.cat([h[1:], torch.zeros_like(h[:1])]),
    "all before": lambda h: h.cumsum(0),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_network_that_mixes_samples_is_refused(mixture: str) -> None:
    """Its cotangents and gradients were once of different passes, 17 % off."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Tanh(), nn.Linear(5, CLASSES))
    network = Net(lambda n, x: n.tail((h := n.first(x)) + MIXTURES[mixture](h)), first=nn.Linear(4, 5), tail=tail)
    with pytest.raises(StateError, match="Net gives a sample other outputs beside others than alone"):
        fisher_diagonal(network, [torch.randn(6, 4)])
    assert fisher_diagonal(network, torch.randn(6, 4).split(1))


class Dispatched(nn.Module):
    """Tokens are sent to the expert that a gate prefers, by products with a one-hot choice: nothing is indexed."""

    def __init__(self, choose: Callable[[Tensor], Tensor], number: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(4, number, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(number))
        self.choose, self.head = choose, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        rows = x.flatten(0, 1)
        chosen = self.choose(self.gate(rows))  # [B·T, experts]
        place = chosen * chosen.cumsum(0) - 1  # where a row stands in its expert's queue
        slots = (place[..., None] == torch.arange(len(rows))).to(rows)  # [B·T, experts, slots]
        sent = torch.einsum("res,rd->esd", slots, rows)
        made = torch.stack([torch.tanh(expert(own)) for expert, own in zip(self.experts, sent, strict=True)])
        return self.head(torch.einsum("res,esd->rd", slots, made).view(len(x), -1, 5).mean(1))


CHOICES = {
    "one_hot": lambda gates: F.one_hot(gates.argmax(-1), 2).to(gates),
    "equal to the largest": lambda gates: (gates == gates.amax(-1, keepdim=True)).to(gates),
    "above zero": lambda gates: torch.stack([gates[:, 0] > 0, gates[:, 0] <= 0], 1).to(gates),
    "a straight-through softmax": lambda gates: gates.softmax(-1).round(),
    "a step": lambda gates: torch.stack([gates[:, 0].sign() + 1, 1 - gates[:, 0].sign()], 1) / 2,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_hard_dispatch_by_products(choice: str, seed: int) -> None:
    """An expert's Fisher was 20 % off in one of four seeds: two copies of a sample said where all others' rows lie."""
    torch.manual_seed(seed)
    assert_exact(Dispatched(CHOICES[choice]), torch.randn(5, 3, 4), zero=("gate.weight",))


def test_a_backward_pass_that_cannot_be_batched_with_channels_last() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    torch.manual_seed(0)
    assert_exact(nn.Sequential(*layers, nn.Linear(4, CLASSES)), torch.randn(5, 3, 8, 8), absolute=1e-12)


class ByNumpy(torch.autograd.Function):
    """The square, whose backward pass reads values: it cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * gradient.numpy())


class Squared(nn.Module):
    def forward(self, x):
        return ByNumpy.apply(x)


def test_a_backward_pass_that_cannot_be_batched() -> None:
    torch.manual_seed(0)
    assert_exact(nn.Sequential(nn.Linear(4, 5), Squared(), nn.Linear(5, CLASSES)), torch.randn(6, 4))


PICKED = {
    "by a mask": lambda rows, n: rows[torch.arange(5) < n[:, None]],
    "repeated": lambda rows, n: torch.repeat_interleave(rows[:, 0], n, 0),
    "cut": lambda rows, n: torch.cat([each[:k] for each, k in zip(rows, n, strict=True)]),
}


@pytest.mark.parametrize("form", PICKED)
def test_samples_of_unequal_numbers_of_rows(form: str) -> None:
    """Two copies of the first sample told nothing of the others: 27 to 39 % off."""

    def call(net: Net, x: Tensor) -> Tensor:
        n = x[:, 0, 0].long()
        made = torch.tanh(net.rows(PICKED[form](x[..., 1:], n))).split(n.tolist())
        return net.head(torch.stack([each.mean(0) for each in made]))

    torch.manual_seed(0)
    x = torch.randn(3, 5, 5)
    x[:, :, 0] = torch.tensor([3.0, 2, 4])[:, None]
    assert_exact(Net(call, rows=nn.Linear(4, 5), head=nn.Linear(5, CLASSES)), x)
