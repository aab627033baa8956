"""Running steps: the one place that knows records, keys, locks, ranks, W&B jobs, artifacts and progress."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from coin.core.processes import on_rank_zero, rank_zero_info
from coin.pipeline.experiment import Experiment
from coin.pipeline.job import Job, JobConfig
from coin.pipeline.open_job import open_job
from coin.pipeline.records import Status, alone, folder_lock, record_step, reuse_from_sweep, status_of, step_key
from coin.pipeline.step import Context, Step
from coin.reporting.wandb_settings import in_sweep, logging_only

LONG = 10.0
"""The seconds from which on a step says how long it took."""


def is_done(step: Step, status: Status | None = None) -> bool:
    """Return whether a step is up to date, here or, if it is shared, in another point of the sweep."""
    return (status or status_of(step)).is_current or on_rank_zero(partial(reuse_from_sweep, step))


class Runner:
    """Runs steps one after the other; with several processes, all of them call it with the same steps.

    Args:
        experiment: The experiment.
        patient: Whether to wait for other commands that run the same steps.
    """

    def __init__(self, experiment: Experiment, *, patient: bool = False) -> None:
        self.experiment = experiment
        self.patient = patient

    def run(self, steps: Sequence[Step]) -> None:
        """Run every step that is not up to date, in order; a W&B job is open from its first step to its last."""
        last = {step.job: place for place, step in enumerate(steps)}
        count = sum(not step.only_logs for step in steps)
        with ExitStack() as stack:
            jobs = _Jobs(self.experiment, steps, stack)
            for place, step in enumerate(steps):
                if step.only_logs:
                    on_rank_zero(partial(self._log, step, jobs))
                else:
                    self._run(step, jobs, f"[{place + 1}/{count}] {step.of_seed}")
                if last[step.job] == place:
                    jobs.close(step.job)

    def _run(self, step: Step, jobs: "_Jobs", place: str) -> None:
        if self.patient and is_done(step):  # nobody else's lock is worth waiting for
            rank_zero_info(f"{place}{step.what}: up to date")
            return
        with self._locked(step) as key:
            status = status_of(step)
            if is_done(step, status):
                rank_zero_info(f"{place}{step.what}: up to date")
                return
            if step.trains:
                self.experiment.check_parts()
            expected = f" (last time {status.seconds:.0f} s)" if status.seconds and status.seconds >= 1 else ""
            rank_zero_info(f"{place}{step.what}: {step.doing}{expected}")
            job = jobs.get(step.job, open=step.opens_job)
            started = time.monotonic()
            if job is not None:
                job.use_artifacts(step.uses)
            work = partial(step.run, Context(key, step.outputs, self.experiment.trainer, job))
            measures = work() if step.collective else on_rank_zero(work)
            if job is not None:
                job.measures(measures or {})
                job.log_artifacts(step.logs)
            seconds = time.monotonic() - started
            record_step(step, seconds)
            if seconds >= LONG:
                rank_zero_info(f"{place}{step.what}: done in {seconds:.0f} s")

    def _log(self, step: Step, jobs: "_Jobs") -> None:
        """Run a step that writes to W&B alone, on rank zero; without a run, or if that fails, it is tried next time."""
        job = jobs.get(step.job, open=False)
        if in_sweep() or (job is None and status_of(step).is_current):
            return
        with logging_only("the runs of the methods"):
            job = job or jobs.reopened(step)
            if job.run is not None:
                step.run(Context("", job=job))
                record_step(step)

    @contextmanager
    def _locked(self, step: Step) -> Iterator[str]:
        """Lock the step, if it has a folder for that, and yield its key."""
        with ExitStack() as locks:
            if step.lock is not None or self.patient:
                locks.enter_context(folder_lock(step.lock or step.folder / ".steps" / step.name, patient=self.patient))
            key = on_rank_zero(partial(step_key, step.options, step.inputs))
            locks.enter_context(alone(step, key))
            yield key


class _Jobs:
    """The jobs that are open, by what they are."""

    def __init__(self, experiment: Experiment, steps: Sequence[Step], stack: ExitStack) -> None:
        self.experiment, self.steps, self.stack = experiment, steps, stack
        self._open: dict[JobConfig | None, tuple[Job, ExitStack]] = {}

    def get(self, config: JobConfig | None, *, open: bool) -> Job | None:
        """Return a step's job, which is started if it is not open."""
        if config is not None and config not in self._open and open:
            self._start(config, again=False)
        return self._open[config][0] if config in self._open else None

    def reopened(self, step: Step) -> Job:
        """Open a finished job again, and log again what it held: an interrupted offline run may have lost it."""
        assert step.job is not None
        job = self._start(step.job, again=True)
        for earlier in self.steps:
            if earlier.job == step.job and not earlier.only_logs:
                job.use_artifacts(earlier.uses)
                job.repeat_curve()
                job.log_artifacts(earlier.logs)
        return job

    def close(self, config: JobConfig | None) -> None:
        """End a job, if it is open."""
        if config in self._open:
            self._open.pop(config)[1].close()

    def _start(self, config: JobConfig, *, again: bool) -> Job:
        own = self.stack.enter_context(ExitStack())
        job = own.enter_context(open_job(self.experiment, config, again=again))
        self._open[config] = job, own
        return job
