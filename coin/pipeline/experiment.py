"""An experiment: its options, checked as a whole; `coin.pipeline.run` runs it."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

from coin.coding import DecoderConfig, distinct_decoders
from coin.coding.decoder_config import REPLICA
from coin.core.choices import did_you_mean
from coin.core.processes import is_rank_zero, rank_zero_info
from coin.data import Augmentation, TaskData
from coin.data.tasks import Tasks, task_with
from coin.data.text import TextTask
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.files.atomic import is_folder_name, sha256_of
from coin.files.downloads import fetch_from_hub
from coin.files.safetensors import load_provenance
from coin.merging import Method
from coin.merging.expert_sources import spread
from coin.modules import Expert
from coin.networks import Compression, NetworkConfig, head_name
from coin.networks.files import check_heads, import_checkpoint, import_pretrained, initial_network
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.networks.registry import empty_network
from coin.pipeline.config import BaseConfig, CalibrationConfig, ExpertConfig, WandbConfig
from coin.pipeline.steps.evaluation import UNRELATED
from coin.pipeline.steps.merge import read_code, variant_files
from coin.reporting.summary import is_weak
from coin.statistics import FisherKind

_CHANCE_SAMPLES = 100  # that tell whether an expert guesses
_SEEDS = range(2**32)
"""What NumPy takes for a seed."""


def tell_distances(name: str, expert: nn.Module, base: nn.Module, first: nn.Module) -> None:
    """Say how far an expert's body is from the base and from the first expert, and warn where the base is another."""
    head = (f"{head_name(expert)}.",)
    from_base, from_first = (
        spread([dict(other.named_parameters()), dict(expert.named_parameters())], [0.5, 0.5], head)
        for other in (base, first)
    )
    beside = "" if expert is first else f", {from_first:.1%} from the first expert"
    rank_zero_info(f"expert {name}: its weights are {from_base:.1%} from the base{beside}")
    if from_base > UNRELATED:
        told = f"found the expert '{name}' {from_base:.0%} of its weights from the base, as unrelated networks are"
        expected = "expected the base that it was fine-tuned from; give it as base.checkpoint or network.weights"
        warnings.warn(f"{told}, {expected}", CoinWarning, stacklevel=2)


def _for_network(task: TaskData, network: NetworkConfig) -> TaskData:
    """Return a task with the network's input size and, of texts, the tokenizer of Hugging Face's network."""
    task, source = task_with(task, image_size=network.image_size), network.source
    if not isinstance(task, TextTask) or task.tokenizer is not None:
        return task
    if not isinstance(source, HuggingFace) or source.reads != task.content:
        return task
    if (own := source.tokenizer) is None:
        told = f"found no tokenizer.json of '{network.name}', expected it for {type(task).__name__}"
        raise ConfigurationError(f"{told}; set the task's tokenizer to that of the network")
    return task_with(task, tokenizer=str(own))


@torch.no_grad()
def warn_of_chance(name: str, expert: nn.Module, task: TaskData, classes: Sequence[str]) -> None:
    """Warn where an expert that was brought is hardly more often right than chance on training samples.

    `classes` are those of its checkpoint in the order of its logits, none where it does not say them.
    """
    train = task.splits.train
    drawn = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:_CHANCE_SAMPLES])
    right = 0
    for places in torch.split(torch.arange(len(drawn)), 64):
        logits = expert.eval()(drawn.inputs(places, task.image_size))
        right += int((logits.argmax(1) == drawn.targets[places]).sum())
    accuracy, chance = right / len(drawn), 1 / task.num_classes
    if not is_weak(accuracy, chance):
        return
    told = (
        f"found the expert '{name}' right on {accuracy:.1%} of {len(drawn)} training samples (chance is {chance:.1%})"
    )
    order = f"the task's classes are {_in_order(task.classes)}"
    if classes:
        order = f"its own classes are {_in_order(classes)}, {order}"
    expected = f"expected more; {order}: check their order, and that it was trained on such inputs"
    warnings.warn(f"{told}, {expected}", CoinWarning, stacklevel=2)


