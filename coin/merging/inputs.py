"""What a merge method is given: experts and statistics, already computed."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from coin.errors import CoinWarning, ConfigurationError, StateError
from coin.merging.feature_map import FeatureMap
from coin.state import State, check_finite, check_same_layout
from coin.statistics.products import OutputMap


class Requirement(StrEnum):
    """What a merge method needs besides the experts."""

    FISHER = "fisher"
    """One Fisher diagonal per expert."""
    GRAM = "gram"
    """One set of Gram matrices of the layers' inputs per expert."""
    INITIAL = "initial"
    """The shared initialisation's parameters."""
    OUTPUTS = "outputs"
    """The coded network as a function of its parameters on pooled calibration inputs, and the experts' logits."""
    EXPERT_MAPS = "expert_maps"
    """Each expert as a function of its parameters on its calibration inputs."""
    FEATURES = "features"
    """The coded network's features as a function of its parameters, and the experts' logits on the same inputs."""


@dataclass(frozen=True)
class MergeInputs:
    """Experts and statistics; everything is a tensor or a function of tensors, nothing loads data.

    Args:
        experts: Trainable parameters of the N experts, same names and shapes.
        initial: Parameters of the shared initialisation.
        fishers: Per expert the Fisher diagonal, with the names and shapes of its parameters.
        grams: Per expert the Gram matrices, weight name → ``[G, K, K]`` (mean over samples of the sum over positions).
        outputs: The coded network on the P pooled calibration inputs. Its buffers, BatchNorm statistics included, are
            the ones the coded network will keep, so they may depend on the code row.
        expert_outputs: The experts' logits on the same inputs ``[N, P, C]``, padded with zeros.
        expert_maps: Per expert its network, with its own buffers, on the calibration inputs of its Fisher.
        features: The coded network's features on the P pooled calibration inputs, its buffers as for `outputs`.
    """

    experts: Sequence[State]
    initial: State | None = None
    fishers: Sequence[State] | None = None
    grams: Sequence[State] | None = None
    outputs: OutputMap | None = None
    expert_outputs: Tensor | None = None
    expert_maps: Sequence[OutputMap] | None = None
    features: FeatureMap | None = None


def check_requirements(label: str, requires: Collection[Requirement], inputs: MergeInputs) -> None:
    """Check that the statistics a method needs are there, for every expert, and sound.

    Args:
        label: The method, for the message.
        requires: What it needs.
        inputs: What there is; the experts have been checked.

    Raises:
        ConfigurationError: A statistic is missing, or is there for another number of experts.
        StateError: A statistic differs in names or shapes, is not finite, or a Fisher entry is negative.

    Warns:
        CoinWarning: A Fisher is zero everywhere.
    """
    per_expert: dict[Requirement, Sequence[object] | Tensor | None] = {
        Requirement.FISHER: inputs.fishers,
        Requirement.GRAM: inputs.grams,
        Requirement.OUTPUTS: None if inputs.outputs is None else inputs.expert_outputs,
        Requirement.EXPERT_MAPS: inputs.expert_maps,
        Requirement.FEATURES: None if inputs.features is None else inputs.expert_outputs,
    }
    for requirement in sorted(requires):
        value = inputs.initial if requirement is Requirement.INITIAL else per_expert[requirement]
        if value is None:
            raise ConfigurationError(
                f"method '{label}' needs '{requirement}', which was not given; give it to the merge"
            )
        if requirement is not Requirement.INITIAL and len(value) != len(inputs.experts):
            raise ConfigurationError(
                f"method '{label}' found '{requirement}' of {len(value)} experts, expected {len(inputs.experts)}; give "
                "one for each"
            )
    if Requirement.FISHER in requires:
        check_fishers(inputs.fishers or [], inputs.experts[0])
        _warn_of_zero_fishers(label, inputs.fishers or [])
    if Requirement.GRAM in requires:
        grams = inputs.grams or []
        names = [f"the Gram statistic of expert {index}" for index in range(len(grams))]
        check_same_layout(grams, names)
        for gram, name in zip(grams, names, strict=True):
            check_finite(gram, name)
    if Requirement.INITIAL in requires and inputs.initial is not None:
        check_same_layout([inputs.experts[0], inputs.initial], ["expert 0", "the shared initialisation"])
        check_finite(inputs.initial, "the shared initialisation")
    if {Requirement.OUTPUTS, Requirement.FEATURES} & set(requires) and inputs.expert_outputs is not None:
        for index, logits in enumerate(inputs.expert_outputs):
            check_finite({"logits": logits}, f"the calibration output of expert {index}")


def _warn_of_zero_fishers(label: str, fishers: Sequence[State]) -> None:
    zero = [str(index) for index, fisher in enumerate(fishers) if not any(bool(f.any()) for f in fisher.values())]
    if zero:
        warnings.warn(
            f"method '{label}': the Fisher of expert {', '.join(zero)} is zero everywhere, so that the expert has no "
            "say beyond the average; check its outputs on the calibration data",
            CoinWarning,
            stacklevel=4,
        )


def check_fishers(fishers: Sequence[State], expert: State) -> None:
    """Check that Fisher diagonals fit the experts' parameters, are finite and not negative.

    Raises:
        StateError: One does not; the message names the expert and the tensor.
    """
    names = [f"the Fisher of expert {index}" for index in range(len(fishers))]
    check_same_layout([expert, *fishers], ["expert 0", *names])
    for fisher, name in zip(fishers, names, strict=True):
        check_finite(fisher, name)
        for key, tensor in fisher.items():
            if tensor.numel() and (least := float(tensor.min())) < 0:
                raise StateError(f"{name} is negative in '{key}' (least entry {least:.3g}), expected mean squares")
