"""Many simulations, on several processor cores."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from coin.errors import ConfigurationError
from coin.processes import cores
from coin.serving.case import Case, Outcome
from coin.serving.simulation import simulate


def simulate_all(cases: Sequence[Case], jobs: int | None = None) -> list[Outcome]:
    """Simulate several cases.

    Args:
        cases: The cases.
        jobs: Processes; one a processor core by default. What comes out does not depend on it.

    Raises:
        ConfigurationError: `jobs` is less than 1.
    """
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise ConfigurationError(f"found jobs={jobs}, expected at least 1")
    if jobs == 1 or len(cases) == 1:
        return [simulate(case) for case in cases]
    # Spawned processes start without what this one has loaded, PyTorch's threads above all.
    with ProcessPoolExecutor(min(jobs, len(cases)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(simulate, cases))
