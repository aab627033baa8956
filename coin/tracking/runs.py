"""A training's or an evaluation's log: CSV files in its folder, and one W&B run in the experiment's group."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.lightning import leave_out_anonymous
from coin.core.processes import is_rank_zero
from coin.files.atomic import write_text
from coin.tracking.settings import in_sweep, logging_only, run_environment

TAG_LENGTH = 64  # W&B refuses longer tags, and empty ones


@dataclass(frozen=True)
class RunLog:
    """A W&B run of an experiment, its `group`, of type ``expert``, ``method`` or ``evaluate``.

    The name is for a person: ``quickstart-seed-0-expert-mnist``. W&B's files are below ``seed/wandb``, so that one
    ``wandb sync`` takes those of a seed. The run of an interrupted step goes on: its id is in the step's folder.
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
        run = None
        with run_environment(self.seed):
            if is_rank_zero() and (self.type == "evaluate" or not in_sweep()):
                with logging_only(f"the start of the run '{self.name}'"):
                    logger = self._logger(folder / "wandb-run-id")
                    run = logger.experiment
                    loggers.append(logger)
            failed = True
            try:
                yield loggers
                failed = False
            finally:
                if run is not None:
                    with logging_only(f"the end of the run '{self.name}'"):
                        run.finish(exit_code=int(failed))

    def _logger(self, id_file: Path) -> WandbLogger:
        """Return the logger of a new run, or of the one whose id is in the file."""
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4))
        given = os.environ.get("WANDB_TAGS", "").split(",")  # W&B itself would leave these out
        tags = [tag.strip()[:TAG_LENGTH] for tag in (*self.tags, *given) if tag]
        logger = WandbLogger(
            name=self.name,
            save_dir=self.seed.absolute(),
            project=os.environ.get("WANDB_PROJECT") or "coin",
            id=None if in_sweep() else id_file.read_text(encoding="utf-8"),
            group=self.group,
            job_type=self.type,
            tags=list(dict.fromkeys(tags)),
            config=dict(self.config),
            reinit="create_new",
        )
        leave_out_anonymous(logger)
        return logger
