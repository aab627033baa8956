"""A training's or an evaluation's log: CSV files in its folder, and one W&B run in the experiment's group."""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.processes import is_rank_zero
from coin.files.atomic import write_text
from coin.tracking.settings import OFFLINE_MODES, TAG_LENGTH, in_sweep, logging_only, mode, run_environment


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
        run, failed = None, True
        with run_environment(self.seed):
            if is_rank_zero() and (self.type == "evaluate" or not in_sweep()):
                with logging_only(f"the start of the run '{self.name}'"):
                    run = self._start(folder / "wandb-run-id")
                    loggers.append(WandbLogger(experiment=run))
            try:
                yield loggers
                failed = False
            finally:
                if run is not None:
                    with logging_only(f"the end of the run '{self.name}'"):
                        run.finish(exit_code=int(failed))

    def _start(self, kept: Path) -> Any:
        if not kept.is_file():
            write_text(kept, secrets.token_hex(4))
        named = {"group": self.group, "job_type": self.type, "name": self.name, "config": dict(self.config)}
        return start_run(self.seed, self.tags, id=None if in_sweep() else kept.read_text(encoding="utf-8"), **named)


def start_run(folder: Path, tags: Sequence[str] = (), **named: Any) -> Any:
    """Start a W&B run with these options of `wandb.init` beside open others; its files are below ``folder/wandb``."""
    import wandb

    wanted: Any = mode()
    given = (tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(","))  # W&B would take the run's own alone
    with run_environment(folder):
        return wandb.init(
            dir=str(folder.absolute()),
            project=os.environ.get("WANDB_PROJECT") or "coin",
            tags=list(dict.fromkeys(tag[:TAG_LENGTH] for tag in (*tags, *given) if tag)),
            mode=wanted,
            resume=None if wanted in OFFLINE_MODES else "allow",
            reinit="create_new",
            settings=wandb.Settings(silent=wanted in OFFLINE_MODES),
            **named,
        )
