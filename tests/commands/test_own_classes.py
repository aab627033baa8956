"""Classes of the user's own in the working folder, as tasks and as networks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_task_in_the_working_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "owntask.py").write_text("from coin.data import Digits\n\nclass Mine(Digits):\n    pass\n")
    script = Path(sys.executable).parent / "coin"  # whose folder, unlike that of python -m, is not this one
    command = [script, "fit", "--data=owntask.Mine", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class_path: owntask.Mine" in done.stdout
