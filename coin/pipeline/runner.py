"""Running steps: the one place that knows records, keys, locks, ranks, W&B runs, artifacts and progress."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.processes import is_rank_zero, on_rank_zero, rank_zero_info
from coin.files.atomic import write_text
from coin.pipeline.experiment import Experiment
from coin.pipeline.locks import folder_lock, shared_step_lock
from coin.pipeline.records import Inputs, inputs_of, record_step, reused_status, status_of
from coin.pipeline.step import Context, Job, JobConfig, Step
from coin.pipeline.steps.code import AUTO
from coin.tracking.runs import start_run
from coin.tracking.settings import in_sweep, logging_only, run_environment

LONG = 10.0
"""Steps that take at least so many seconds say how long they took."""


def _claim(step: Step, locks: ExitStack, *, patient: bool) -> tuple[Inputs, float | None] | None:
    """Lock a step that has to run, and return its inputs and the seconds of its last run; None if it is up to date.

    It is up to date too if another point of the sweep has its outputs. `patient`: wait while another process runs it.
    """
    if reused_status(step).is_current:
        return None
    locks.enter_context(folder_lock(step.training or step.folder / ".steps" / step.name, patient=patient))
    inputs = inputs_of(step)
    locks.enter_context(shared_step_lock(step, inputs.key))
    status = reused_status(step)
    return None if status.is_current else (inputs, status.seconds)


class Runner:
    """Runs steps one after the other; with several processes, all of them call it with the same steps.

    If `patient`, it waits for other commands that run the same steps, as a process that runs one step does. `total` is
    how many steps all calls have together, for their numbers; by default each call counts its own.
    """

    def __init__(self, experiment: Experiment, *, patient: bool = False, total: int | None = None) -> None:
        self.experiment = experiment
        self.patient = patient
        self.total = total
        self._begun = 0
        self._stack = ExitStack()
        self._open: dict[JobConfig | None, tuple[Job, ExitStack]] = {}
        self._last: dict[JobConfig | None, Step] = {}  # of a job's steps

    def run(self, steps: Sequence[Step]) -> None:
        """Run every step of one folder that is not up to date, in order.

        A W&B run is open from the first to the last of its steps. A step is recorded after its W&B run is written.
        """
        if self.patient:
            steps = [replace(step, job=step.job_alone or step.job) for step in steps]
        count = self.total or sum(not step.only_logs for step in steps)
        self._begun = self._begun if self.total else 0
        self._last = {step.job: step for step in steps}
        self._open.clear()
        with self._stack as stack:
            for folder in dict.fromkeys(step.folder for step in steps):
                stack.enter_context(run_environment(folder))
            for step in steps:
                if step.only_logs:
                    earlier = [each for each in steps if each.job == step.job and not each.only_logs]
                    on_rank_zero(partial(self._log, step, earlier))
                else:
                    self._begun += 1
                    self._run(step, f"[{self._begun}/{count}] {step.of_seed}{step.what}")
                self._end_job(step)

    def _run(self, step: Step, called: str) -> None:
        with ExitStack() as locks:
            claimed = on_rank_zero(partial(_claim, step, locks, patient=self.patient))
            if claimed is None:
                rank_zero_info(f"{called}: up to date")
                return
            if step.training and not self.patient:  # one expert alone asks for nothing of the later steps
                self.experiment.check_parts()
            inputs, before = claimed
            last = f" (last time {before:.0f} s)" if before and before >= 1 else ""
            rank_zero_info(f"{called}: {step.doing}{last}")
            job, started = self._job(step, opens=step.opens_job), time.monotonic()
            if job is not None:
                job.use_artifacts(step.uses)
            work = partial(step.run, Context(inputs.key, step.outputs, step.inputs, self.experiment.trainer, job))
            measures = work() if step.collective else on_rank_zero(work)
            if job is not None:
                job.measures(measures or {})
                job.log_artifacts(step.logs)
            self._end_job(step)
            seconds = time.monotonic() - started
            on_rank_zero(partial(record_step, step, inputs, seconds))
            if seconds >= LONG:
                rank_zero_info(f"{called}: done in {seconds:.0f} s")

    def _log(self, step: Step, earlier: Sequence[Step]) -> None:
        """Run a step that only logs to W&B, on rank zero; without a W&B run, or if it fails, it is tried again.

        An agent of a W&B sweep logs evaluations alone.
        """
        assert step.job is not None
        job = self._job(step, opens=False)
        if (in_sweep() and step.job.type != "evaluate") or (job is None and status_of(step).is_current):
            return
        with logging_only("the runs of the methods"):
            if job is None and (job := self._job(step, opens=True, again=True)):
                for each in earlier:  # of a finished job: an interrupted offline run may have lost what it held
                    job.use_artifacts(each.uses)
                    job.repeat_curve()
                    job.log_artifacts(each.logs)
            if job is not None and job.run is not None:
                inputs = inputs_of(step)
                step.run(Context("", job=job))
                self._end_job(step)
                record_step(step, inputs)

    def _job(self, step: Step, *, opens: bool, again: bool = False) -> Job | None:
        """Return a step's job, which is started if it is not open; `again`: though it has finished before."""
        if step.job is not None and step.job not in self._open and opens:
            own = self._stack.enter_context(ExitStack())
            self._open[step.job] = own.enter_context(open_job(self.experiment, step.job, again=again)), own
        return self._open[step.job][0] if step.job in self._open else None

    def _end_job(self, step: Step) -> None:
        """End a step's job, if this is the last of its steps and it is open."""
        if self._last[step.job] is step and step.job in self._open:
            self._open.pop(step.job)[1].close()


