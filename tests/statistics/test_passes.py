"""What a pass costs, takes, refuses and leaves as found."""

import gc
import weakref

import pytest
import torch
from dense import CLASSES, Net, assert_close, fisher_by_autograd, random
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coin.errors import ConfigurationError, DataError, StateError
from coin.networks.small import SmallViT
from coin.statistics import fisher_diagonal, fisher_sums, gram_sums


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    return nn.Sequential(*layers)


@pytest.fixture
def inputs():
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def fisher(network, inputs):
    return fisher_diagonal(network, [inputs])


def gram(network, inputs):
    return dict(gram_sums(network, [inputs]).values)


PASSES = pytest.mark.parametrize("run", [fisher, gram])


@PASSES
@pytest.mark.parametrize("frozen", [False, True])
def test_everything_is_left_as_found(network, inputs, run, frozen):
    network.train()
    network[1].eval()  # modes differ between modules
    network[4].bias.requires_grad_(not frozen)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = observed(network, inputs)
    run(network, inputs)
    assert observed(network, inputs) == before


def observed(network, inputs):
    """What a caller can see of a network, its inputs and torch."""
    tensors = {**network.state_dict(), "inputs": inputs}
    parameters = list(network.parameters())
    return {
        "values": {name: tensor.tolist() for name, tensor in tensors.items()},
        "gradients": [parameter.grad.tolist() for parameter in parameters],
        "flags": [parameter.requires_grad for parameter in parameters],
        "modes": [module.training for module in network.modules()],
        "attributes": [set(vars(module)) for module in network.modules()],
        "hooks": [len(module._forward_hooks) for module in network.modules()],
        "torch": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


def test_modes_are_restored_after_an_error(network):
    with pytest.raises(RuntimeError):
        fisher(network, torch.randn(3, 7, 4, 4))
    assert all(module.training for module in network.modules())


def test_a_parameter_is_not_changed_in_place_with_the_token_that_it_is_expanded_to():
    def call(net, x):
        token = net.token.expand(len(x), -1)
        return net.head(token + x if token._is_view() else token.add_(x))

    network = Net(call, token=random(1, 4), head=nn.Linear(4, CLASSES))
    before = network.token.clone()
    fisher(network, torch.randn(3, 4))
    assert torch.equal(network.token, before)


CONTEXTS = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@PASSES
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_callers_context_changes_nothing(network, inputs, run, context):
    expected = run(network, inputs)
    with CONTEXTS[context]():
        found = run(network, inputs.clone())
    assert_close(found, expected, relative=1e-5, absolute=1e-6)


@PASSES
def test_products_are_in_full_precision_inside_and_as_before_outside(inputs, run, monkeypatch):
    def flags():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def call(net, x):
        seen.add(flags())
        return net.head(x.flatten(1))

    seen = set()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    run(Net(call, head=nn.Linear(32, CLASSES)), inputs)
    after = flags()
    torch.set_float32_matmul_precision(before)
    assert seen == {(False, "highest")}
    assert after == (True, "medium")


def test_nothing_of_a_pass_waits_for_the_garbage_collector():
    network = SmallViT(CLASSES, 32, 8, depth=2, heads=2, width=16, mlp_width=32)
    name = "heads.head.weight"
    parameter = weakref.ref(network.get_parameter(name))
    gc.disable()
    try:
        found = weakref.ref(fisher(network, torch.rand(2, 3, 32, 32))[name])
        del network
        assert parameter() is found() is None
    finally:
        gc.enable()


class Watched(TorchDispatchMode):
    """Counts what makes a processor wait for an accelerator, and notes the bytes of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.waits = 0
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        made = function(*args, **options)
        aten = torch.ops.aten
        reads_values = function in (aten._local_scalar_dense.default, aten.nonzero.default)
        changes_device = function is aten._to_copy.default and "device" in options
        self.waits += reads_values or changes_device
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


def test_after_the_first_batch_nothing_waits_for_the_device():
    layers = (
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Hardswish(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
    )
    waits = []

    def batches():
        for _ in range(4):
            waits.append(watched.waits)
            yield torch.randn(3, 4, 9, 9)

    with Watched() as watched:
        fisher_sums(nn.Sequential(*layers, nn.Linear(150, CLASSES)), batches())
    assert waits[0] < waits[1] == waits[2] == waits[3]


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_many_outputs_are_within_the_memory_too(kind):
    """All cotangents of one sample take 2.75 MiB here."""
    torch.manual_seed(0)
    network = nn.Linear(5, 600).double()
    inputs = torch.randn(3, 5).double()
    with Watched() as watched:
        found = fisher_diagonal(network, [inputs], kind=kind, memory_mib=1)
    assert watched.nbytes <= 2**20
    assert_close(found, fisher_diagonal(network, [inputs], kind=kind))


def test_parameters_without_a_rule_cost_as_much_again():
    by_rules = 5 * (1 + 2 * CLASSES)
    network = Net(
        lambda net, x: net.head(x.abs() ** net.power), head=nn.Linear(4, CLASSES), power=random(4)
    )
    inputs = torch.rand(5, 4)
    assert fisher_sums(network, [inputs]).passes == 2 * by_rules
    network.head.requires_grad_(
        False
    )  # nothing is left for the rules: their backward passes are not run
    assert fisher_sums(network, [inputs]).passes == 5 + by_rules


def test_a_complex_parameter_has_no_statistic():
    network = nn.Linear(4, CLASSES)
    network.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    assert fisher(network, torch.randn(2, 4)).keys() == {"weight", "bias"}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_of_one_in_front_of_tokens(normed, frozen):
    """A patch embedding, a BatchNorm, and tokens: PyTorch's backward of one sample is wrong there, of two right."""

    def call(net, x):
        tokens = net.norm(net.embedding(x)).flatten(2).mT
        return net.head(tokens.tanh().mean(1))

    torch.manual_seed(0)
    embedding = nn.Conv2d(2, 4, 2, 2)
    if normed:
        nn.utils.parametrizations.weight_norm(embedding)
    network = Net(call, embedding=embedding, norm=nn.BatchNorm2d(4), head=nn.Linear(4, CLASSES))
    for values in (network.norm.running_mean, network.norm.weight.data):
        values.normal_()
    network.norm.requires_grad_(not frozen)
    network.double().eval()
    x = torch.randn(3, 2, 6, 6).double()
    expected = fisher_by_autograd(network, x, copies=2)
    assert_close(fisher_diagonal(network, [x]), expected)
    assert_close(fisher_diagonal(network, x.split(1)), expected)


MIXTURES = {  # what a sample's neighbours in the batch add
    "the mean": lambda made: -0.5 * made.mean(0),
    "the one before": lambda made: torch.cat([torch.zeros_like(made[:1]), made[:-1]]),
    "the one after": lambda made: torch.cat([made[1:], torch.zeros_like(made[:1])]),
    "all before": lambda made: made.cumsum(0),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_network_that_mixes_samples_is_refused(mixture):
    """Its cotangents and gradients were once of different passes, 17 % off."""

    def call(net, x):
        made = net.first(x)
        mixed = made + MIXTURES[mixture](made)
        return net.head(mixed.tanh())

    network = Net(call, first=nn.Linear(4, 5), head=nn.Linear(5, CLASSES))
    with pytest.raises(
        StateError, match="Net gives a sample other outputs beside others than alone"
    ):
        fisher_diagonal(network, [torch.randn(6, 4)])
    assert fisher_diagonal(network, torch.randn(6, 4).split(1))


def overwrites(net, x):
    made = net.first(x)
    logits = net.head(made)
    made.mul_(2)
    return logits


ANY = torch.ones(2, 4)
REFUSED = {
    "no logits": (nn.Linear(4, 3), [torch.ones(2, 2, 4)], {}, DataError, r"\[2, 2, 3\].*expected logits \[2, C\]"),
    "no tensor": (Net(lambda net, x: (x, net.head), head=nn.Linear(4, 3)), [ANY], {}, DataError, "output is tuple"),
    "no parameters": (nn.Flatten(), [ANY], {}, ConfigurationError, "no floating-point parameters in Flatten"),
    "an input that is needed": (
        Net(overwrites, first=nn.Linear(4, 4), head=nn.Linear(4, CLASSES)),
        [ANY], {}, RuntimeError, "modified by an inplace operation",
    ),
    "no samples": (nn.Linear(4, 3), [], {}, DataError, "found no calibration samples, expected at least one batch"),
    "NaN": (nn.Linear(4, 3), [ANY * torch.nan], {}, StateError, "the Fisher is not finite: tensor 'weight' holds"),
    "k of exact": (nn.Linear(4, 3), [ANY], {"mc_samples": 2}, ConfigurationError, "only monte_carlo"),
    "k = 0": (nn.Linear(4, 3), [ANY], {"kind": "monte_carlo", "mc_samples": 0}, ConfigurationError, "mc_samples=0"),
    "k > C": (nn.Linear(4, 3), [ANY], {"kind": "monte_carlo", "mc_samples": 4}, ConfigurationError, "at most 3"),
    "memory": (nn.Linear(4, 3), [ANY], {"memory_mib": 0}, ConfigurationError, "memory_mib=0"),
    "samples": (nn.Linear(4, 3), [ANY], {"samples_per_task": 0}, ConfigurationError, "samples_per_task=0"),
    "kind": (nn.Linear(4, 3), [ANY], {"kind": "hessian"}, ValueError, "hessian"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    network, batches, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fisher_diagonal(network, batches, **options)
