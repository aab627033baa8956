"""What jobs run in `test_pool.py` in place of ``coin run --only``."""

import os
import time


def finish(file, name):
    """Finish a step's folder, unless it is wrong, after ``JOB_SECONDS``; note what the job has been given."""
    folder = file.parent.parent / name
    folder.mkdir(parents=True, exist_ok=True)
    for noted, variable in (("gpus", "CUDA_VISIBLE_DEVICES"), ("threads", "OMP_NUM_THREADS")):
        folder.joinpath(noted).write_text(os.environ[variable])
    folder.joinpath("process").write_text(str(os.getpid()))
    time.sleep(float(os.environ["JOB_SECONDS"]))
    if "wrong" in name:
        raise ValueError(f"the last word of {name}")
    folder.joinpath("done.json").write_text("{}")
