"""Everything on a pretend accelerator, in a process of its own: torch cannot forget a device that it knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} takes no backend that is written in Python, torch 2.9 does",
)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_what_runs_on_an_accelerator_is_what_runs_on_the_cpu(which, tmp_path):
    command = [sys.executable, "-m", "pytest", HERE / "checks.py", "-q", "--tb=short", "-rs"]
    command += ["-p", "no:cacheprovider", "--noconftest", "--import-mode=prepend"]
    command += ["-m", which, f"--basetemp={tmp_path / 'pytest'}"]
    # Other plugins take a second to import.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
