"""A pass leaves the caller's network as found and works under whatever context the caller runs in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coin.statistics import fisher_diagonal, gram_sums


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)
    return nn.Sequential(*layers)


def passes(network: nn.Module, inputs: Tensor) -> dict[str, Callable[[], object]]:
    return {
        "fisher": lambda: fisher_diagonal(network, [inputs]),
        "gram": lambda: gram_sums(network, [inputs]),
    }


@pytest.mark.parametrize("name", ["fisher", "gram"])
def test_everything_is_left_as_found(network: nn.Module, name: str) -> None:
    inputs = torch.randn(3, 2, 4, 4)
    kept = inputs.clone()
    network.train()
    network[1].eval()  # modes differ between modules
    network[4].bias.requires_grad_(name != "fisher")
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    attributes = [set(vars(module)) for module in network.modules()]
    hooks = [len(module._forward_hooks) for module in network.modules()]

    passes(network, inputs)[name]()

    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(bool((p.grad == 1).all()) for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [set(vars(module)) for module in network.modules()] == attributes
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert torch.equal(inputs, kept)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_mode_is_restored_after_an_error(network: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        fisher_diagonal(network, [torch.randn(3, 7, 4, 4)])
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["fisher", "gram"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_under_a_callers_context(network: nn.Module, name: str, context: type) -> None:
    inputs = torch.randn(3, 2, 4, 4)

    def flat(value: object) -> Tensor:
        value = getattr(value, "values", value) if not isinstance(value, (Tensor, dict)) else value
        return torch.cat([v.flatten() for v in value.values()]) if isinstance(value, dict) else value

    expected = flat(passes(network, inputs)[name]())
    with context():
        found = flat(passes(network, inputs.clone())[name]())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["fisher", "gram"])
def test_products_are_in_full_precision_inside_and_as_before_outside(name: str) -> None:
    seen: set[tuple[bool, str]] = set()

    def flags() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(flags())
            return super().forward(x)

    network = nn.Sequential(nn.Flatten(), Watched(32, 2))
    before = flags()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        passes(network, torch.randn(3, 2, 4, 4))[name]()
        assert flags() == (True, "medium")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == {(False, "highest")}


def test_autocast_of_the_caller_is_suspended(network: nn.Module) -> None:
    inputs = torch.randn(3, 2, 4, 4)
    expected = fisher_diagonal(network, [inputs])
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_diagonal(network, [inputs])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
