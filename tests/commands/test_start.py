"""What a command imports before it does anything: every heavy package costs its user seconds at every start."""

import subprocess
import sys

import pytest

from coin.cli import main

HEAVY = (
    "torch torchvision lightning torchmetrics wandb pandas matplotlib scipy scipy.stats timm peft sklearn mlxtend ray "
    "urllib.request"
)
START = """
import sys
from coin.cli import main
for line in sys.argv[2:]:
    try:
        status = main(line.split())
    except SystemExit as help_was_printed:
        status = help_was_printed.code
print("imported:", *(name for name in sys.argv[1].split() if name in sys.modules))
"""
FIGURES = ("pandas", "matplotlib", "scipy", "urllib.request")
NETWORKS = ("torch", "torchvision", *FIGURES)
LIGHTNING = (*NETWORKS, "lightning", "torchmetrics", "scipy.stats")
MAY_IMPORT = {
    "nothing": (["--help", "sweep {sweep} --dry-run", "report --help", "sweep nothing.yaml", "choose nowhere"], ()),
    "a report": (["report {empty}"], FIGURES),
    "W&B": (["dashboard --help"], ("wandb", "urllib.request")),
    "networks": ([f"{name} --help" for name in ("compress", "serve", "simulate")], NETWORKS),
    "Lightning": ([f"{name} --help" for name in ("run", "fit", "fisher", "evaluate", "merge")], LIGHTNING),
}


SLOW = ("networks", "Lightning")  # their imports alone take seconds


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if what in SLOW else ()) for what in MAY_IMPORT]
)
def test_a_command_imports_what_it_uses(what, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.yaml").write_text("name: e\nmethods: [{class_path: Average}]\n")
    (tmp_path / "s.yaml").write_text(f"name: s\nexperiment: {tmp_path / 'e.yaml'}\ngrid: {{seeds: [[0], [1]]}}\n")
    lines, allowed = MAY_IMPORT[what]
    lines = [line.format(sweep=tmp_path / "s.yaml", empty=tmp_path / "empty") for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", START, HEAVY, *lines], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    imported = done.stdout.splitlines()[-1].split()[1:]
    assert set(imported) <= set(allowed)


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


WARN = """
import warnings
from coin.cli import _warnings_in_one_line
from coin.errors import CoinWarning
with _warnings_in_one_line():
    warnings.formatwarning = lambda *of: "otherwise"  # as Lightning does when it is imported
    warnings.warn("one\\nline", CoinWarning)
"""


def test_warnings_are_one_line_whoever_formats_others():
    found = subprocess.run([sys.executable, "-c", WARN], capture_output=True, text=True, check=True)
    assert found.stderr == "coin: warning: one line\n"
