"""What ``coin simulate`` and ``coin advise`` know of an experiment: measured times, sizes and accuracies."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coin.commands.serve import read_tasks
from coin.commands.served import Served, read_accuracies, read_served, results_folders
from coin.serving.model import NetworkServer
from coin.serving.replies import ReplyFormat
from coin.serving.sim.fleet import Failover, Fleet
from coin.serving.sim.measure import kept_bytes, measure_accuracy, measure_decoding, measure_service
from coin.serving.sim.redundancy import Precision
from coin.serving.sim.scenario import Conditions, ServiceKind


@dataclass(frozen=True)
class Chosen:
    """Which of an experiment's coded systems is meant.

    Args:
        method: The merge method whose coded models serve; none takes the first one in the results.
        batchnorm: The BatchNorm policy that its run asked for; none takes its first one.
        decoder: The decoder, as the results call it.
    """

    method: str | None = None
    batchnorm: str | None = None
    decoder: str = "linear"


def read_fleet(
    folder: Path,
    chosen: Chosen,
    conditions: Conditions,
    precisions: Collection[Precision | None] = (),
    failover: Failover | None = None,
) -> tuple[Served, Fleet, Conditions]:
    """Return an experiment's coded system, what is known of it, and the conditions with what was measured for them.

    Args:
        folder: An experiment's folder, or a seed's.
        chosen: Which of its systems.
        conditions: Its service times are measured here unless they are given.
        precisions: The accuracy of the experts is measured with their weights rounded to these.
        failover: A small network for all tasks.

    Raises:
        ConfigurationError: There are no such results.
        FileError: A file is missing or damaged.
    """
    served = read_served(folder, chosen.method, chosen.batchnorm, chosen.decoder)
    accuracies = read_accuracies(results_folders(folder), served.method, served.batchnorm, chosen.decoder)
    paths = [*served.experts.paths.values(), *served.coded]
    service, count = conditions.service, served.code.num_experts
    if service.kind is ServiceKind.measured:
        servers = [NetworkServer(path, served.experts.width, served.decoder) for path in paths]
        times, marginals = zip(*map(measure_service, servers), strict=True)
        widths = servers[0].feature_widths()
        expects = ReplyFormat(served.experts.width, None if widths is None else sum(widths))
        decoding = measure_decoding(served.code, served.decoder, expects, widths)
        if service.marginal is None:
            conditions = replace(conditions, service=replace(service, marginal=float(np.mean(marginals))))
    else:
        times, decoding = (np.array([service.seconds]),) * len(paths), 0.0
    sizes = {kept: tuple(kept_bytes(path, kept) for path in paths[:count]) for kept in Precision}
    fleet = Fleet(
        code=served.code,
        expert_seconds=times[:count],
        coded_seconds=times[count:],
        expert_bytes=sizes,
        coded_bytes=tuple(kept_bytes(path) for path in served.coded),
        expert_accuracy=accuracies.expert,
        decoded_accuracy=accuracies.decoded,
        rounded_accuracy=rounded_accuracies(served, precisions) if precisions else {},
        decoding=decoding,
        failover=failover,
    )
    return served, fleet, conditions


def rounded_accuracies(served: Served, precisions: Collection[Precision | None]) -> dict[Precision, float]:
    """Return the experts' mean accuracy on their own test sets by the precision that their weights are kept in."""
    tasks, paths = read_tasks(served).tasks, served.experts.paths
    found = {}
    for precision in filter(None, precisions):
        each = [measure_accuracy(path, precision, tasks[name].test_dataloader()) for name, path in paths.items()]
        found[precision] = float(np.mean(each))
    return found
