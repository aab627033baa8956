"""What srun does, for `test_slurm.py`: starts the tasks with SLURM's variables.

Every training step of every task is noted in ``steps-TASK.txt``: its global step, its epoch, and the labels it saw. In
the step that ``SIGNAL_AT`` names, the batch script gets the signal that announces the end of the job; its ``scontrol``
ends the tasks, whose numbers are in ``tasks.txt``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import coin.pipeline.steps.report
from coin.cli import main
from coin.modules import Expert

TASKS = int(os.environ["SLURM_NTASKS"])
NOTES = Path(os.environ["FAKE_SLURM"])
SCRIPT = os.getppid()


def reached(task):
    """Whether a task has noted the step of the signal: the kill that follows must find all tasks in the same step."""
    notes = NOTES / f"steps-{task}.txt"
    return notes.is_file() and len(notes.read_text().splitlines()) > int(os.environ["SIGNAL_AT"])


def run(task, arguments):
    """Run one task."""
    os.environ.update(SLURM_PROCID=str(task), SLURM_LOCALID=str(task), SLURM_NODEID="0")
    torch.set_num_threads(1)
    plain = Expert.training_step

    def noted(self, batch, batch_idx):
        with (NOTES / f"steps-{task}.txt").open("a") as file:
            print(json.dumps([self.global_step, self.current_epoch, batch[1].tolist()]), file=file)
        is_default = signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        assert is_default, "Lightning would save in the middle of an epoch"
        is_last = self.global_step == int(os.environ["SIGNAL_AT"])
        if is_last and not (NOTES / "scontrol.txt").exists():
            if task == 1:
                while not all(reached(other) for other in range(TASKS)):
                    time.sleep(0.01)
                os.kill(SCRIPT, signal.SIGUSR1)
            time.sleep(60)
        return plain(self, batch, batch_idx)

    Expert.training_step = noted
    return main(arguments)


def start(arguments):
    """Run all tasks, and return the largest exit status."""
    tasks = []
    for task in range(TASKS):
        if (child := os.fork()) == 0:
            try:
                os._exit(run(task, arguments))
            except SystemExit as left:
                os._exit(int(left.code or 0))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        tasks.append(child)
    (NOTES / "tasks.txt").write_text(" ".join(map(str, tasks)))
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in tasks)


if __name__ == "__main__":
    coin.pipeline.steps.report.write_report = lambda *_: None
    sys.exit(start(sys.argv[sys.argv.index("coin") + 1 :]))