def _in_order(classes: Sequence[str]) -> str:
    """Return classes as text, of many the first ones."""
    return ", ".join([*classes[:8], *(["…"] if len(classes) > 8 else [])])


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
            options, such as ``{bits: 3}`` or ``{bits: 3, base_bits: 8}``.
        seeds: A list of seeds, or one; the seed fixes the calibration samples and everything random after the base.
        output: The folder of all experiments.
        trainer: Options of the Trainer for all steps, such as ``accelerator``, ``devices``, ``precision``. Several
            processes share out the batches of trainings (of ``batch_size`` samples each) and the samples of statistics
            and the evaluation; the first one does the rest and writes all files, into a folder that all nodes share.
        wandb: What is logged to W&B.
        given: All options as plain values, as a file has them: what a run leaves for its repetition.

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
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        replicas: list[dict[str, Any]] | None = None,
        seeds: int | list[int] | None = None,
        output: str = "runs",
        trainer: dict[str, Any] | None = None,
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 (frozen)
        given: Mapping[str, Any] | None = None,
    ) -> None:
        if not is_folder_name(name):
            raise ConfigurationError(f"found name {name!r}, expected a plain folder name without slashes")
        if len(tasks) < 2:
            raise ConfigurationError(f"found {len(tasks)} task(s), expected at least two; add tasks")
        for task in tasks:
            if not is_folder_name(task) or any(mark in task for mark in "+|") or task in ("mean", "none"):
                expected = "expected one without + / | \\, no dot at its start, and not 'mean' or 'none'"
                raise ConfigurationError(f"found task name {task!r}, {expected}")
        if unknown := sorted((expert.overrides.keys() | expert.checkpoints.keys()) - tasks.keys()):
            told = f"found options for an expert '{unknown[0]}'{did_you_mean(unknown[0], tasks)}"
            raise ConfigurationError(f"{told}, expected one of {', '.join(tasks)}")
        self.name = name
        self.folder = Path(output) / name
        self.network = network
        self.tasks = {task: _for_network(data, network) for task, data in tasks.items()}
        self.base = base if base is None or base.task is None else replace(base, task=_for_network(base.task, network))
        self._data = [*self.tasks.items(), *([("base", base.task)] if base is not None and base.task else [])]
        self.expert = expert
        self.calibration = calibration
        self.trainer = trainer or {}
        self.wandb, self.given = wandb, given or {}
        self.seeds = [seeds or 0] if seeds is None or isinstance(seeds, int) else seeds
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(seed in _SEEDS for seed in self.seeds):
            raise ConfigurationError(f"found seeds {self.seeds}, expected distinct numbers from 0 to {_SEEDS[-1]}")
        self.code = read_code(code, len(tasks))
        self.decoders, self.takes_all_decoders = distinct_decoders(decoders), decoders is None
        self.replicas = [Compression.of(section) for section in replicas or []]
        settings = (calibration.fisher_kind, calibration.fisher_data, self.decoders)
        self.methods = [method.with_defaults(*settings) for method in methods]
        self._check_names()
        self._check_content()
        kinds = {which.kind for method in self.methods for which in method.statistics()}
        if calibration.fisher_mc_samples is not None and FisherKind.monte_carlo not in kinds:
            told = f"found fisher_mc_samples={calibration.fisher_mc_samples} and no method with a monte_carlo Fisher"
            raise ConfigurationError(f"{told}; leave it out, or set fisher_kind")

    def _check_names(self) -> None:
        """Raise ConfigurationError if two coded models or replicas have one name, or differ in nothing."""
        names = [name for method in self.methods for name in variant_files(method)]
        names += [f"{REPLICA}-{how.name}" for how in self.replicas]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigurationError(f"found method {twice[0]} twice; leave one out, or give one of them a label")

    def _check_content(self) -> None:
        """Raise ConfigurationError if the network does not read the tasks, or a task takes no augmentation given."""
        for name, data in self._data:
            self.network.check_content(data.content, data.vocabulary)
            check_heads(self.network, data.head is not None, name)
        for name, data in self.tasks.items():
            own = self.expert.of(name)
            data.check_augmentation(own.augmentation)
            for method in self.methods:
                data.check_augmentation(Augmentation(method.augmentation))

    def as_yaml(self, seeds: list[int] | None = None) -> str:
        """Return the configuration with which ``coin run`` repeats these seeds, or all."""
        given = {**self.given, "seeds": self.seeds if seeds is None else seeds}
        return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))

    def recorded(self, seed: int | None) -> dict[str, Any]:
        """Return the options of one seed, or of what all seeds share, as results and W&B have them."""
        own = {name: value for name, value in self.given.items() if name not in ("seeds", "output", "wandb")}
        return {**own, "code": self.code.matrix.tolist(), "seed": seed}

    def check_parts(self) -> None:
        """Raise CoinError, before any training, if data are unreadable or too few, or a checkpoint does not fit."""
        if is_rank_zero():
            self.calibration.warn_of_too_few()
        samples = max([self.calibration.samples_per_task, *(method.samples_per_task or 0 for method in self.methods)])
        for name, task in self.tasks.items():
            task.calibration(samples, name=name)
            if self.calibration.promise_samples:
                task.promise(self.calibration.promise_samples, name=name)
        self._check_checkpoints()

    def _check_checkpoints(self) -> None:
        """Refuse experts that do not fit; say how far they are from the base and the first of them, and who guesses."""
        of_base = None if self.base is None or self.base.checkpoint is None else Path(self.base.checkpoint)
        base_is_trained = self.base is not None and self.base.task is not None
        if base_is_trained and self.expert.checkpoints:
            rank_zero_info("the base is trained in this run: how far experts that are brought are from it is not known")
        base: nn.Module | None = None
        first: nn.Module | None = None
        for name, task in self.tasks.items():
            if (given := self.expert.checkpoints.get(name)) is None:
                continue
            expert, classes = self._brought(name, given, of_base)
            if not is_rank_zero():
                continue
            warn_of_chance(name, expert, task, classes)
            if base_is_trained:  # and not there yet
                continue
            if base is None or first is None:
                base, first = initial_network(self.network, task.num_classes, of_base), expert
            tell_distances(name, expert, base, first)

    def _brought(self, name: str, given: str, of_base: Path | None) -> tuple[nn.Module, list[str]]:
        """Return an expert from a file or a place of Hugging Face's, and its checkpoint's classes if it names them."""
        task, source = self.tasks[name], self.network.source
        if not given.startswith(PREFIX):
            expert = import_checkpoint(self.network, task.num_classes, Path(given))
            with suppress(FileError):  # no file of coin's
                return expert, list(map(str, load_provenance(Path(given)).get("classes") or ()))
            return expert, []
        expert = initial_network(self.network, task.num_classes, of_base)
        import_pretrained(self.network, given, expert, task.zero_shot, name)
        return expert, source.classes(local_place(given)) if isinstance(source, HuggingFace) else []

    def fetch(self) -> None:
        """Download what is missing of experts, CLIP and data; other weights are downloaded where they are read."""
        source = self.network.source
        own = [source.place] if isinstance(source, HuggingFace) and source.zero_shot and source.weights else []
        given = [local_place(place) for place in self.expert.checkpoints.values() if place.startswith(PREFIX)]
        for place in dict.fromkeys([*own, *given]):
            fetch_from_hub(place)
        Tasks(self.tasks).prepare_data()
        self.check_files()

    def _check_one_expert_each(self) -> None:
        """Raise ConfigurationError if two tasks have one file, or one place of Hugging Face's."""
        files: dict[str, str] = {}
        for name, place in self.expert.checkpoints.items():
            contents = sha256_of(Path(place)) if Path(place).is_file() else place
            if contents in files:
                told = f"found one expert for the tasks '{files[contents]}' and '{name}', '{place}'"
                raise ConfigurationError(f"{told}, expected one of its own for each; check expert.checkpoints")
            files[contents] = name

    def check_files(self) -> None:
        """Raise CoinError, before any training, if a user's own data lack something."""
        for _, task in self._data:
            task.check_files()

    def check(self) -> None:
        """Raise CoinError, before anything is downloaded, if options do not fit the network, or own data lack anything.

        A pattern of ``trainable`` that matches nothing does not fit.
        """
        self._check_one_expert_each()
        empty_network(replace(self.network, weights=None), 2)  # which checks its name and options
        trained = [self.expert.of(task) for task in self.tasks if task not in self.expert.checkpoints]
        checked: list[list[str] | None] = [None]
        for each in (*trained, *([self.base] if self.base is not None else [])):
            if each.trainable not in checked:
                checked.append(each.trainable)
                options: Any = {"trainable": each.trainable, "num_classes": 2}
                Expert(self.network.name, self.network.image_size, options=self.network.options, **options)
        self.check_files()
