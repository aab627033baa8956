"""The statistics of the experts of a merge: given, read from files, or computed on calibration samples."""

from collections.abc import Sequence

from coin.files.tensors import State, on_device
from coin.merging.expert_sources import ExpertFiles
from coin.merging.experts import Experts
from coin.networks.heads import padded_state
from coin.statistics import FisherKind, FisherOptions
from coin.statistics.files import check_statistic, open_statistics
from coin.statistics.statistic import Statistic, statistic_sums


def statistics_of(experts: Experts, which: Statistic) -> Sequence[State]:
    """Return one statistic of every expert, like the padded experts; it is kept for further rows of the code.

    A Fisher's head gets the mean of its rows where outputs weigh alike, since each logit is its own row times the
    features, and zeros where they weigh by probabilities, which padded ones lack. Raises ConfigurationError where it is
    not given, nor calibration data for it; StateError where a given one is not its expert's.
    """
    if which not in experts.statistics:
        source = experts.source
        if isinstance(source, ExpertFiles):
            states = _read(experts, source, which)
        else:
            given = experts.given[which.name]
            states = _computed(experts, which) if given is None else given
            for index, (state, network) in enumerate(zip(states, source.unpadded, strict=True)):
                check_statistic(which.name, state, network, f"the {which.name} of expert {index}")
        if source.padding is not None and which.kind is not None:
            weigh_alike = which.kind in (FisherKind.exact, FisherKind.monte_carlo)
            states = [padded_state(state, *source.padding, mean=weigh_alike) for state in states]
        experts.statistics[which] = [on_device(state, source.device) for state in states]
    return experts.statistics[which]


def _read(experts: Experts, files: ExpertFiles, which: Statistic) -> Sequence[State]:
    """Open the files of a statistic, and count what making them took."""
    opened = open_statistics(experts.statistic_paths, which, files.fingerprints)
    for file in opened:
        experts.seconds += file.provenance.get("seconds", 0.0)
        experts.passes += file.provenance.get("passes", 0.0)
    return opened


def _computed(experts: Experts, which: Statistic) -> Sequence[State]:
    """Compute a statistic on the calibration samples, and count it: of padded experts, but for a Fisher.

    There a padded class would get a probability too.
    """
    options = None if which.kind is None else FisherOptions(which.kind)
    networks = experts.networks if which.kind is None else experts.source.unpadded
    means = []
    for network, batches in zip(networks, experts.samples(which.data), strict=True):
        sums = statistic_sums(network, batches, options)
        means.append(sums.mean())
        experts.passes += sums.passes
    return means
