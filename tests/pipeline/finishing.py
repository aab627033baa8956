"""What jobs run in `test_pool.py` in place of ``coin run --only``: it finishes its step's folder."""

import os
import subprocess
import sys
from dataclasses import dataclass

from coin.pipeline.pool import Command

FINISH = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.joinpath("process").write_text(str(os.getpid()))
time.sleep(float(os.environ["JOB_SECONDS"]))
print("the last word of", folder.name, flush=True)
if "wrong" in folder.name:
    sys.exit(3)
folder.joinpath("threads").write_text(os.environ["OMP_NUM_THREADS"])
folder.joinpath("done.json").write_text("{}")
"""


@dataclass(frozen=True)
class Finish(Command):
    """Finishes its step's folder after ``JOB_SECONDS``, unless it is wrong."""

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it as a process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", FINISH, str(self.log.parent)]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **self.variables})
