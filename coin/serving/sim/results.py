"""A simulation's results: rows with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError
from coin.serving.sim.profile import Profile, StandIn
from coin.serving.sim.simulation import Outcome, Simulation

LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""
_BLOCKS, _DRAWS = 20, 200


class Interval(NamedTuple):
    """A quantity and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def tail_intervals(series: Sequence[NDArray[np.float64]], levels: Sequence[float], seed: int = 0) -> list[Interval]:
    """Return quantiles of several series together, with percentile intervals of a block bootstrap.

    Latencies of neighbouring queries depend on one another, so that what is drawn again, 200 times, are blocks: whole
    series where there are at least 20, and else each is cut into 20. A quantile is the smallest value that at least
    this share of the values does not exceed: infinite values, which are failures, are never interpolated.

    Source: Kunsch, *The jackknife and the bootstrap for general stationary observations* (1989), with blocks that do
    not overlap as in Carlstein (1986).

    Args:
        series: Values in their order ``[Q]``, at least 20 each.
        levels: Of the quantiles, in (0, 1).
        seed: Of the bootstrap's draws.
    """
    if min(map(len, series)) < _BLOCKS:
        raise ConfigurationError(f"found fewer than {_BLOCKS} latencies, expected as many; simulate more queries")
    cuts = 1 if len(series) >= _BLOCKS else _BLOCKS
    parts = [part for each in series for part in np.array_split(each, cuts)]
    blocks, values = np.repeat(np.arange(len(parts)), list(map(len, parts))), np.concatenate(parts)
    order = np.argsort(values, kind="stable")
    values, blocks = values[order], blocks[order]

    def quantiles(times: NDArray[np.int64]) -> NDArray[np.float64]:  # of values whose block counts so many times
        total = times[blocks].cumsum()
        return np.asarray(values[np.searchsorted(total, np.asarray(levels) * total[-1])])

    draws = np.random.default_rng(seed).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), _DRAWS)
    found = [quantiles(times) for times in draws]
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="closest_observation")
    own = quantiles(np.ones(len(parts), dtype=np.int64))
    return [Interval(*map(float, each)) for each in zip(own, low, high, strict=True)]


def as_row(what: StandIn, profile: Profile, simulation: Simulation, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return what the seeds of one simulation come to: a row of ``simulation.csv``.

    Latencies are in seconds, infinite where too many queries failed, and memory in bytes of weights: ``memory_server``
    of the largest server, ``memory`` of all. ``share_spared`` are answers of experts that run on other servers than
    their own; ``standing_in_accuracy`` is that of these and of decoded ones, NaN without any and where it was not
    measured. ``unanswered`` is the share of queries that nobody can answer, by `Repair`, and in no latency.
    """
    answers = sum(outcome.answers for outcome in outcomes)
    sizes = sorted({size for outcome in outcomes for size in outcome.decoded})
    shares = {size: sum(outcome.decoded.get(size, 0) for outcome in outcomes) / answers for size in sizes}
    spared = sum(outcome.spared for outcome in outcomes) / answers
    failed, decoded = sum(outcome.failed for outcome in outcomes) / answers, sum(shares.values())
    nan = float("nan")
    right = sum(share * what.right(size) for size, share in shares.items()) + (spared * what.right() if spared else 0.0)
    memory_server, memory = profile.memory(what)
    intervals = tail_intervals([outcome.latencies for outcome in outcomes], list(LEVELS.values()))
    latencies = {
        f"{name}{part}": value
        for name, interval in zip(LEVELS, intervals, strict=True)
        for part, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }
    return {
        "want": str(simulation.want),
        "redundancy": str(what.kind),
        "variant": what.variant,
        "experts": profile.code.num_experts,
        "extras": profile.extras(what),
        "queries": simulation.queries,
        "seeds": len(outcomes),
        "memory_server": memory_server,
        "memory": memory,
        "losses": profile.losses(what),
        "quantile": simulation.policy.quantile if simulation.policy.hedges else nan,
        "load": simulation.load,
        **latencies,
        "share_decoded": decoded,
        "share_spared": spared,
        "share_failed": failed,
        "unanswered": simulation.unanswered(simulation.conditions.repair.share),
        "forwards": float(np.mean([outcome.forwards for outcome in outcomes])),
        "utilisation": float(np.mean([outcome.utilisation for outcome in outcomes])),
        "expert_accuracy": profile.accuracy,
        "standing_in_accuracy": right / (decoded + spared) if decoded + spared else nan,
        "effective_accuracy": (1 - decoded - spared - failed) * profile.accuracy + right,
        "service_seconds": simulation.unit * (1 + simulation.conditions.service.tail),
        "decoding_seconds": simulation.decoding,
        "unpacking_seconds": what.unpacking,
    }
