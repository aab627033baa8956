"""An experiment: its options, checked as a whole; `coin.pipeline.run` runs it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coin.coding import distinct_decoders
from coin.coding.decoder_config import REPLICA
from coin.core.choices import did_you_mean
from coin.core.processes import is_rank_zero
from coin.data import Augmentation, TaskData
from coin.data.tasks import task_with
from coin.data.text import TextFile
from coin.errors import ConfigurationError
from coin.files.atomic import is_folder_name
from coin.files.downloads import fetch_from_hub
from coin.merging import Method
from coin.modules.recipe import trainable_names
from coin.networks import Compression, NetworkConfig
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.networks.registry import empty_network
from coin.pipeline.config import BaseConfig, CalibrationConfig, ExpertConfig, WandbConfig
from coin.pipeline.steps.imported import check_places
from coin.pipeline.steps.merge import read_code, variant_files
from coin.pipeline.steps.train import TrainingConfig
from coin.statistics import FisherKind
from coin.tracking.settings import check_connection

_SEEDS = range(2**32)
"""What NumPy takes for a seed."""
_SET_BY_STEPS = {
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "logger",
    "max_epochs",
    "max_steps",
}
"""Options of the Trainer."""


class Experiment:
    """Tasks, their experts, a code, merge methods and decoders, measured over seeds.

    Args:
        name: The experiment's name; its folder is ``output/name``.
        tasks: The tasks by name, ``{letters: {class_path: Glyphs, init_args: {classes: A-J}}, …}``, each of one expert.
        methods: The merge methods to compare: ``[{class_path: Refit, init_args: {adapters: {rank: 16}}}, …]``.
        network: The architecture of the experts and the coded models.
        base: The shared initialisation; by default the network's pretrained (or random) weights.
        expert: How the experts are trained, or their checkpoints.
        code: R rows of N coding weights, ``[[0.5, 0.5]]``, one coded model per row; a number R for the predefined code
            of R coded models (`coin.coding.convex`); by default one coded model with equal weights.
        calibration: The unlabelled samples for merging and decoding.
        decoders: The decoders to compare: their kinds; by default all.
        replicas: Compressed copies of all experts, as stand-ins to compare: sections of `coin.networks.Compression`'s
            options, such as ``{bits: 3}`` or ``{bits: 3, base_bits: 8}``.
        seeds: A list of seeds, or one; the seed fixes the calibration samples and everything random after the base.
        output: The folder of all experiments.
        trainer: Options of the Trainer for all steps, such as ``accelerator``, ``devices``, ``precision``. Several
            processes share out the batches of trainings (of ``batch_size`` samples each) and the samples of statistics
            and the evaluation; the first one does the rest and writes all files, into a folder that all nodes share.
        wandb: What is logged to W&B.
        config: All options as plain values, as jsonargparse writes them: what a run leaves for its repetition.

    Raises ConfigurationError where the parts do not fit together.
    """

    def __init__(
        self,
        name: str,
        tasks: dict[str, TaskData],
        methods: list[Method],
        network: NetworkConfig = NetworkConfig(),  # noqa: B008 (frozen)
        base: BaseConfig | None = None,
        expert: ExpertConfig = ExpertConfig(),  # noqa: B008 (frozen)
        code: list[list[float]] | int | None = None,
        calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008 (frozen)
        decoders: list[str] | None = None,
        replicas: list[dict[str, Any]] | None = None,
        seeds: int | list[int] | None = None,
        output: str = "runs",
        trainer: dict[str, Any] | None = None,
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 (frozen)
        *,
        config: Mapping[str, Any],
    ) -> None:
        _check_names(name, tasks, expert)
        self.name = name
        self.folder = Path(output) / name
        self.network = network
        self.tasks = {task: _for_network(data, network) for task, data in tasks.items()}
        self.base = base
        if base is not None and base.task is not None:
            self.base = replace(base, task=_for_network(base.task, network))
        self.expert = expert
        self.calibration = calibration
        self.trainer = trainer or {}
        self.wandb = wandb
        self.seeds = seeds if isinstance(seeds, list) else [seeds or 0]
        in_range = [seed for seed in self.seeds if seed in _SEEDS]
        if not self.seeds or len(set(in_range)) != len(self.seeds):
            raise ConfigurationError(
                f"found seeds {self.seeds}, expected distinct numbers from 0 to {_SEEDS[-1]}"
            )
        self.code = read_code(code, len(tasks))
        self.config = {**config, "code": self.code.matrix.tolist()}
        distinct_decoders(decoders)
        self.replicas = [Compression.of(section) for section in replicas or []]
        defaults = (calibration.fisher_kind, calibration.fisher_data)
        self.methods = [method.with_defaults(*defaults) for method in methods]
        self._check_variants()
        self._check_content()

    def _check_variants(self) -> None:
        """Raise ConfigurationError if two coded models or replicas have one name, or an option concerns no method."""
        names = [f"{REPLICA}-{how.name}" for how in self.replicas]
        for method in self.methods:
            names += variant_files(method)
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(
                    f"found method {name} twice; leave one out, or give one of them a label"
                )
        mc_samples = self.calibration.fisher_mc_samples
        kinds = {which.kind for method in self.methods for which in method.statistics()}
        if mc_samples is not None and FisherKind.monte_carlo not in kinds:
            found = f"found fisher_mc_samples={mc_samples} and no method with a monte_carlo Fisher"
            raise ConfigurationError(f"{found}; leave it out, or set fisher_kind")

    def _all_tasks(self) -> dict[str, TaskData]:
        """Return the tasks, and that of the base."""
        if self.base is None or self.base.task is None:
            return self.tasks
        return {**self.tasks, "base": self.base.task}

    def _check_content(self) -> None:
        """Raise ConfigurationError if the network does not read the tasks, or a task takes no augmentation given."""
        for data in self._all_tasks().values():
            self.network.check_content(data.content, data.vocabulary)
        for name, data in self.tasks.items():
            own = self.expert.of(name)
            data.check_augmentation(own.augmentation)
            for method in self.methods:
                data.check_augmentation(Augmentation(method.augmentation))

    def of_seeds(self, seeds: list[int]) -> dict[str, Any]:
        """Return the configuration with which ``coin run`` repeats these seeds."""
        return {**self.config, "seeds": seeds}

    def check(self) -> None:
        """Raise CoinError, before anything is downloaded, if options do not fit the network.

        A pattern of ``trainable`` that matches nothing does not fit.
        """
        check_connection()
        fixed = sorted(_SET_BY_STEPS & self.trainer.keys())
        if fixed:
            advice = "leave it out, and set output or expert.epochs"
            raise ConfigurationError(
                f"found trainer.{fixed[0]}, which each step sets itself; {advice}"
            )
        check_places(self.expert.checkpoints)
        network = empty_network(replace(self.network, weights=None), 2)  # checks name and options
        own = [task for task in self.tasks if task not in self.expert.checkpoints]
        recipes: list[TrainingConfig] = [self.expert.of(task) for task in own]
        if self.base is not None:
            recipes.append(self.base)
        for recipe in recipes:
            trainable_names(network, recipe.trainable)

    def fetch_experts(self) -> None:
        """Download what is missing of imported experts; other weights come where they are read."""
        for place in self.expert.checkpoints.values():
            if place.startswith(PREFIX):
                fetch_from_hub(local_place(place))

    def fetch_data(self, tasks: Iterable[str]) -> None:
        """Download what is missing of tasks' data."""
        for name in tasks:
            self.tasks[name].prepare_data()

    def check_data(self, tasks: Collection[str]) -> None:
        """Raise CoinError, before any training, if tasks' data are unreadable or too few."""
        if is_rank_zero():
            self.calibration.warn_of_too_few()
        own_samples = [method.samples_per_task or 0 for method in self.methods]
        samples = max(self.calibration.samples_per_task, *own_samples)
        for name in tasks:
            task = self.tasks[name]
            task.calibration(samples, name=name)
            if self.calibration.promise_samples:
                task.promise_samples(self.calibration.promise_samples, name=name)


