"""The layer rules one by one, and what must not be ruled: tied weights, modules called twice, odd layouts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Net, assert_exact, dense_loop, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coin.errors import ConfigurationError, DataError
from coin.statistics import fisher_diagonal
from coin.statistics.fisher import FisherOptions, _Pass
from coin.statistics.rules import linear


class Pooled(nn.Module):
    """Layers, then the mean over positions, then a head."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(x)).flatten(2).mean(-1))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 4, 4)),
    "strided and padded": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1)), (4, 5, 4)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (4, 6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (4, 6, 6)),
    "depthwise, large map": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 9, 9)),
    "depthwise, strided": (lambda: nn.Conv2d(6, 6, (3, 5), groups=6, padding=(1, 2), stride=2), (6, 15, 10)),
    "depthwise, one dimension": (lambda: nn.Conv1d(6, 6, 5, groups=6, padding=2, stride=3), (6, 100)),
    "depthwise, three dimensions": (lambda: nn.Conv3d(6, 6, 2, groups=6, padding=(1, 0, 0)), (6, 2, 5, 4)),
    "depthwise, two outputs a channel": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 9, 9)),
    "depthwise, small map": (lambda: nn.Conv2d(6, 6, 5, groups=6, padding=2), (6, 2, 2)),
    "large map": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 12, 11)),
    "pointwise, strided": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3)), (4, 5, 6)),
    "pointwise, padded": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1), (4, 3, 3)),
    "to one position": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 2, 2)),
    "to one position, all of the map": (lambda: nn.Conv2d(4, 6, (2, 3)), (4, 2, 3)),
    "1×1 map": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 1, 1)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 5, 5)),
    "same, uneven": (lambda: nn.Conv2d(4, 6, 2, padding="same"), (4, 5, 5)),
    "same, uneven, dilated": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (4, 40)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (4, 9)),
    "one dimension, long": (lambda: nn.Conv1d(4, 6, 5, dilation=2, groups=2), (4, 70)),
    "three dimensions": (lambda: nn.Conv3d(4, 6, 2, padding=1), (4, 3, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    assert_exact(Pooled(make(), width=6), torch.randn(5, *shape))
    first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1](shape[0], shape[0], 1)
    # Behind another layer its gradient by the input counts as well.
    assert_exact(Pooled(first, nn.Tanh(), make(), width=6), torch.randn(5, *shape))


class Folded(nn.Module):
    """A layer that sees a sample's rows side by side in the leading dimension, [B·k, …]."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(outputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, k, …]
        y = torch.tanh(self.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.head((y * torch.arange(1, x.shape[1] + 1).view(-1, *[1] * (y.ndim - 2))).sum(1).flatten(1))


class Scaled(nn.Module):
    """A parameter that is multiplied with activations, and one that is added."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.scale) + self.shift


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(4, 5), (4,), 5),
    "linear at positions": (lambda: nn.Linear(4, 5), (3, 4), 15),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (4, 4, 4), 24),
    "convolution to one position": (lambda: nn.Conv2d(4, 6, (2, 3)), (4, 2, 3), 6),
    "depthwise convolution": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1), (4, 4, 4), 16),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (4, 4, 4), 24),
    "three dimensions": (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 3, 2, 3), 16),
    "batch norm": (lambda: nn.BatchNorm2d(4), (4, 2, 2), 16),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), 12),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 2, 2), 16),
    "scale and shift": (lambda: Scaled(4), (3, 4), 12),
    "scale and shift of positions": (lambda: Scaled(1, 3, 1), (3, 4), 12),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_sample_of_several_rows(name: str, rows: int) -> None:
    torch.manual_seed(0)
    make, shape, outputs = FOLDED[name]
    assert_exact(Folded(make(), outputs), torch.randn(4, rows, *shape))
    # Behind another layer its gradient by the input counts as well.
    first = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh())
    assert_exact(Folded(nn.Sequential(first, make()), outputs), torch.randn(4, rows, *shape))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tokens_of_a_sample_in_several_rows(rows: int) -> None:
    torch.manual_seed(0)
    assert_exact(Folded(nn.Embedding(3, 4), 20), torch.randint(0, 3, (4, rows, 5)))


