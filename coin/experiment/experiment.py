"""A whole experiment from one YAML file, step by step, resumable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pandas as pd
from rich.console import Console

from coin.coding import DecoderConfig, DecoderKind, distinct_decoders, uniform
from coin.data import Augmentation, TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, FileError
from coin.experiment.codes import read_code
from coin.experiment.config import BaseConfig, CalibrationConfig, ExpertConfig, WandbConfig
from coin.experiment.jobs import FileKind, by_stem, common_tags, job, resolved, run_config
from coin.experiment.launch import ExpertJob, Launch, train_side_by_side
from coin.experiment.locks import alone_in, handed_on
from coin.experiment.merge import coded_paths
from coin.experiment.seed_run import SeedRun, expert_options
from coin.experiment.steps import Steps, step_key
from coin.experiment.training import join_processes, train_network
from coin.merging import MergeMethod
from coin.modules import Distillation
from coin.names import is_folder_name
from coin.networks import (
    NetworkConfig,
    brought_network,
    build_network,
    has_batchnorm,
    initial_network,
    save_network,
)
from coin.processes import from_first, is_first, process_count
from coin.reporting.report import write_report
from coin.reporting.summary import SUMMARY_CSV, write_summary
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_evaluation import log_summary
from coin.reporting.wandb_settings import logging_only
from coin.state import remove_leftovers, write_text
from coin.statistics import FisherKind

_SEEDS = range(2**32)
"""What NumPy takes for a seed."""


class Experiment:
    """Tasks, their experts, a code, merge methods and decoders, measured over seeds.

    Args:
        name: The experiment's name: its folder is ``output/name``.
        tasks: The tasks by name; each gets an expert.
        methods: The merge methods to compare.
        network: The architecture of the experts and the coded models.
        base: The shared initialisation; none takes the network's pretrained (or random) weights.
        expert: How the experts are trained, or where they are.
        code: R rows of N coding weights, one coded model a row; a number R, for the ready code of R coded models
            (`coin.coding.convex`); ``auto``, for one coded model whose weights every seed chooses from its calibration
            data (`coin.experiment.codes.choose_weights`); none, for one coded model that weighs all experts alike.
        calibration: The unlabelled samples for merging and decoding.
        decoders: The decoders to compare: kinds, or sections of a kind and its options; none takes all kinds.
        seeds: One run each; a seed draws the calibration samples and everything random after the base.
        output: Where experiments go.
        trainer: Options of the Trainer for all steps, such as ``accelerator``, ``devices``, ``precision``. With several
            devices or nodes, all processes go through all steps: trainings share out their batches (of
            ``batch_size`` samples a process, as always with Lightning), statistics and the evaluation their samples;
            the first process does the rest and writes all files, into a folder that all nodes share.
        wandb: What goes to W&B.

    Raises:
        ConfigurationError: The parts do not fit together.
    """

    def __init__(
        self,
        name: str,
        tasks: dict[str, TaskData],
        methods: list[MergeMethod | Distillation],
        network: NetworkConfig = NetworkConfig(),  # noqa: B008 (frozen)
        base: BaseConfig | None = None,
        expert: ExpertConfig = ExpertConfig(),  # noqa: B008 (frozen)
        code: list[list[float]] | int | str | None = None,
        calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008 (frozen)
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        seeds: list[int] | None = None,
        output: str = "runs",
        trainer: dict[str, Any] | None = None,
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 (frozen)
    ) -> None:
        if not is_folder_name(name):
            raise ConfigurationError(f"found name {name!r}, expected a plain folder name without slashes")
        if len(tasks) < 2:
            raise ConfigurationError(f"found {len(tasks)} task(s), expected at least two to code over")
        for task in tasks:
            if not is_folder_name(task) or any(mark in task for mark in "+|") or task in ("mean", "none"):
                raise ConfigurationError(
                    f"found task name {task!r}, expected one without + / | \\, no dot at its start, and not 'mean' or "
                    "'none'"
                )
        self.seeds = [0] if seeds is None else seeds
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(seed in _SEEDS for seed in self.seeds):
            raise ConfigurationError(f"found seeds {self.seeds}, expected distinct numbers from 0 to {_SEEDS[-1]}")
        self.code = read_code(code, len(tasks))
        """The code; none where every seed chooses its own."""
        variants = [(method.label, str(method.batchnorm)) for method in methods]
        if repeated := sorted({variant for variant in variants if variants.count(variant) > 1}):
            raise ConfigurationError(
                f"found method {repeated[0][0]} with BatchNorm policy {repeated[0][1]} twice; give one of them a label"
            )
        planned = self.code or uniform(len(tasks))  # a chosen code has one row too
        files = [path.name for method in methods for path in coded_paths(method, planned, Path())]
        if repeated_files := sorted({name for name in files if files.count(name) > 1}):
            raise ConfigurationError(f"found two methods with one file '{repeated_files[0]}'; change one's label")
        if unknown := sorted((expert.overrides.keys() | expert.checkpoints.keys()) - tasks.keys()):
            raise ConfigurationError(f"found options for an expert '{unknown[0]}', expected one of {', '.join(tasks)}")
        if base is not None and base.task is not None:
            network.check_content(base.task.content)
        for task, data in tasks.items():
            network.check_content(data.content)
            data.check_augmentation(expert_options(expert, task).augmentation)
            for method in methods:
                if isinstance(method, Distillation):
                    data.check_augmentation(Augmentation(method.hparams["augmentation"]))
        kinds = {str(getattr(m, "fisher_kind", None) or calibration.fisher_kind) for m in methods}
        if calibration.fisher_cotangents is not None and FisherKind.monte_carlo not in kinds:
            raise ConfigurationError(
                f"found fisher_cotangents={calibration.fisher_cotangents} and no method with a monte_carlo Fisher; "
                "leave it out, or set fisher_kind"
            )
        self.name = name
        self.network = network
        self.tasks = {task: task_with(data, image_size=network.image_size) for task, data in tasks.items()}
        self.methods = methods
        self.base = base
        self.expert = expert
        self.calibration = calibration
        self.decoders = distinct_decoders(list(DecoderKind) if decoders is None else decoders)
        self.folder = Path(output) / name
        self.trainer = trainer or {}
        self.wandb = wandb
        self._checked = False

    def run(
        self, dump: Callable[[int], str] | None = None, console: Console | None = None, launch: Launch | None = None
    ) -> pd.DataFrame:
        """Run every step whose inputs have changed, for every seed, and report.

        Args:
            dump: Returns the configuration that repeats the run of one seed, as YAML.
            console: Where progress and the table go.
            launch: How the experts are trained; needs `dump` where they are trained side by side.

        Returns:
            The summary over seeds: the contents of ``summary.csv``.

        Raises:
            CoinError: A step cannot be done.
        """
        console = self._begin(console)
        with alone_in(self.folder) as lock:
            from_first(lambda: remove_leftovers(self.folder))
            seeds = self._seed_runs(console)
            for run in seeds:
                if dump is not None and is_first():
                    write_text(run.folder / "config.yaml", dump(run.seed))
            if launch is not None and launch.side_by_side:
                self._train_side_by_side(seeds, launch, lock, console)
            for run in seeds:
                run.run()
            return from_first(self._summarise)

    def make_experts(self, task: str, console: Console | None = None) -> None:
        """Make one task's expert for every seed, and the shared initialisation; nothing else.

        Raises:
            CoinError: There is no such task, or the expert cannot be made.
        """
        if task not in self.tasks:
            raise ConfigurationError(f"found no task '{task}', expected one of {', '.join(self.tasks)}")
        for run in self._seed_runs(self._begin(console)):
            run.make_expert(task, run.tasks[task])

    def _begin(self, console: Console | None) -> Console:
        """Check what can be checked at once, gather all processes, and return where progress goes."""
        check_connection()
        self._check_batchnorm()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"cannot make the folder '{self.folder}' ({error.strerror}); choose another with output"
            ) from error
        join_processes(self.folder, self.trainer)
        if not is_first():
            console = Console(quiet=True)
        return console or Console(stderr=True, soft_wrap=True)

    def _seed_runs(self, console: Console) -> list[SeedRun]:
        """Prepare what all seeds share, and return the seeds to run."""
        from_first(Tasks(self.tasks).prepare_data)
        for task in self.tasks.values():
            _ = task.num_classes  # a folder that is missing or has one class is better told of before the pretraining
        initial = self.make_initial(console)
        return [SeedRun(self, seed, self.folder / f"seed-{seed}", initial, console) for seed in self.seeds]

    def _train_side_by_side(
        self, seeds: Sequence[SeedRun], launch: Launch, lock: IO[bytes] | None, console: Console
    ) -> None:
        if process_count() > 1:
            raise ConfigurationError(
                f"found {process_count()} processes that share every training, and a launch section; leave out one"
            )
        jobs = [
            ExpertJob(
                f"seed {run.seed}: expert {task}",
                run.folder / "config.yaml",
                task,
                run.expert_path(task).with_name("launch.log"),
                *handed_on(lock),
            )
            for run in seeds
            for task in self.tasks
            if run.lacks_expert(task)
        ]
        if jobs:
            self.check_parts()
            console.print(f"training {len(jobs)} experts, {launch.workers} at a time")
            say = partial(console.print, highlight=False)
            train_side_by_side(jobs, launch, self.folder / "submitit", say)

    def _summarise(self) -> pd.DataFrame:
        summary = write_summary(self.folder)
        self._log_summary(summary)
        for seed in self.seeds:
            write_report([self.folder / f"seed-{seed}"], None)
        write_report([self.folder], None)
        return summary

    def _log_summary(self, summary: pd.DataFrame) -> None:
        """Give all seeds together a W&B run, where there are several and their numbers are new."""
        steps, key = Steps(self.folder), step_key({}, [self.folder / SUMMARY_CSV])
        if len(self.seeds) < 2 or steps.finished("wandb-summary", key, []):
            return
        with logging_only("the summary over seeds"):
            config = run_config(self, resolved(self, self.tasks, None))
            log_summary(self.folder, summary, group=self.name, config=config, tags=common_tags(self))
        steps.finish("wandb-summary", key, [])

    def make_initial(self, console: Console) -> Path:
        """Make the shared initialisation, and return its file.

        With different class counts there is one file a count (experts of one count share their head, all experts the
        rest, random or not); the one with the most classes is returned.
        """
        folder = self.folder / "base"
        steps = Steps(folder)
        checkpoint: Path | None = None
        if self.base is not None and self.base.task is not None:
            checkpoint = folder / "base.safetensors"
            task = task_with(self.base.task, image_size=self.network.image_size)
            key = step_key({"network": self.network, "base": self.base, "task": task, "trainer": self.trainer})
            if not steps.finished("base", key, [checkpoint]):
                self.check_parts()
                console.print(f"base: pretraining {self.network.name} on {type(task).__name__}")
                from_first(task.prepare_data)
                config = run_config(self, resolved(self, self.tasks, None), task="base")
                with alone_in(folder), job(self, folder, "expert", "base", None, config, ["base"]) as work:
                    train_network(
                        self.base,
                        self.network,
                        task,
                        folder,
                        checkpoint,
                        key=key,
                        seed=0,
                        initial=None,
                        trainer_options=self.trainer,
                        loggers=work.loggers,
                    )
                    steps.finish("base", key, [checkpoint])
                    work.makes(FileKind.initialisation, by_stem(self._write_initial(steps, checkpoint)))
        elif self.base is not None and self.base.checkpoint is not None:
            checkpoint = Path(self.base.checkpoint)
        return self._write_initial(steps, checkpoint)[-1]

    def check_parts(self) -> None:
        """Look at what the user has brought, once, before anything is trained: the tasks' samples, trained experts.

        Raises:
            CoinError: Images cannot be read, a task has too few of them, or a checkpoint is not of this network.
        """
        if self._checked:
            return
        for name, task in self.tasks.items():
            task.calibration(self.calibration.samples_per_task)
            given = self.expert.checkpoints.get(name)
            if given is not None:
                brought_network(self.network, task.num_classes, Path(given))
        self._checked = True

    def _write_initial(self, steps: Steps, checkpoint: Path | None) -> list[Path]:
        """Write the shared initialisation once for every class count, where it is missing or of another base."""
        counts = sorted({task.num_classes for task in self.tasks.values()})
        largest = self.initial_path(counts[-1])
        for count in reversed(counts):
            path = self.initial_path(count)
            # What a constructor draws depends on the class count, below the head too.
            source = largest if checkpoint is None and path != largest else checkpoint
            key = step_key({"network": self.network, "classes": count}, [] if source is None else [source])
            if not steps.finished(f"initial-{count}", key, [path]):
                from_first(partial(self._save_initial, path, count, source, checkpoint))
                steps.finish(f"initial-{count}", key, [path])
        return [self.initial_path(count) for count in counts]

    def _save_initial(self, path: Path, count: int, source: Path | None, checkpoint: Path | None) -> None:
        network = initial_network(self.network, count, source)
        save_network(path, network, self.network, count, {"made_by": "coin run", "base": str(checkpoint)})

    def _check_batchnorm(self) -> None:
        """Refuse variants that differ in their BatchNorm policy alone, for a network that has no BatchNorm."""
        labels = [method.label for method in self.methods]
        if len(set(labels)) == len(labels):
            return
        if not has_batchnorm(build_network(replace(self.network, weights=None), 2)):
            repeated = next(label for label in labels if labels.count(label) > 1)
            raise ConfigurationError(
                f"found method {repeated} more than once for {self.network.name}, which has no BatchNorm for their "
                "policies to differ in; leave one, or give them labels"
            )

    def initial_path(self, num_classes: int) -> Path:
        """Return the file of the shared initialisation with `num_classes` outputs."""
        return self.folder / "base" / f"initial-{num_classes}.safetensors"
