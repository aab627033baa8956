"""Starting Ray on this machine, or joining a running cluster."""

import os

from coin.errors import ConfigurationError


def set_ray_variables(address: str | None) -> None:
    """Set Ray's environment variables, unless they are set; Ray reads some of them when it is imported.

    Raises ConfigurationError where the token that Ray's ports ask for is turned off.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # its workers have this process's priority
    # The ports of a cluster of this machine alone, which take orders, listen at its own address.
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A Serve replica's port listens at all addresses and unpickles what arrives: only with the token.
        mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
        if mode != "token":
            told = f"found RAY_AUTH_MODE={mode}, expected token: else Ray's ports run code that anybody sends"
            raise ConfigurationError(f"{told}; unset it")


def start_ray(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine, if this process has not; variables are set."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address or "local", include_dashboard=False, log_to_driver=False, logging_level="error"
        )