@contextmanager
def open_job(experiment: Experiment, config: JobConfig, *, again: bool = False) -> Iterator[Job]:
    """Yield a job with its loggers: CSV files in its ``logs`` folder, and a W&B run in the experiment's group.

    All W&B runs of a seed are in ``runs/NAME/seed-K/wandb``, so that one ``wandb sync`` uploads them. An interrupted
    job resumes its run, whose id is stored in its folder; `again`: a finished one too. Several jobs may run at once. An
    agent of a W&B sweep logs to one run, the evaluation's.
    """
    seed, name, layout = config.seed, config.name, experiment.layout
    if seed is None:
        home, folder = (layout.base, layout.base) if name == "base" else (layout.folder, layout.logs)
    else:
        own = layout.seed(seed)
        home, folder = own.folder, own.expert(name).parent if config.type == "expert" else own.logs / name
    seeds = [] if seed is None else [f"seed-{seed}"]
    types = [] if config.type in ("method", "evaluate") or name.startswith(config.type) else [config.type]
    called = "-".join([experiment.name, *seeds, *types, name])  # quickstart-seed-0-expert-mnist
    folder.mkdir(parents=True, exist_ok=True)
    # CSV comes first: Lightning's log_dir is the first logger's, and W&B's is another for every run.
    loggers: list[Logger] = [CSVLogger(save_dir=folder, name="", version="logs")]
    run, kept, done = None, folder / f"wandb-run-id-{config.type}", folder / f"wandb-run-done-{config.type}"
    if is_rank_zero() and (config.type == "evaluate" or not in_sweep()):
        with logging_only(f"the start of the run '{called}'"):
            run = start_run(
                home,
                group=experiment.name,
                job_type=config.type,
                name=called,
                config=_run_config(experiment, seed) | dict(config.config),
                tags=[*config.tags, experiment.network.name, *experiment.wandb.tags],
                run_id=None if in_sweep() else _run_id(kept, done if again else kept),
            )
            loggers.append(WandbLogger(experiment=run))
    failed = True
    try:
        yield Job(experiment.name, seed, run, loggers, folder)
        failed = False
    finally:
        if run is not None:
            with logging_only(f"the end of the run '{called}'"):
                run.finish(exit_code=int(failed))
            if not failed:
                with suppress(FileNotFoundError):
                    kept.replace(done)


def _run_id(kept: Path, done: Path) -> str:
    """Return the W&B run id stored in one of two files, or a new id, which is written to the first."""
    for path in (kept, done):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    found = secrets.token_hex(4)
    write_text(kept, found)
    return found


def _run_config(experiment: Experiment, seed: int | None) -> dict[str, Any]:
    """Return a run's configuration: all options under ``experiment``, and the values that runs are grouped by."""
    code = experiment.code
    return {
        "experiment": {**experiment.config_dict(seed), "code": AUTO if code is None else code.matrix.tolist()},
        "network": experiment.network.name,
        "seed": seed,
        "samples_per_task": experiment.calibration.samples_per_task,
        "num_experts": len(experiment.tasks),
        "num_coded": 1 if code is None else code.num_coded,
    }
