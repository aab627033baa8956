"""Monte Carlo and categorical Fisher diagonals, and the options that belong to them."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coin.errors import ConfigurationError, DataError, StateError
from coin.statistics import FisherKind, fisher_diagonal, fisher_sums

CLASSES = 4


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, CLASSES)
    return nn.Sequential(*layers).double()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def squares(network: nn.Module, scalar: Tensor) -> Tensor:
    gradients = torch.autograd.grad(scalar, list(network.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]) ** 2


def test_categorical_equals_its_loop(network: nn.Module, inputs: Tensor) -> None:
    expected = torch.zeros(())
    for x in inputs:
        log_p = network(x[None])[0].log_softmax(0)
        expected = expected + sum(log_p[c].exp().detach() * squares(network, log_p[c]) for c in range(CLASSES))
    found = flat(fisher_diagonal(network, [inputs], kind=FisherKind.categorical))
    torch.testing.assert_close(found, expected / 5, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("seed", [0, 1])
def test_monte_carlo_with_all_classes_is_exact(network: nn.Module, inputs: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = fisher_diagonal(network, [inputs], kind=FisherKind.monte_carlo, mc_samples=CLASSES, generator=generator)
    torch.testing.assert_close(flat(found), flat(fisher_diagonal(network, [inputs])), rtol=1e-10, atol=1e-15)


def test_monte_carlo_is_unbiased_and_its_error_falls(network: nn.Module, inputs: Tensor) -> None:
    """Over n draws the mean's error is 1/√n of one draw's; twice as many cotangents at least halve the variance."""
    exact = flat(fisher_diagonal(network, [inputs]))
    generator = torch.Generator().manual_seed(2)
    draws = 150
    errors = {}
    for k in (1, 2):
        options = {"kind": FisherKind.monte_carlo, "mc_samples": k, "generator": generator}
        found = torch.stack([flat(fisher_diagonal(network, [inputs], **options)) for _ in range(draws)])
        errors[k] = (found - exact).square().sum(1).mean()
        bias = (found.mean(0) - exact).square().sum()
        # E bias² = errors / draws; its spread is within a few times that.
        assert bias < 5 * errors[k] / draws
    assert errors[1] > 1e-3 * exact.square().sum()
    # Independent draws would halve the variance; orthogonal ones leave (C − k)/(k (C − 1)) for Gaussian-like rows.
    assert errors[2] < 0.65 * errors[1]


def test_monte_carlo_does_not_depend_on_batch_sizes(network: nn.Module, inputs: Tensor) -> None:
    def run(sizes: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        found = fisher_diagonal(network, inputs.split(sizes), kind="monte_carlo", mc_samples=2, generator=generator)
        return flat(found)

    torch.testing.assert_close(run([5]), run([1, 3, 1]), rtol=1e-12, atol=1e-15)


def test_passes_count_forward_equivalents(network: nn.Module, inputs: Tensor) -> None:
    assert fisher_sums(network, [inputs]).passes == 5 * (1 + 2 * CLASSES)
    assert fisher_sums(network, [inputs], kind=FisherKind.monte_carlo, mc_samples=2).passes == 5 * (1 + 2 * 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mc_samples": 2}, ConfigurationError, "only monte_carlo"),
        ({"kind": "monte_carlo", "mc_samples": 0}, ConfigurationError, "mc_samples=0"),
        ({"kind": "monte_carlo", "mc_samples": 5}, ConfigurationError, "at most 4"),
        ({"memory_mib": 0}, ConfigurationError, "memory_mib=0"),
        ({"kind": "hessian"}, ValueError, "hessian"),
    ],
)
def test_bad_options(network: nn.Module, inputs: Tensor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fisher_diagonal(network, [inputs], **options)


def test_no_samples_or_none_that_is_finite(network: nn.Module, inputs: Tensor) -> None:
    with pytest.raises(StateError, match=r"the Fisher is not finite: tensor '0\.weight' holds a NaN"):
        fisher_diagonal(network, [inputs * torch.nan])
    for fisher in (fisher_diagonal, fisher_sums):
        with pytest.raises(DataError, match="found no calibration samples, expected at least one batch; raise"):
            fisher(network, [])


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("kind", [FisherKind.exact, FisherKind.categorical])
def test_many_outputs_are_within_the_memory_too(kind: FisherKind) -> None:
    """All cotangents of one sample take 2.75 MiB here."""
    torch.manual_seed(0)
    network, inputs = nn.Linear(5, 600).double(), torch.randn(3, 5).double()
    whole = fisher_diagonal(network, [inputs], kind=kind)
    with Largest() as seen:
        found = fisher_diagonal(network, [inputs], kind=kind, memory_mib=1)
    assert seen.nbytes <= 2**20
    torch.testing.assert_close(flat(found), flat(whole), rtol=1e-10, atol=1e-15)