def _check_names(name: str, tasks: Mapping[str, TaskData], expert: ExpertConfig) -> None:
    """Raise ConfigurationError for a name that is no folder's, fewer than two tasks, or options of no task."""
    if not is_folder_name(name):
        raise ConfigurationError(
            f"found name {name!r}, expected a plain folder name without slashes"
        )
    if len(tasks) < 2:
        raise ConfigurationError(f"found {len(tasks)} task(s), expected at least two; add tasks")
    for task in tasks:
        if not is_folder_name(task) or {"+", "|"} & {*task} or task in ("mean", "none"):
            expected = (
                "expected one without + / | \\, no dot at its start, and not 'mean' or 'none'"
            )
            raise ConfigurationError(f"found task name {task!r}, {expected}")
    for task in (*expert.overrides, *expert.checkpoints):
        if task not in tasks:
            hint = did_you_mean(task, tasks)
            raise ConfigurationError(
                f"found options for an expert '{task}'{hint}, expected one of {', '.join(tasks)}"
            )


def _for_network(task: TaskData, network: NetworkConfig) -> TaskData:
    """Return a task with the network's input size and, of texts, the tokenizer of Hugging Face's network."""
    task = task_with(task, image_size=network.image_size)
    # Read here so that files without classes or columns show before anything is fetched.
    _ = task.classes
    source = network.source
    if (
        not isinstance(task, TextFile)
        or task.tokenizer is not None
        or not isinstance(source, HuggingFace)
    ):
        return task
    if source.tokenizer is None:
        found = (
            f"found no tokenizer.json of '{network.name}', expected it for {type(task).__name__}"
        )
        raise ConfigurationError(f"{found}; set the task's tokenizer to that of the network")
    return task_with(task, tokenizer=str(source.tokenizer))
