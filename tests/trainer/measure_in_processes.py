"""Measures one Fisher diagonal and one evaluation on this process's share, for `test_trainer.py`.

Run as a script under ``torch.distributed.run``, or imported for the same with one process.
"""

import atexit
import json
import sys
from pathlib import Path

import torch

from coin.core.processes import is_rank_zero
from coin.data import Digits
from coin.data.tasks import Tasks
from coin.modules import DecodingEvaluator
from coin.networks import load_network
from coin.statistics import FisherOptions
from coin.statistics.files import open_statistic
from coin.trainer import Trainer, estimate_over_tasks


def say_what_is_left() -> None:
    print("left in its process group" if torch.distributed.is_initialized() else "left its process group")


EXACT = ("expert_accuracy", "decoded_accuracy", "nda", "agreement")


def measure(folder: Path, devices: int) -> None:
    """Write ``fisher.pt`` and ``outcomes.json``, on the first process, into a folder that holds the networks' paths."""
    torch.set_num_threads(1)
    paths = json.loads((folder.parent / "paths.json").read_text())
    # None of these numbers is divisible by two, and batches are unequal.
    tasks = Tasks(
        {
            "task0": Digits(image_size=16, max_test=37, eval_batch_size=8, split_seed=1),
            "task1": Digits(image_size=16, max_test=61, eval_batch_size=16, split_seed=2),
        },
        samples_per_task=21,
        batch_size=8,
        seed=3,
    )

    def trainer() -> Trainer:
        return Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    network = load_network(Path(paths["experts"]["task0"])).network.double()
    fishers = {}
    for kind in ("exact", "empirical"):
        path = folder / f"{kind}.safetensors"
        estimate_over_tasks(trainer(), network, tasks, FisherOptions(kind=kind), path)
        if is_rank_zero():
            found = open_statistic(path, statistic="fisher")
            fishers[kind] = {"values": dict(found.values), "count": found.samples, "passes": found.passes}
    run = trainer()
    outcomes = run.evaluate(DecodingEvaluator(paths["experts"], paths["coded"]), tasks, name="processes")
    if run.is_global_zero:
        torch.save({"processes": run.world_size, "fishers": fishers}, folder / "fisher.pt")
        measured = [
            {
                **{name: outcome.columns[name] for name in ("method", "decoder", "erased", "task", "residual")},
                "counts": outcome.confusion.tolist(),
                "exact": [outcome.columns[name] for name in EXACT],
            }
            for outcome in outcomes
        ]
        (folder / "outcomes.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    atexit.register(say_what_is_left)  # before coin's own, and so run after it
    measure(Path(sys.argv[1]), devices=int(sys.argv[2]))