@pytest.mark.parametrize("block", [1, 20, 100, 500])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_larger_than_a_block(block: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of one number, of some outputs, of one gradient and of several."""
    monkeypatch.setattr(linear, "BLOCK", block)
    monkeypatch.setattr(linear, "CACHED", block)
    layers = nn.Conv2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6, padding=1)
    assert_exact(Pooled(*layers, nn.Conv2d(6, 6, 1), width=6), torch.randn(3, 4, 12, 11))


@pytest.mark.parametrize("positions", [(), (1,), (5,), (3, 4), (80,)])
def test_linear_at_positions(positions: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(4, 5), "norm": nn.LayerNorm(5), "head": nn.Linear(5, CLASSES)}
    network = Net(lambda n, x: n.head(torch.tanh(n.norm(n.first(x))).reshape(len(x), -1, 5).mean(1)), **parts)
    assert_exact(network, torch.randn(3, *positions, 4))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.GroupNorm(1, 6), nn.LayerNorm([6, 4, 4])])
def test_normalisation_with_a_zero_weight(norm: nn.Module) -> None:
    torch.manual_seed(0)
    norm.weight.data.normal_()
    norm.weight.data.view(-1)[1] = 0
    norm.bias.data.normal_()
    if isinstance(norm, nn.BatchNorm2d):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    assert_exact(Pooled(nn.Conv2d(4, 6, 1), norm, width=6), torch.randn(3, 4, 4, 4))


class Tokens(nn.Module):
    """Embeds tokens."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4, padding_idx=padding)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES, bias=False)
        nn.init.normal_(self.embed.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


@pytest.mark.parametrize("padding", [None, 1])
def test_embedding(padding: int | None) -> None:
    torch.manual_seed(0)
    assert_exact(Tokens(padding), torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 1], [0, 1, 2, 1, 2]]))


