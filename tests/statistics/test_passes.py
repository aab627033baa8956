"""What a pass costs, takes, refuses and leaves as found."""

import gc
import weakref

import pytest
import torch
from dense import CLASSES, assert_close, build, fisher_by_autograd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coin.errors import ConfigurationError, DataError, StateError
from coin.networks.small import SmallViT
from coin.statistics import fisher_diagonal, fisher_sums, gram_sums


@pytest.fixture
def network():
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12, CLASSES))


@pytest.fixture
def inputs():
    return torch.randn(5, 2, 4, 4)


def fisher(network, inputs):
    return fisher_diagonal(network, [inputs])


def gram(network, inputs):
    return gram_sums(network, [inputs]).values


PASSES = pytest.mark.parametrize("run", [fisher, gram])


def observed(network, inputs):
    """What a caller can see of a network, its inputs and torch."""
    tensors = {**network.state_dict(), "inputs": inputs}
    parameters = list(network.parameters())
    modules = list(network.modules())
    return {
        "values": {name: tensor.tolist() for name, tensor in tensors.items()},
        "gradients": [parameter.grad.tolist() for parameter in parameters],
        "flags": [parameter.requires_grad for parameter in parameters],
        "modes": [module.training for module in modules],
        "attributes": [set(vars(module)) for module in modules],
        "hooks": [len(module._forward_hooks) for module in modules],
        "torch": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


@PASSES
@pytest.mark.parametrize("trained", [True, False])
def test_everything_is_left_as_found(network, inputs, run, trained):
    network.train()
    network[1].eval()  # modes differ between modules
    network.requires_grad_(trained)
    network[4].bias.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = observed(network, inputs)
    run(network, inputs)
    assert observed(network, inputs) == before


def test_modes_are_restored_after_an_error(network):
    with pytest.raises(RuntimeError):
        fisher(network, torch.randn(3, 7, 4, 4))
    assert all(module.training for module in network.modules())


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
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def precision():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@PASSES
def test_products_are_in_full_precision_inside_and_as_before_outside(
    network, inputs, run, monkeypatch
):
    seen = []
    network[3].register_forward_hook(lambda *_: seen.append(precision()))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    run(network, inputs)
    after = precision()
    torch.set_float32_matmul_precision(before)
    assert set(seen) == {(False, "highest")}
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
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(each.untyped_storage().nbytes() for each in tensors)])
        return made


def test_after_the_first_batch_nothing_waits_for_the_device():
    layers = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 6, 3, groups=6)
    waits = []

    def batches():
        for _ in range(3):
            waits.append(watched.waits)
            yield torch.randn(3, 4, 9, 9)

    with Watched() as watched:
        fisher_sums(nn.Sequential(*layers, nn.Flatten(), nn.Linear(150, CLASSES)), batches())
    assert waits[0] < waits[1] == waits[2] == watched.waits


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_many_outputs_are_within_the_memory_too(kind):
    """All cotangents of one sample take 2.75 MiB here."""
    network = nn.Linear(5, 600).double()
    inputs = torch.randn(3, 5).double()
    with Watched() as watched:
        found = fisher_diagonal(network, [inputs], kind=kind, memory_mib=1)
    assert watched.nbytes <= 2**20
    assert_close(found, fisher_diagonal(network, [inputs], kind=kind))


def test_parameters_without_a_rule_cost_as_much_again():
    by_rules = 5 * (1 + 2 * CLASSES)
    network, inputs = build(lambda x, scale: x.abs() ** scale, 5, 4)
    assert fisher_sums(network, [inputs]).passes == 2 * by_rules
    network.head.requires_grad_(False)  # the rules' backward passes are not run
    assert fisher_sums(network, [inputs]).passes == 5 + by_rules


def test_a_complex_parameter_has_no_statistic(network, inputs):
    network.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    assert "phase" not in fisher(network, inputs)


def test_a_batch_of_one_in_front_of_tokens():
    """A patch embedding, a BatchNorm, and tokens: PyTorch's backward of one sample is wrong there, of two right."""

    def call(x, conv, batch_norm):
        tokens = batch_norm(conv(x)).flatten(2).mT
        return tokens.tanh().mean(1)

    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 2, 2))
    network, x = build(call, 3, 2, 6, 6, conv=conv)
    expected = fisher_by_autograd(network, x, copies=2)
    assert_close(fisher_diagonal(network, [x]), expected)
    assert_close(fisher_diagonal(network, x.split(1)), expected)


def previous(made):
    return torch.cat([torch.zeros_like(made[:1]), made[:-1]])


def following(made):
    return torch.cat([made[1:], torch.zeros_like(made[:1])])


@pytest.mark.parametrize("neighbours", [previous, following])
def test_a_network_that_mixes_samples_is_refused(neighbours):
    """Its cotangents and gradients were once of different passes, 17 % off."""

    def call(x, layer):
        made = layer(x)
        return torch.tanh(made + neighbours(made))

    network, x = build(call, 6, 4)
    with pytest.raises(StateError, match="Net gives a sample other outputs beside others"):
        fisher_diagonal(network, [x])
    assert fisher_diagonal(network, x.split(1))


def test_an_input_that_is_needed_may_not_be_overwritten():
    def call(x, layer, other):
        made = layer(x)
        mapped = other(made)
        made.mul_(2)
        return mapped

    network, x = build(call, 2, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fisher(network, x)


ANY = torch.ones(2, 4)
REFUSED = {
    "no logits": (
        nn.Linear(4, 3),
        [torch.ones(2, 2, 4)],
        DataError,
        r"\[2, 2, 3\].*expected logits \[2, C\]",
    ),
    "no tensor": (nn.LSTM(4, 3), [ANY], DataError, "output is tuple"),
    "no parameters": (nn.Flatten(), [ANY], ConfigurationError, "no floating-point parameters in"),
    "no samples": (nn.Linear(4, 3), [], DataError, "found no calibration samples"),
    "NaN": (nn.Linear(4, 3), [ANY * torch.nan], StateError, "the Fisher is not finite: tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    network, batches, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fisher_diagonal(network, batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mc_samples": 2}, "only monte_carlo"),
        ({"kind": "monte_carlo", "mc_samples": 0}, "mc_samples=0"),
        ({"kind": "monte_carlo", "mc_samples": 4}, "at most 3"),
        ({"memory_mib": 0}, "memory_mib=0"),
        ({"samples_per_task": 0}, "samples_per_task=0"),
        ({"kind": "hessian"}, "hessian"),
    ],
)
def test_which_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        fisher_diagonal(nn.Linear(4, 3), [ANY], **options)
