"""What a command imports before it does anything, and classes of the user's own in the working folder."""

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import sys
from coin.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0
print(sorted({"torch", "lightning", "pandas", "wandb", "jsonargparse"} & set(sys.modules)))
"""


def test_help_and_version_start_quickly():
    command = [sys.executable, "-c", START, "--help", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_task_in_the_working_folder_is_found(tmp_path):
    (tmp_path / "owntask.py").write_text(
        "from coin.data import Digits\n\nclass Mine(Digits):\n    pass\n"
    )
    script = (
        Path(sys.executable).parent / "coin"
    )  # whose folder, unlike that of python -m, is not this one
    command = [script, "fit", "--data=owntask.Mine", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class_path: owntask.Mine" in done.stdout
