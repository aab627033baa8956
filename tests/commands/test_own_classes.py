"""Classes of the user's own in the working folder, as tasks and as networks."""

import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
from coin.data import Digits

class Mine(Digits):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("safely", [False, True])
def test_a_task_in_the_working_folder_is_found_but_not_where_configurations_are_not_trusted(
    tmp_path: Path, safely: bool
) -> None:
    (tmp_path / "owntask.py").write_text(TASK)
    script = Path(sys.executable).parent / "coin"  # whose folder, unlike that of python -m, is not this one
    command = [script, *(["--safe"] if safely else []), "fit", "--data=owntask.Mine", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if safely:
        assert done.returncode == 2
        assert done.stderr.startswith("coin: error: ")
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 0, done.stderr
        assert "class_path: owntask.Mine" in done.stdout
