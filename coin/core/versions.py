"""The versions that a result depends on, and the machine that it was measured on."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on, and the git revision of ``coin`` where it is known."""
    packages = ("coded-coin", "torch", "torchvision", "lightning", "torchmetrics", "wandb", "numpy")
    found = {package: version(package) for package in packages}
    root = Path(__file__).parents[2]
    try:
        command = [
            "git",
            f"--git-dir={root / '.git'}",  # not of another project, in which the package is installed
            f"--work-tree={root}",
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        found["git"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["git"] = "unknown"
    return found


def machine() -> str:
    """Return the system, the number of cores and the GPUs, in words."""
    from torch import cuda

    devices = [cuda.get_device_name(i) for i in range(cuda.device_count())]
    system = f"{platform.system()} {platform.machine()}"
    cores = f"{os.cpu_count()} cores"
    return ", ".join([system, cores, *devices])
