"""Where a training or an evaluation logs to: CSV files in its folder, and one W&B run in the experiment's group."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.processes import is_rank_zero
from coin.files.atomic import write_text
from coin.tracking.runs import start_run
from coin.tracking.settings import in_sweep, logging_only, run_environment

_RUN_ID = "wandb-run-id"


@dataclass(frozen=True)
class RunLog:
    """A W&B run of an experiment, its `group`, of type ``expert``, ``method`` or ``evaluate``.

    W&B's files are below ``seed/wandb``, so that one ``wandb sync`` takes those of a seed. The run of an interrupted
    step goes on: its id is in the step's folder. An agent of a W&B sweep logs to one run, the evaluation's.
    """

    seed: Path
    group: str
    type: str
    name: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]

    @contextmanager
    def open(self, folder: Path) -> Iterator[list[Logger]]:
        """Yield the loggers of a step with this folder; all processes call it, rank zero has the W&B run."""
        folder.mkdir(parents=True, exist_ok=True)
        # CSV comes first: Lightning's log_dir is the first logger's, and W&B's is another for every run.
        loggers: list[Logger] = [CSVLogger(save_dir=folder, name="", version="logs")]
        run, kept = None, folder / _RUN_ID
        with run_environment(self.seed):
            if is_rank_zero() and (self.type == "evaluate" or not in_sweep()):
                with logging_only(f"the start of the run '{self.name}'"):
                    if not in_sweep() and not kept.is_file():
                        write_text(kept, secrets.token_hex(4))
                    run = start_run(
                        self.seed,
                        group=self.group,
                        job_type=self.type,
                        name=self.name,
                        config=self.config,
                        tags=self.tags,
                        run_id=None if in_sweep() else kept.read_text(encoding="utf-8").strip(),
                    )
                    loggers.append(WandbLogger(experiment=run))
            failed = True
            try:
                yield loggers
                failed = False
            finally:
                if run is not None:
                    with logging_only(f"the end of the run '{self.name}'"):
                        run.finish(exit_code=int(failed))
