"""The inputs of a merge: experts, their statistics and their calibration data, computed on demand."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn

from coin.core.batches import Batch, Forward, adapted, as_input, checked, clone, samples_of
from coin.data import Calibration
from coin.errors import ConfigurationError, DataError
from coin.files.tensors import State
from coin.merging.calibrated import Calibrated
from coin.networks.batchnorm import has_batchnorm
from coin.networks.heads import check_padding, head_name, of_one_width, pad_head, padded_state
from coin.statistics import TRANSPOSED, FisherKind
from coin.statistics.guard import evaluating, trainable
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind, StatisticOptions, statistic_sums

Given = Sequence[State] | Mapping[str, Sequence[State]]
"""Every expert's statistic; or several of them, by the data that they are of: ``own``, ``pooled``."""


class Experts(Calibrated):
    """N experts in memory, of one architecture.

    If class counts differ, heads, given statistics and the shared initialisation are padded with zeros to the largest
    count; coded models then have that many outputs. Statistics that are not given are computed from the calibration
    data on demand.

    Args:
        networks: The experts.
        fishers: Every expert's Fisher diagonal; or a mapping of these by data, ``own`` and ``pooled``.
        grams: Every expert's Gram matrices, in the same form.
        initial: The shared initialisation, for methods and policies that need it.
        calibration: For every expert the samples of its own task: a `coin.data.Calibration`, or batches ``[B, …]``,
            read once; of pairs (inputs, labels) the inputs.
        forward: (network, batch) → logits ``[B, C]``, for networks that are not called with one tensor; batches may
            then also be mappings of tensors. Coded models within a method are called with batches too; those that
            `merge_networks` returns are called as the experts' class.

    Raises ConfigurationError if there are no experts, or arguments are for different numbers of them; DataError if
    there is no calibration batch, or one does not consist of tensors of equal length; HeadError if class counts differ
    and the heads cannot be padded.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        fishers: Given | None = None,
        grams: Given | None = None,
        initial: nn.Module | None = None,
        calibration: Sequence[Iterable[Any]] | None = None,
        forward: Forward | None = None,
    ) -> None:
        if not networks:
            raise ConfigurationError("found no experts, expected at least one")
        super().__init__(len(networks), calibration)
        self._unpadded = [adapted(network, forward) for network in networks]
        self.networks: Sequence[nn.Module] = of_one_width(self._unpadded)
        self._statistics: dict[Statistic, Sequence[State]] = {}
        self._given, self._initial = {StatisticKind.fisher: fishers, StatisticKind.gram: grams}, initial
        for what, given in (
            ("fisher statistics", fishers),
            ("gram statistics", grams),
            ("calibration inputs", calibration),
        ):
            for parts in given.values() if isinstance(given, Mapping) else [given]:
                if parts is not None and len(parts) != self.count:
                    found = f"found {what} of {len(parts)} experts, expected {self.count}"
                    raise ConfigurationError(f"{found}; give those of every expert")
        if calibration is not None and not all(isinstance(each, Calibration) for each in calibration):
            own = [[checked(batch, self.networks[0]) for batch in batches] for batches in calibration]
            if not any(own):
                raise DataError("found no calibration batches, expected at least one; give those of every task")
            self._calibration = own
            for sample in islice(chain.from_iterable(map(samples_of, chain.from_iterable(own))), 1):
                for padded, network in zip(self.networks, self._unpadded, strict=True):
                    with evaluating(network, gradients=False), evaluating(padded, gradients=False):
                        check_padding(padded, network, as_input(sample, network))

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, same names and shapes."""
        return [parameters_of(network) for network in self.networks]

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers."""
        return [dict(network.named_buffers()) for network in self.networks]

    @property
    def has_batchnorm(self) -> bool:
        """Whether the networks have BatchNorm layers with running statistics."""
        return has_batchnorm(self.networks[0])

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return clone(self.networks[0])

    def blank(self) -> nn.Module:
        """Return `empty_model`, by its old name; for one version."""
        warnings.warn(
            "experts.blank() is now experts.empty_model(); the next version knows only the new name",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.empty_model()

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers; raises ConfigurationError if there is none."""
        if self._initial is None:
            raise ConfigurationError(
                "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs; give it as "
                "initial, or choose another"
            )
        padding = self._padding()
        initial = pad_head(self._initial, padding[1]) if padding else self._initial
        return parameters_of(initial), dict(initial.named_buffers())

    def _padding(self) -> tuple[str, int] | None:
        """Return the head's name and its number of outputs where heads are padded."""
        if all(padded is network for padded, network in zip(self.networks, self._unpadded, strict=True)):
            return None
        head = head_name(self.networks[0])
        return head, len(self.networks[0].get_submodule(head).get_parameter("weight"))

    def available(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return the data (own, pooled) for which a statistic is available and that a method's option allows."""
        there = self._data_of(name, data)
        allowed = [each for each in there if data in (DataChoice.auto, each)]
        if not allowed:
            found = f"found {name} statistics of {', '.join(there)} data, expected {data}"
            raise ConfigurationError(f"{found}; give such ones, or set {name}_data")
        return allowed

    def _data_of(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return the data for which there is a statistic; one that is computed, or given without data, is for any."""
        given = self._given[name]
        if isinstance(given, Mapping):
            return [DataChoice(each) for each in given]
        return data.alternatives if given is None or data is not DataChoice.auto else [DataChoice.own]

    def statistic(self, which: Statistic) -> Sequence[State]:
        """Return one statistic of every expert; ConfigurationError if it is not given, nor calibration data for it.

        A head is padded like the expert's, whose added logits are zero. The exact Fisher of a linear head is the same
        for every output, since each logit is its own row times the features: the padded rows get it too. The other
        kinds weigh outputs by probabilities, of which those have none: zero. Gram matrices are of inputs.
        """
        if which not in self._statistics:
            states, padding = self._states(which), self._padding()
            if padding is not None and which.kind is not None:
                mean = which.kind in (FisherKind.exact, FisherKind.monte_carlo)
                states = [padded_state(state, *padding, mean=mean) for state in states]
            self._statistics[which] = states
        return self._statistics[which]

    def _states(self, which: Statistic) -> Sequence[State]:
        """Return one statistic of every expert, of its own class count."""
        given = self._given[which.name]
        if given is None:
            return self.computed(which.kind, self.samples(which.data))
        return given[which.data] if isinstance(given, Mapping) else given

    def computed(self, kind: FisherKind | None, samples: Sequence[Iterable[Batch]]) -> list[State]:
        """Return every expert's Fisher of a kind, or none for its Gram matrices, on its samples; count the passes.

        Fishers are those of the experts before padding: a padded class would get a probability too.
        """
        if kind is FisherKind.empirical:
            raise ConfigurationError("found no labels for the empirical Fisher; compute it and give it as fishers")
        options = StatisticOptions(StatisticKind.gram if kind is None else StatisticKind.fisher, kind)
        means, shared = [], set(self.parameters[0])
        networks = self.each_network() if kind is None else self._unpadded
        for network, batches in zip(networks, samples, strict=True):
            shared &= trainable(network).keys()  # what is frozen in one expert is averaged
            sums = statistic_sums(network, batches, options)
            self.passes += sums.passes
            means.append(sums.mean())
        return [{name: mean[name] for name in mean if name.removesuffix(TRANSPOSED) in shared} for mean in means]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}
