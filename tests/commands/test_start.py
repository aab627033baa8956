"""What a command imports before it does anything, and a sweep's list of points."""

import subprocess
import sys

from coin.cli import main

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


def test_a_dry_run_lists_the_points_of_a_sweep(tmp_path, capsys):
    (tmp_path / "e.yaml").write_text("name: e\nmethods: [{class_path: Average}]\n")
    (tmp_path / "s.yaml").write_text(f"name: s\nexperiment: {tmp_path / 'e.yaml'}\ngrid: {{seeds: [[0], [1]]}}\n")
    (tmp_path / "s" / "s-000-seeds-0" / "seed-0").mkdir(parents=True)
    (tmp_path / "s" / "s-000-seeds-0" / "seed-0" / "results.csv").touch()
    assert main(["sweep", str(tmp_path / "s.yaml"), f"--output={tmp_path}", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "s-000-seeds-0: seeds=[0]: has results",
        "s-001-seeds-1: seeds=[1]: no results yet",
        f"2 points in '{tmp_path / 's'}'",
    ]
