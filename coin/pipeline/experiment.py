"""An experiment: its options, checked as a whole; `coin.pipeline.run` runs it."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.coding import DecoderConfig, distinct_decoders
from coin.coding.decoder_config import REPLICA
from coin.core.choices import did_you_mean
from coin.data import Augmentation, TaskData
from coin.data.tasks import task_with
from coin.errors import CoinWarning, ConfigurationError
from coin.files.atomic import is_folder_name
from coin.merging import Method
from coin.modules import Expert
from coin.networks import Compression, NetworkConfig, check_heads, has_batchnorm, import_checkpoint
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.networks.registry import empty_network
from coin.pipeline.config import BaseConfig, CalibrationConfig, ExpertConfig, WandbConfig
from coin.pipeline.options import config_dict, to_config
from coin.pipeline.steps.merge import coded_name, read_code
from coin.pipeline.steps.train import TrainingConfig
from coin.statistics import FisherKind

_SEEDS = range(2**32)
"""What NumPy takes for a seed."""


class Experiment:
    """Tasks, their experts, a code, merge methods and decoders, measured over seeds.

    Args:
        name: The experiment's name; its folder is ``output/name``.
        tasks: The tasks by name; each gets an expert.
        methods: The merge methods to compare.
        network: The architecture of the experts and the coded models.
        base: The shared initialisation; by default the network's pretrained (or random) weights.
        expert: How the experts are trained, or their checkpoints.
        code: R rows of N coding weights, one coded model per row; a number R for the predefined code of R coded models
            (`coin.coding.convex`); by default one coded model with equal weights.
        calibration: The unlabelled samples for merging and decoding.
        decoders: The decoders to compare: kinds, or sections of a kind and its options; by default all kinds.
        replicas: Compressed copies of all experts, as stand-ins to compare: sections of `coin.networks.Compression`'s
            options, such as ``{bits: 3}``, ``{bits: 3, base_bits: 8}`` or ``{rank: 8}``.
        seeds: A list of seeds, or one; the seed fixes the calibration samples and everything random after the base.
        output: The folder of all experiments.
        trainer: Options of the Trainer for all steps, such as ``accelerator``, ``devices``, ``precision``. Several
            processes share out the batches of trainings (of ``batch_size`` samples each) and the samples of statistics
            and the evaluation; the first one does the rest and writes all files, into a folder that all nodes share.
        wandb: What is logged to W&B.

    Raises:
        ConfigurationError: The parts do not fit together.
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
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        replicas: list[dict[str, Any]] | None = None,
        seeds: int | list[int] | None = None,
        output: str = "runs",
        trainer: dict[str, Any] | None = None,
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self._given: dict[str, Any] = {option: value for option, value in locals().items() if option != "self"}
        if not is_folder_name(name):
            raise ConfigurationError(f"found name {name!r}, expected a plain folder name without slashes")
        if len(tasks) < 2:
            raise ConfigurationError(f"found {len(tasks)} task(s), expected at least two; add tasks")
        for task in tasks:
            if not is_folder_name(task) or any(mark in task for mark in "+|") or task in ("mean", "none"):
                raise ConfigurationError(
                    f"found task name {task!r}, expected one without + / | \\, no dot at its start, and not 'mean' or "
                    "'none'"
                )
        self.seeds = [seeds or 0] if seeds is None or isinstance(seeds, int) else seeds
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(seed in _SEEDS for seed in self.seeds):
            raise ConfigurationError(f"found seeds {self.seeds}, expected distinct numbers from 0 to {_SEEDS[-1]}")
        self.code = read_code(code, len(tasks))
        self.decoders, self.takes_all_decoders = distinct_decoders(decoders), decoders is None
        settings = (calibration.fisher_kind, calibration.fisher_data, self.decoders)
        methods = [method.with_defaults(*settings) for method in methods]
        self.replicas = [Compression.of(section) for section in replicas or []]
        if any(replica.rounding for replica in self.replicas):
            raise ConfigurationError("found rounding in replicas, expected none; only merge methods have this option")
        made = [(method, end) for method in methods for end in ("", *(f"-{each.name}" for each in method.compress))]
        called = [f"{REPLICA}-{each.name}" for each in self.replicas]
        names = [*(coded_name(method) + end for method, end in made), *called]
        variants = [*((method.label + end, str(method.batchnorm)) for method, end in made), *((c, "") for c in called)]
        for name_, variant in zip(names, variants, strict=True):
            if names.count(name_) > 1 or variants.count(variant) > 1:
                raise ConfigurationError(
                    f"found method {variant[0]} with BatchNorm policy {variant[1] or 'none'} twice, or another "
                    f"of its file's name '{name_}'; leave one out, or give one of them a label"
                )
        if unknown := sorted((expert.overrides.keys() | expert.checkpoints.keys()) - tasks.keys()):
            meant = did_you_mean(unknown[0], tasks)
            raise ConfigurationError(
                f"found options for an expert '{unknown[0]}'{meant}, expected one of {', '.join(tasks)}"
            )
        if base is not None and base.task is not None:
            network.check_content(base.task.content)
            check_heads(network, base.task.head is not None, "base")
        for task, data in tasks.items():
            network.check_content(data.content)
            check_heads(network, data.head is not None, task)
            own = expert.of(task)
            data.check_augmentation(own.augmentation, own.transform)
            for method in methods:
                data.check_augmentation(Augmentation(method.augmentation))
        kinds = {which.kind for method in methods for which in method.statistics()}
        if calibration.fisher_mc_samples is not None and FisherKind.monte_carlo not in kinds:
            raise ConfigurationError(
                f"found fisher_mc_samples={calibration.fisher_mc_samples} and no method with a monte_carlo Fisher; "
                "leave it out, or set fisher_kind"
            )
        self.name = name
        self.network = network
        self.tasks = {task: task_with(data, image_size=network.image_size) for task, data in tasks.items()}
        self.methods = methods
        self.base = base
        self.expert = expert
        self.calibration = calibration
        self.folder = Path(output) / name
        self.trainer = trainer or {}
        self.wandb = wandb
        self._checked = False

    @property
    def most_samples(self) -> int:
        """The largest P of a method."""
        return max(self.calibration.samples_per_task, *(method.samples_per_task or 0 for method in self.methods), 0)

    def as_yaml(self, seeds: list[int] | None = None) -> str:
        """Return the configuration with which ``coin run`` repeats these seeds, or all."""
        given = to_config({**self._given, "tasks": self.tasks, "seeds": self.seeds if seeds is None else seeds})
        return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))

    def tasks_of(self, seed: int) -> dict[str, TaskData]:
        """Return the tasks with a seed set."""
        return {name: task_with(task, seed=seed) for name, task in self.tasks.items()}

    def config_dict(self, seed: int | None) -> dict[str, Any]:
        """Return the options of one seed, or of all seeds, with their defaults but without the code."""
        names = ("network", "base", "expert", "calibration", "methods", "trainer")
        return {name: config_dict(getattr(self, name)) for name in names} | {
            "name": self.name,
            "decoders": [decoder.name for decoder in self.decoders],
            "tasks": config_dict(self.tasks if seed is None else self.tasks_of(seed)),
            "seed": seed,
            **({"replicas": config_dict(self.replicas)} if self.replicas else {}),
        }

    def check_parts(self) -> None:
        """Raise CoinError, before any training, if data are unreadable or too few, or a checkpoint does not fit."""
        if self._checked:
            return
        for name, task in self.tasks.items():
            task.calibration(self.most_samples, name=name)
            if self.calibration.promise_samples:
                task.promise(self.calibration.promise_samples, name=name)
            given = self.expert.checkpoints.get(name)
            if given is not None and not given.startswith(PREFIX):  # those of Hugging Face's are read at their import
                import_checkpoint(self.network, task.num_classes, Path(given))
        self._checked = True

    def warn(self) -> None:
        """Warn of too few samples, and of experts that are imported beside others from a network without weights."""
        self.calibration.warn_of_too_few()
        others = [task for task in self.tasks if task not in self.expert.checkpoints]
        if self.expert.checkpoints and others and self.network.weights is None and self.base is None:
            warnings.warn(
                f"found checkpoints beside experts that are fine-tuned without network.weights ({', '.join(others)}), "
                "expected one start for all; give the checkpoints' own",
                CoinWarning,
                stacklevel=2,
            )

    def every_task(self) -> list[TaskData]:
        """Return the tasks, that of the base among them."""
        base = self.base
        return [*self.tasks.values(), *([base.task] if base is not None and base.task is not None else [])]

    def hub_places(self) -> list[str]:
        """Return the folders and IDs of Hugging Face's that experts and a zero-shot network come from."""
        source = self.network.source
        own = [source.place] if isinstance(source, HuggingFace) and source.zero_shot and source.weights else []
        given = (local_place(place) for place in self.expert.checkpoints.values() if place.startswith(PREFIX))
        return list(dict.fromkeys([*own, *given]))

    def check_files(self) -> None:
        """Raise CoinError, before any training, if a user's own data lack something."""
        for task in self.every_task():
            task.check_files()

    def check_fit(self) -> None:
        """Check, before anything is trained, that the options fit this network (fail early).

        Raises ConfigurationError if variants differ in their BatchNorm policy alone, and there is no BatchNorm; if a
        pattern matches no parameter or layer, or a head with its own rate is not trained.
        """
        network, labels = self.network, [method.label for method in self.methods]
        repeated = [label for label in labels if labels.count(label) > 1]
        built = empty_network(replace(network, weights=None), 2)  # or refuses its options
        if repeated and not has_batchnorm(built):
            raise ConfigurationError(
                f"found method {repeated[0]} more than once for {network.name}, which has no BatchNorm for their "
                "policies to differ in; leave one, or give them labels"
            )
        trained: list[TrainingConfig] = [
            self.expert.of(task) for task in self.tasks if task not in self.expert.checkpoints
        ]
        if self.base is not None and self.base.task is not None:
            trained.append(self.base)
        checked: list[dict[str, Any]] = [{"trainable": None, "head_lr": None}]
        for config in trained:
            options = {name: getattr(config, name) for name in checked[0]}
            if options not in checked:
                Expert(network.name, network.image_size, options=network.options, num_classes=2, **options)
                checked.append(options)