class Twice(nn.Module):
    """One module called twice, and its weight used once more outside."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.same, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.same(x)))
        if not self.outside:
            x = torch.tanh(self.norm(self.same(x)))
        return self.head(x) + (x @ self.same.weight.T)[:, :CLASSES] + self.norm.bias[:CLASSES].sin()


@pytest.mark.parametrize("outside", [False, True])
def test_a_module_called_twice_or_used_outside(outside: bool) -> None:
    torch.manual_seed(0)
    assert_exact(Twice(outside), torch.randn(4, 4))


class Layouts(nn.Module):
    """Linear layers whose leading dimension is not the samples': only their order tells."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 4]
        b = len(x)
        x = torch.cat([self.token.expand(b, -1, -1), x * self.scale + self.shift], 1)
        if self.layout == "positions first":
            y = self.first(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "positions first, flat":
            y = self.first(x.transpose(0, 1).reshape(-1, 4)).view(-1, b, 4).transpose(0, 1)
        elif self.layout == "flat":
            y = self.first(x.reshape(-1, 4)).view(b, -1, 4)
        else:
            y = self.first(x)
        return self.head(torch.tanh(y).mean(1))


@pytest.mark.parametrize("layout", ["samples first", "flat", "positions first", "positions first, flat"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_layouts(layout: str, samples: int) -> None:
    torch.manual_seed(samples)
    assert_exact(Layouts(layout), torch.randn(samples, 3, 4))


def test_attention_to_other_tokens() -> None:
    def call(net: Net, x: Tensor) -> Tensor:
        y, weights = net.attention(x, x.tanh(), x.tanh())
        return net.head(y.sin().mean(1)) + weights.sin().mean((1, 2))[:, None]

    torch.manual_seed(0)
    network = Net(call, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, CLASSES))
    nn.init.normal_(network.attention.in_proj_bias)
    # A key's bias shifts all scores alike, so its exact gradient is zero: it is compared absolutely.
    assert_exact(network, torch.randn(3, 5, 4), absolute=1e-18)


def test_a_network_whose_views_hold_in_the_usual_order_of_memory_alone() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Tanh())
    network = Net(lambda n, x: n.head(n.layers(x).view(len(x), -1)), layers=layers, head=nn.Linear(54, CLASSES))
    inputs = torch.randn(3, 4, 5, 5)
    with pytest.raises(RuntimeError, match="view"):
        network(inputs.to(memory_format=torch.channels_last))
    assert_exact(network, inputs)


def test_after_the_first_batch_nothing_waits_for_the_device() -> None:
    class Waits(TorchDispatchMode):
        """Counts what makes a processor wait for an accelerator: values read, and copies between devices."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            self.count += func is torch.ops.aten._to_copy.default and "device" in (kwargs or {})
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    network = Pooled(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 6, 3, groups=6), width=6)
    fisher = _Pass(network, FisherOptions(), None)
    counts = []
    for _ in range(3):
        with Waits() as waits:
            fisher.add(torch.randn(3, 4, 9, 9))
        counts.append(waits.count)
    assert counts[0] > counts[1] == counts[2] == 0


def call_without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.first(x)
    return net.head(F.relu(h))


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    # (the network, the shape of its inputs, what has no Fisher); a fresh BatchNorm is right for single samples alone
    "a BatchNorm without running statistics": (
        lambda: Pooled(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), width=6), (1, 4, 4, 4), ()
    ),
    "functions in place on maps": (
        lambda: Pooled(nn.Conv2d(4, 6, 3), nn.ReLU(True), nn.BatchNorm2d(6), nn.Hardswish(True), width=6),
        (3, 4, 6, 6), (),
    ),
    "functions in place at positions": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(True), nn.Flatten(1, 2), nn.Flatten(), nn.Linear(18, CLASSES)),
        (3, 3, 4), (),
    ),
    "parts without gradient": (
        lambda: Net(call_without_gradients, first=nn.Linear(4, 4), head=nn.Linear(4, CLASSES)),
        (3, 4), ("first.weight", "first.bias"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_network_of_odd_parts(name: str) -> None:
    torch.manual_seed(0)
    make, shape, zero = ODD[name]
    assert_exact(make(), torch.randn(shape), zero=zero)


def test_a_token_may_be_changed_in_place_once_it_is_expanded_but_the_parameter_stays() -> None:
    def call(net: Net, x: Tensor) -> Tensor:
        token = net.token.expand(len(x), -1)
        # Only what is no view of the parameter could be written to.
        return net.head(torch.tanh(token + x if token._is_view() else token.add_(x)))

    torch.manual_seed(0)
    network = Net(call, token=random(1, 4), head=nn.Linear(4, CLASSES))
    assert_exact(network, torch.randn(3, 4))
    before = network.token.clone()
    fisher_diagonal(network, [torch.randn(3, 4).double()])
    assert torch.equal(network.token, before)


def test_unused_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    network[0].weight.requires_grad_(False)
    found = fisher_diagonal(network, [torch.randn(3, 4)])
    assert found.keys() == {"unused", "0.bias", "2.weight", "2.bias"}
    assert not found["unused"].any()
    assert_exact(network, torch.randn(3, 4), zero=("unused",))


def call_that_overwrites(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    y = net.head(h)
    h.mul_(2)
    return y


@pytest.mark.parametrize(
    ("make", "shape", "error", "message"),
    [
        (lambda: nn.Linear(4, CLASSES), (2, 4, 4), DataError, r"\[2, 4, 3\].*expected logits \[2, C\]"),
        (nn.Flatten, (2, 4), ConfigurationError, "no floating-point parameters in Flatten"),
        (
            lambda: Net(call_that_overwrites, first=nn.Linear(4, 4), head=nn.Linear(4, CLASSES)),
            (2, 4), RuntimeError, "modified by an inplace operation",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(make: Any, shape: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fisher_diagonal(make(), [torch.randn(shape)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FOLDED)
def test_sixteen_bits_are_squared_and_summed_in_full_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape, outputs = FOLDED[name]
    network, inputs = Folded(make(), outputs).to(dtype), torch.randn(40, 2, *shape).to(dtype)
    found = fisher_diagonal(network, list(inputs.split(1)))
    # The passes themselves are rounded, each sample's by itself; the sums over samples are not.
    expected = dense_loop(network.double(), inputs.double())
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        error = (found[key].double() - value).norm() / value.norm()
        assert error < 8 * torch.finfo(dtype).eps, key


def test_sums_in_sixteen_bits_neither_stall_nor_overflow() -> None:
    network = nn.Linear(2, CLASSES).bfloat16()
    found = fisher_diagonal(network, [torch.ones(1, 2)] * 300)
    assert torch.equal(found["weight"], torch.ones(CLASSES, 2)), "bfloat16 counts to 256"
    network = nn.Linear(2, CLASSES).half()
    found = fisher_diagonal(network, [torch.full((4, 2), 300.0)])
    assert torch.equal(found["weight"], torch.full((CLASSES, 2), 9e4)), "float16 ends at 65504"
