"""``sbatch`` and ``sacct`` without a cluster, for submitit: an array's tasks run on this machine, some at a time.

As ``sbatch SCRIPT`` it starts the array of a script in the background and says the job's number; as ``sacct -j …`` it
says of every task whether it runs.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

NOTES = Path(os.environ["FAKE_SLURM"])
JOB = "77"


def submit(script: str) -> None:
    """Run the array's tasks in a process of its own, as many at a time as it says."""
    text = Path(script).read_text()
    first, last, at_once = map(int, re.search(r"--array=(\d+)-(\d+)%(\d+)", text).groups())  # type: ignore[union-attr]
    job = f"{JOB}{len(list(NOTES.glob('array-*'))):02d}"
    spooled = NOTES / f"script-{job}"  # as SLURM does: submitit moves its file while the first tasks begin
    spooled.write_text(text)
    if (array := os.fork()) == 0:
        os.setsid()
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        running: dict[int, subprocess.Popen[bytes]] = {}
        waiting = list(range(first, last + 1))
        while waiting or running:
            for task in [task for task, process in running.items() if process.poll() is not None]:
                process = running.pop(task)
                (NOTES / f"ended-{job}_{task}").write_text("FAILED" if process.returncode else "COMPLETED")
            while waiting and len(running) < at_once:
                task = waiting.pop(0)
                own = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}
                own |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
                own |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURMD_NODENAME": "localhost"}
                running[task] = subprocess.Popen(["bash", str(spooled)], env=os.environ | own, start_new_session=True)
                (NOTES / f"task-{job}_{task}").write_text(str(running[task].pid))
            time.sleep(0.05)
        os._exit(0)
    (NOTES / f"array-{job}").write_text(str(array))
    print(f"Submitted batch job {job}")


def account() -> None:
    """Say of every task that was started whether it runs."""
    print("JobID|State|NodeList")
    for task in NOTES.glob("task-*"):
        name = task.name.removeprefix("task-")
        ended = NOTES / f"ended-{name}"
        print(f"{name}|{ended.read_text() if ended.exists() else 'RUNNING'}|localhost")


if __name__ == "__main__":
    if sys.argv[1] == "sbatch":
        submit(sys.argv[-1])
    else:
        account()
