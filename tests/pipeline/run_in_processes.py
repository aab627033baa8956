"""Runs ``coin`` twice on every process under ``torch.distributed.run``, for `test_processes.py`."""

import atexit
import json
import os
import sys
from pathlib import Path

import torch

import coin.pipeline.steps.report
from coin.cli import main
from coin.core.processes import is_rank_zero, process_count


def _refused(path, target):
    """Let no process but the first write."""
    raise AssertionError(f"a process that is not the first writes {target}")


def _no_report(folder):
    """Leave out the plots, which would take most of the time."""


def run(folder, arguments):
    """Run the command, note when every file was written, and run it again."""
    torch.set_num_threads(1)
    coin.pipeline.steps.report.write_report = _no_report
    if os.environ["RANK"] != "0":
        Path.replace = _refused
    assert main(arguments) == 0
    if is_rank_zero():
        times = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        noted = {"processes": process_count(), "times": times}
        (folder / "first.json").write_text(json.dumps(noted))
    assert main(arguments) == 0


def say_what_is_left():
    """Tell at the very end: gloo may abort where a process group is left to the interpreter."""
    how = "left in" if torch.distributed.is_initialized() else "left"
    print(f"{how} its process group")


if __name__ == "__main__":
    atexit.register(say_what_is_left)  # before coin's own, and so run after it
    run(Path(sys.argv[1]), sys.argv[2:])
