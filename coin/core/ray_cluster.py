"""Starting Ray on this machine, or joining a running cluster."""

import os

# What Ray reads from the environment: nothing is reported to its makers, and its workers have this process's priority.
_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
# On any system the own ports of a cluster of this machine alone, which take orders, listen at the loopback address.
_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def set_ray_variables(address: str | None) -> None:
    """Set Ray's environment variables, unless they are set; Ray reads some of them when it is imported."""
    for name, value in {**_VARIABLES, **({} if address else _THIS_MACHINE)}.items():
        os.environ.setdefault(name, value)


def start_ray(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine if there is none; call `set_ray_variables` before.

    A process that has started Ray already goes on with that.
    """
    import ray

    if not ray.is_initialized():
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level="error")
