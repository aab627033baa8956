"""Jacobian products against the dense Jacobian."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torchvision.models.vision_transformer import VisionTransformer

from coin.errors import StateError
from coin.statistics import OutputMap, fisher_diagonal


def convolutional() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers)


def transformer() -> nn.Module:
    network = VisionTransformer(8, 4, 1, 2, 8, 8, num_classes=3)
    nn.init.normal_(network.heads.head.weight)
    return network


@pytest.fixture(params=[convolutional, transformer])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().double().train()


def dense(network: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """J [P, C, entries]."""
    network.eval()
    jacobian = jacrev(lambda values: functional_call(network, values, (x,)))(parameters)
    network.train()
    return torch.cat([jacobian[name].flatten(2) for name in parameters], -1)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def test_products_equal_the_dense_jacobian(network: nn.Module) -> None:
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    here = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in network.named_parameters()}  # not its own
    tangent = {name: torch.randn_like(p) for name, p in here.items()}
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    jacobian = dense(network, here, x)
    outputs = OutputMap(network, [x[:2], x[2:]])

    network.eval()
    torch.testing.assert_close(outputs.outputs(here), functional_call(network, here, (x,)))
    network.train()
    change = jacobian @ flat(tangent)
    torch.testing.assert_close(outputs.jvp(here, tangent), change)
    torch.testing.assert_close(flat(outputs.vjp(here, cotangent)), torch.einsum("pce,pc->e", jacobian, cotangent))
    product = torch.einsum("pce,pc->e", jacobian, change) / 5
    torch.testing.assert_close(flat(outputs.fisher_product(here, tangent)), product)


def test_the_fisher_diagonal_is_the_diagonal_of_the_product() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    diagonal, outputs = fisher_diagonal(network, [x]), OutputMap(network, [x])
    for name, p in parameters.items():
        for i in range(p.numel()):
            unit = {key: torch.zeros_like(value) for key, value in parameters.items()}
            unit[name].view(-1)[i] = 1
            found = outputs.fisher_product(parameters, unit)[name].view(-1)[i]
            torch.testing.assert_close(found, diagonal[name].view(-1)[i])


def test_some_parameters_only() -> None:
    torch.manual_seed(0)
    network = convolutional().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    some = {"4.bias": torch.ones(3, dtype=torch.float64)}
    torch.testing.assert_close(OutputMap(network, [x]).jvp(some, some), torch.ones(2, 3, dtype=torch.float64))


def test_mistakes_are_named() -> None:
    network = nn.Linear(3, 2)
    outputs, parameters = OutputMap(network, [torch.randn(4, 3)]), dict(network.named_parameters())
    with pytest.raises(StateError, match="'bias'"):
        outputs.jvp(parameters, {"weight": network.weight})
    for rows in (3, 5):
        with pytest.raises(StateError, match=f"{rows} rows for 4 inputs"):
            outputs.vjp(parameters, torch.ones(rows, 2))
    with pytest.raises(StateError, match="no inputs"):
        OutputMap(network, []).fisher_product(parameters, parameters)


def test_products_over_many_batches_do_not_stall_in_sixteen_bits() -> None:
    network = nn.Linear(2, 3, bias=False).bfloat16()
    outputs = OutputMap(network, [torch.ones(1, 2)] * 600)
    here = {"weight": network.weight.detach()}
    found = outputs.vjp(here, torch.ones(600, 3, dtype=torch.bfloat16))["weight"]
    assert torch.equal(found, torch.full((3, 2), 600, dtype=torch.bfloat16)), "bfloat16 counts to 256"
    product = outputs.fisher_product(here, {"weight": torch.ones(3, 2, dtype=torch.bfloat16)})["weight"]
    assert torch.equal(product, torch.full((3, 2), 2, dtype=torch.bfloat16))
