"""From networks to networks: a merge method applied, and the coded model's BatchNorm statistics set by the policy."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from coin.coding import Code
from coin.errors import ConfigurationError
from coin.inputs import as_input
from coin.merging.feature_map import FeatureMap
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod
from coin.networks import BatchNormPolicy, average_buffers, fill_network, has_batchnorm, recalibrate
from coin.state import State
from coin.statistics import OutputMap
from coin.statistics.guard import evaluating

FITTED = frozenset({Requirement.OUTPUTS, Requirement.FEATURES})
"""The requirements of methods that fit what the coded network answers, and so run it."""


def merge_networks(
    method: MergeMethod,
    networks: Sequence[nn.Module],
    code: Code,
    *,
    fishers: Sequence[State] | None = None,
    grams: Sequence[State] | None = None,
    initial: nn.Module | None = None,
    batches: Iterable[Tensor] | None = None,
    own_batches: Sequence[Iterable[Tensor]] | None = None,
) -> list[nn.Module]:
    """Merge experts into coded models, one a row of the code.

    Args:
        method: The merge method.
        networks: The N experts, of one architecture with equally many outputs.
        code: The code, R×N.
        fishers: Each expert's Fisher diagonal, where the method wants it.
        grams: Each expert's Gram matrices, where the method wants them.
        initial: The shared initialisation, where the method or the policy ``keep`` wants it.
        batches: Calibration inputs of all tasks, ``[B, ...]`` each; where the method or the policy ``recalibrate``
            wants them.
        own_batches: Each expert's calibration inputs, those of its Fisher; where the method wants the experts as
            functions of their parameters (`coin.merging.FullFisher`).

    Returns:
        R new networks in eval mode.

    Raises:
        ConfigurationError: Something the method or the policy wants is not there.
        StateError: The experts do not fit together, or the result is not finite.
    """
    inputs = MergeInputs(
        experts=[parameters_of(network) for network in networks],
        initial=None if initial is None else parameters_of(initial),
        fishers=fishers,
        grams=grams,
    )
    batches = None if batches is None else list(batches)  # iterated more than once
    if Requirement.EXPERT_MAPS in method.requires:
        inputs = replace(inputs, expert_maps=_maps(networks, own_batches, method.label))
    if method.requires & FITTED:
        inputs = replace(inputs, expert_outputs=expert_outputs(networks, needed(batches, method.label)))
    buffers = None if initial is None else dict(initial.named_buffers())
    rows = code.matrix.tolist()
    return [merge_row(method, networks, row, inputs, initial_buffers=buffers, batches=batches)[0] for row in rows]


def merge_row(
    method: MergeMethod,
    networks: Sequence[nn.Module],
    row: Sequence[float],
    inputs: MergeInputs,
    *,
    initial_buffers: State | None = None,
    batches: Iterable[Tensor] | None = None,
) -> tuple[nn.Module, float]:
    """Merge experts into the coded model of one row of the code; see `merge_states`, for experts in memory."""
    own = [dict(expert.named_buffers()) for expert in networks]
    return merge_states(
        method,
        lambda: deepcopy(networks[0]),
        own,
        row,
        inputs,
        initial_buffers=initial_buffers,
        batches=batches,
    )


def merge_states(
    method: MergeMethod,
    build: Callable[[], nn.Module],
    buffers: Sequence[State],
    row: Sequence[float],
    inputs: MergeInputs,
    *,
    initial_buffers: State | None = None,
    batches: Iterable[Tensor] | None = None,
) -> tuple[nn.Module, float]:
    """Merge the states of experts into the coded model of one row of the code.

    Args:
        method: The merge method.
        build: Makes a network of the experts' architecture, whose contents do not matter.
        buffers: The buffers of the N experts.
        row: β ``[N]``.
        inputs: What the method wants, but for the coded network's output map, which depends on the row.
        initial_buffers: The shared initialisation's buffers, for the policy ``keep``.
        batches: Calibration inputs of all tasks, to be iterated more than once.

    Returns:
        The coded model in eval mode, and what making it took in forward-equivalents.
    """
    averaged = average_buffers(buffers, row)
    # A method that fits outputs starts from averaged statistics and keeps them; a closed form never looks at them.
    fits_outputs = bool(method.requires & FITTED)
    policy = BatchNormPolicy(method.batchnorm)
    final: State = averaged
    if policy == BatchNormPolicy.keep and not fits_outputs and has_batchnorm(build()):
        if initial_buffers is None:
            raise ConfigurationError(
                f"found no shared initialisation, whose BatchNorm statistics '{method.label}' is to keep; give it or "
                "choose another batchnorm policy"
            )
        final = {name: initial_buffers.get(name, tensor) for name, tensor in averaged.items()}
    passes = 0.0
    if fits_outputs:
        network = build().eval()
        _fill(network, inputs.experts[0], averaged)
        samples = needed(batches, method.label)
        outputs = OutputMap(network, samples)
        features = FeatureMap(network, samples)
        merged = method.merge(replace(inputs, outputs=outputs, features=features), row)
        passes += outputs.passes + features.passes
    else:
        before = _passes(inputs)
        merged = method.merge(inputs, row)
        passes += _passes(inputs) - before
        network = build().eval()  # not before: a merge of many experts is short of memory
    _fill(network, merged, final)
    if policy == BatchNormPolicy.recalibrate and has_batchnorm(network):
        passes += recalibrate(network, needed(batches, method.label))
    return network, passes


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def expert_outputs(networks: Iterable[nn.Module], batches: Iterable[Tensor]) -> Tensor:
    """Return all experts' logits on the calibration inputs, ``[N, P, C]``, in eval mode whatever their own."""
    outputs = []
    for network in networks:
        with evaluating(network, gradients=False):
            outputs.append(torch.cat([network(as_input(batch, network)) for batch in batches]))
    return torch.stack(outputs)


def needed(batches: Iterable[Tensor] | None, label: str) -> Iterable[Tensor]:
    """Return the calibration inputs.

    Raises:
        ConfigurationError: There are none.
    """
    if batches is None:
        raise ConfigurationError(
            f"found no calibration inputs, which method '{label}' needs; give batches, or the tasks"
        )
    return batches


def _maps(networks: Sequence[nn.Module], own_batches: Sequence[Iterable[Tensor]] | None, label: str) -> list[OutputMap]:
    if own_batches is None or len(own_batches) != len(networks):
        raise ConfigurationError(
            f"found calibration inputs of {len(own_batches or ())} experts, which method '{label}' needs; give "
            f"own_batches, one entry for each of the {len(networks)} experts"
        )
    return [OutputMap(network, list(own)) for network, own in zip(networks, own_batches, strict=True)]


def _passes(inputs: MergeInputs) -> float:
    return sum(each.passes for each in inputs.expert_maps or ())


def _fill(network: nn.Module, parameters: State, buffers: State) -> None:
    names = network.state_dict().keys()
    state = {name: tensor for name, tensor in {**parameters, **buffers}.items() if name in names}
    # Tied parameters have one name in named_parameters and several in the state dict.
    own = network.state_dict()
    fill_network(network, {**own, **state}, "the coded model")
