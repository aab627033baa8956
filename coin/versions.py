"""The versions that a result depends on."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on, and the git revision of ``coin`` where it is known."""
    found = {}
    for package in ("coded-coin", "torch", "torchvision", "lightning", "torchmetrics", "wandb", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).parents[1]
    try:
        if not (root / ".git").exists():  # an installed package, perhaps within another project's repository
            raise FileNotFoundError(root)
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    found["git"] = revision
    return found
