"""Buffers that follow from parameters: what spectral normalisation keeps of its weight."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from coin.errors import StateError
from coin.files.tensors import State


@torch.no_grad()
def renormalise(network: nn.Module, experts: Sequence[State]) -> None:
    """Give a merged network's spectral norms the singular vectors of its own weights, in place.

    Spectral normalisation divides a weight by uᵀWv with the buffers u and v. Averages of the `experts`' buffers are the
    singular vectors of nothing; where all are equal they stay.

    Raises:
        StateError: Buffers of another parametrisation, as of `torch.nn.utils.parametrizations.orthogonal`, or masks of
            `torch.nn.utils.prune` differ between experts, so that their average means nothing.
    """
    known = set()
    for names, buffers, matrix in _spectral_norms(network):
        known.update(names)
        if _differ(experts, names):
            left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
            for buffer, vector in zip(buffers, (left[:, 0], right[0]), strict=True):
                buffer.copy_(vector)
    for name, module in network.named_modules():
        if isinstance(module, ParametrizationList):
            others = [f"{name}.{buffer}" for buffer, _ in module.named_buffers()]
            if differing := _differ(experts, [each for each in others if each not in known]):
                raise StateError(
                    f"buffer '{differing[0]}' of a parametrisation differs between experts, and its average means "
                    "nothing; call torch.nn.utils.parametrize.remove_parametrizations on the experts first"
                )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                mask = f"{name}.{hook._tensor_name}_mask".lstrip(".")
                if _differ(experts, [mask]):
                    told = f"the pruning mask '{mask}' differs between experts, and its average prunes nothing"
                    raise StateError(f"{told}; call torch.nn.utils.prune.remove on the experts first")


def _differ(experts: Sequence[State], names: Sequence[str]) -> list[str]:
    """Return those of the names whose tensors are not the same in all experts."""
    first, *others = experts
    floats = [name for name in names if name in first and first[name].is_floating_point()]
    return [name for name in floats if not all(torch.equal(first[name], other[name]) for other in others)]


def _spectral_norms(network: nn.Module) -> Iterator[tuple[list[str], list[Tensor], Tensor]]:
    """Yield of every spectral norm the names of u and v, these buffers, and the matrix that is normalised."""
    for name, module in network.named_modules():
        if isinstance(module, ParametrizationList) and any(isinstance(step, _SpectralNorm) for step in module):
            steps = list(enumerate(module))
            if module.is_tensor:
                weight: Tensor = module.original
            else:  # the first makes the weight of several tensors
                weight = module[0](*(getattr(module, f"original{place}") for place in range(module.ntensors)))
                del steps[0]
            for place, step in steps:
                if isinstance(step, _SpectralNorm) and weight.ndim > 1:
                    names = [f"{name}.{place}.{which}" for which in ("_u", "_v")]
                    yield names, [step._u, step._v], step._reshape_weight_to_matrix(weight)
                weight = step(weight)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                names = [f"{name}.{hook.name}_{which}".lstrip(".") for which in "uv"]
                buffers = [getattr(module, f"{hook.name}_{which}") for which in "uv"]
                yield names, buffers, hook.reshape_weight_to_matrix(getattr(module, f"{hook.name}_orig"))
