"""RegMean: every linear map fitted to what the experts' own maps do to their inputs."""

from enum import StrEnum

import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError, StateError
from coin.merging.coin import check_damping
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import DATA, MergeMethod, check_choice, weighted_mean
from coin.networks.batchnorm import BatchNormPolicy
from coin.progress import tracked
from coin.state import State


class RegMeanLayers(StrEnum):
    """Which linear maps RegMean fits; all other parameters get the β-average."""

    linear = "linear"
    """Fully connected layers only, as in the literature."""
    all = "all"
    """Convolutions too, as linear maps of the patches they see."""


class RegMean(MergeMethod):
    """The linear maps that best reproduce, on each expert's inputs, the expert's outputs of the layer.

    For a layer with weights W_i ``[C_out, K]`` and inputs a of expert i with Gram matrix G_i = E Σ_positions aaᵀ, the
    minimiser of Σ_i β_i E‖Wa − W_ia‖² is W = (Σ_i β_i W_i G_i)(Σ_i β_i G_i)⁻¹. It is computed as the β-average plus
    Σ_i β_i (W_i − W̄) G_i (Σ_k β_k G_k + λI)⁻¹ by a Cholesky factorisation in float64, with λ = damping × the mean
    diagonal entry of Σβ_kG_k, per group: damping pulls towards the β-average W̄. A bias is solved for jointly, as the
    weight of an input that is always 1. Groups of a grouped convolution are separate maps.

    Source: Jin et al., *Dataless knowledge fusion by merging weights of language models* (ICLR 2023), eq. 1–2 and
    section 3.3 for α.

    With 200 samples the Gram matrix of a wide layer is singular or nearly so, and weak damping fits noise. The defaults
    have the smallest residual ‖f_c − Σβf‖ on the *calibration* samples among α of 0.7 to 1 and a damping of 0.01 to 1
    with ``own`` data, for three pairs and triples of tasks alike: a corner of that grid. Outside it, and with
    ``pooled`` data, smaller α and larger damping can do better.

    Args:
        layers: ``linear`` or ``all``.
        alpha: Off-diagonal entries of the Gram matrices are multiplied by α, in [0, 1]; 1 leaves them, 0 makes a
            diagonal merge.
        damping: λ relative to the mean diagonal entry, dimensionless, at least 0.
        gram_data: On which data the Gram matrices are wanted, ``own`` or ``pooled``; None for the experiment's.
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "regmean"
    requires = frozenset({Requirement.GRAM})

    def __init__(
        self,
        layers: RegMeanLayers = RegMeanLayers.all,
        alpha: float = 0.7,
        damping: float = 1.0,
        *,
        gram_data: str | None = None,
        batchnorm: BatchNormPolicy = BatchNormPolicy.average,
        label: str | None = None,
    ) -> None:
        super().__init__(batchnorm=batchnorm, label=label)
        if layers not in tuple(RegMeanLayers):
            raise ConfigurationError(f"found layers '{layers}', expected one of {', '.join(RegMeanLayers)}")
        if not 0 <= alpha <= 1:
            raise ConfigurationError(f"found alpha {alpha}, expected a number from 0 to 1")
        self.layers = RegMeanLayers(layers)
        self.alpha = alpha
        self.damping = check_damping(damping)
        self.gram_data = check_choice("gram_data", gram_data, DATA)

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        assert inputs.grams is not None
        experts = inputs.experts
        merged = {key: weighted_mean(experts, weights, key) for key in experts[0]}
        for key in tracked(inputs.grams[0], self.label):
            if key not in merged:
                raise StateError(
                    f"there is a Gram matrix for '{key}', which the experts do not have; compute the Gram matrices of "
                    "these experts"
                )
            if self.layers is RegMeanLayers.linear and merged[key].ndim != 2:
                continue
            first = inputs.grams[0][key]
            bias = bias_of(key, first.shape[-1], merged[key])
            average = joint_map(merged, key, bias, first)
            pull, total = torch.zeros_like(average), torch.zeros_like(first, dtype=torch.float64)
            for expert, grams, weight in zip(experts, inputs.grams, weights, strict=True):
                gram = _shrunk(grams[key].double(), self.alpha)
                pull += weight * (joint_map(expert, key, bias, gram) - average) @ gram
                total.add_(gram, alpha=weight)
            solution = average + solve_damped(total, pull, self.damping, key)
            split_map(solution, merged, key, bias)
        return {key: tensor.to(experts[0][key].dtype) for key, tensor in merged.items()}


def bias_of(key: str, inputs: int, weight: Tensor) -> str | None:
    """Return the bias that a Gram matrix with `inputs` rows solves for together with the weight, or None.

    Raises:
        StateError: The Gram matrix has neither as many rows as the weight has inputs nor one more for a bias.
    """
    width = weight[0].numel()
    if inputs == width:
        return None
    if inputs == width + 1:
        return key.removesuffix("weight") + "bias"
    raise StateError(
        f"the Gram matrix of '{key}' has {inputs} rows, expected {width}, or {width + 1} with a bias; compute the Gram "
        "matrices of these experts"
    )


def joint_map(state: State, key: str, bias: str | None, gram: Tensor) -> Tensor:
    """Return a layer's weight and bias as one float64 map per group, ``[G, C_out/G, K]``.

    Raises:
        StateError: The bias that the Gram matrix includes is missing, or the groups do not divide the outputs.
    """
    weight = state[key].double().flatten(1)
    if bias is not None:
        if bias not in state:
            raise StateError(
                f"the Gram matrix of '{key}' has a row for a bias, but there is no '{bias}'; compute the Gram matrices "
                "of these experts"
            )
        weight = torch.cat([weight, state[bias].double()[:, None]], dim=1)
    groups = gram.shape[0]
    if weight.shape[0] % groups:
        raise StateError(
            f"the Gram matrix of '{key}' has {groups} groups, which do not divide {weight.shape[0]} outputs; compute "
            "the Gram matrices of these experts"
        )
    return weight.reshape(groups, -1, weight.shape[1])


def split_map(solution: Tensor, into: dict[str, Tensor], key: str, bias: str | None) -> None:
    """Write a joint map ``[G, C_out/G, K]`` back as the weight and the bias of a layer."""
    rows = solution.flatten(0, 1)
    if bias is not None:
        into[bias] = rows[:, -1].reshape(into[bias].shape)
        rows = rows[:, :-1]
    into[key] = rows.reshape(into[key].shape)


def solve_damped(gram: Tensor, pull: Tensor, damping: float, key: str) -> Tensor:
    """Return pull (gram + λI)⁻¹ with λ = damping × the mean diagonal entry, per group.

    Args:
        gram: Symmetric, positive semi-definite ``[G, K, K]``.
        pull: ``[G, C_out/G, K]``.
        damping: Relative damping.
        key: The layer, for the message.

    Raises:
        NumericalError: The damped matrix is singular, or as good as singular in float64.
    """
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    damped = gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:2]))
    # A group whose inputs are always zero has no pull either: any matrix gives it the β-average.
    dead = damped.abs().amax((1, 2)) == 0
    damped = damped + torch.diag_embed(dead.to(gram)[:, None].expand(gram.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    # Rounding lets half of the singular matrices pass, with a last pivot that is noise.
    pivots, largest = factor.diagonal(dim1=1, dim2=2).square().amin(1), damped.diagonal(dim1=1, dim2=2).amax(1)
    noise = 10 * torch.finfo(gram.dtype).eps * gram.shape[-1] * largest
    if bool((failed.bool() | (pivots <= noise)).any()):
        raise NumericalError(
            f"the Gram matrix of '{key}' is singular with a damping of {damping:.3g}; raise regmean's damping"
        )
    return torch.cholesky_solve(pull.mT, factor).mT


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    return alpha * gram + (1 - alpha) * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
