"""The file of a simulation: one row a policy and load."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from coin.errors import ConfigurationError
from coin.reporting.frames import read_frame, write_frame

SIMULATION_CSV = "simulation.csv"
SIMULATION_JSON = "simulation.json"

LEVELS: dict[str, float] = {"p50": 0.5, "p99": 0.99, "p995": 0.995, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""


@dataclass(frozen=True)
class SimulationRow:
    """What one policy does at one load, over all seeds. Latencies are in seconds, infinite where queries failed.

    Args:
        experiment: The experiment's name.
        method: The merge method whose coded models serve.
        batchnorm: Its BatchNorm policy.
        decoder: The decoder.
        want: Whose answers a query wants: ``one`` expert's, or ``all`` experts'.
        policy: The serving policy.
        quantile: Of the time that own answers take, after which they are late; NaN where the policy waits for them.
        load: The share of the experts' capacity that own answers alone take up.
        servers: The number of servers, the same for every policy.
        queries: Queries per seed.
        seeds: How many seeds.
        p50: The median latency.
        p50_low: Its 95 % bootstrap interval begins.
        p50_high: And ends.
        p99: The 99 % quantile.
        p99_low: See `p50_low`.
        p99_high: See `p50_high`.
        p995: The 99.5 % quantile.
        p995_low: See `p50_low`.
        p995_high: See `p50_high`.
        p999: The 99.9 % quantile.
        p999_low: See `p50_low`.
        p999_high: See `p50_high`.
        share_decoded: Decoded answers among all wanted answers.
        share_failed: Wanted answers that never came.
        forwards: Forward passes a query.
        utilisation: The share of the time that servers were busy.
        expert_accuracy: Of the experts themselves, mean over tasks.
        decoded_accuracy: Of the decoded answers, by the experiment's results; NaN without any.
        effective_accuracy: (1 − share)·expert + share·decoded accuracy; answers that never came count as wrong.
        service_seconds: The mean service time.
        decoding_seconds: The time that decoding takes.
    """

    experiment: str
    method: str
    batchnorm: str
    decoder: str
    want: str
    policy: str
    quantile: float
    load: float
    servers: int
    queries: int
    seeds: int
    p50: float
    p50_low: float
    p50_high: float
    p99: float
    p99_low: float
    p99_high: float
    p995: float
    p995_low: float
    p995_high: float
    p999: float
    p999_low: float
    p999_high: float
    share_decoded: float
    share_failed: float
    forwards: float
    utilisation: float
    expert_accuracy: float
    decoded_accuracy: float
    effective_accuracy: float
    service_seconds: float
    decoding_seconds: float

    @property
    def series(self) -> str:
        """What the row's line in a figure is called: the policy, and its quantile where it has one."""
        return self.policy if self.quantile != self.quantile else f"{self.policy}, q = {self.quantile:g}"


_COLUMNS = tuple(field.name for field in fields(SimulationRow))
_TEXT = ("experiment", "method", "batchnorm", "decoder", "want", "policy")
_INTEGERS = ("servers", "queries", "seeds")


def write_simulation(folder: Path, rows: Sequence[SimulationRow]) -> None:
    """Write ``simulation.csv``.

    Raises:
        ConfigurationError: There are no rows.
        FileError: The file cannot be written.
    """
    if not rows:
        raise ConfigurationError("found no rows of a simulation to write, expected at least one")
    write_frame(folder / SIMULATION_CSV, pd.DataFrame.from_records([asdict(row) for row in rows], columns=_COLUMNS))


def read_simulation(folder: Path) -> list[SimulationRow]:
    """Return the rows of ``simulation.csv``.

    Raises:
        FileError: The file is missing or damaged.
    """
    numbers = [name for name in _COLUMNS if name not in (*_TEXT, *_INTEGERS)]
    frame = read_frame(folder / SIMULATION_CSV, _COLUMNS, _INTEGERS, numbers)
    return [SimulationRow(**{str(name): value for name, value in row.items()}) for row in frame.to_dict("records")]
