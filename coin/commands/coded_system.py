"""The coded system of a finished experiment: its experts, one method's coded models, one decoder, and their results."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jsonargparse import ArgumentParser

from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, make_decoder
from coin.coding.decoder_config import REPLICA
from coin.errors import ConfigurationError, FileError
from coin.evaluation.variants import read_coded
from coin.files.safetensors import load_provenance
from coin.files.yaml import read_yaml
from coin.networks import load_network
from coin.networks.experts import ExpertFiles
from coin.reporting.extras import read_promises
from coin.reporting.results import RESULTS_CSV, read_configuration, read_results, requested_policy
from coin.reporting.summary import REFERENCES, seed_folders
from coin.serving.decodings import coded_layout, standin_layout
from coin.serving.layout import Layout

if TYPE_CHECKING:  # they import Lightning, which only the decoders' fit needs
    from coin.data import TaskData
    from coin.data.tasks import Tasks
    from coin.modules import Coded


@dataclass(frozen=True)
class Choice:
    """Which of an experiment's coded systems to use.

    Args:
        method: The merge method whose coded models serve.
        batchnorm: The BatchNorm policy requested in its run.
        decoder: The decoder, as the results call it. It is fitted on the experiment's calibration samples, once.

    Options that are not given are those of the most accurate decoded answers in the results.
    """

    method: str | None = None
    batchnorm: str | None = None
    decoder: str | None = None


@dataclass(frozen=True)
class CodedSystem:
    """A coded system of one seed, with experts and coded models in the code's order, and its results in all seeds."""

    folder: Path
    experts: ExpertFiles
    coded: tuple[Path, ...]
    code: Code
    method: str
    batchnorm: str
    decoder: DecoderConfig
    results: pd.DataFrame

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self.experts.paths)

    @property
    def classes(self) -> dict[str, list[str]]:
        """The names of every task's classes; numbers where the expert's file does not say."""
        opened = self.experts.opened
        return {task: list(map(str, file.provenance.get("classes") or range(file.num_classes)))
                for task, file in opened.items()}  # fmt: skip

    @property
    def layout(self) -> Layout:
        """The servers, and which of them can replace which experts."""
        if self.decoder.reads_survivors:
            return coded_layout(self.code)
        return standin_layout(self.code, every_row=self.decoder.kind is not DecoderKind.expert_head)

    @property
    def decoded_accuracy(self) -> dict[int, float]:
        """The mean accuracy of decoded answers, by the number of experts lost at once."""
        sizes = self.results["erased"].str.count(r"\+") + 1
        return {int(size): float(rows["decoded_accuracy"].mean()) for size, rows in self.results.groupby(sizes)}

    @property
    def title(self) -> str:
        """A one-line summary of the system and its accuracy."""
        right = " and ".join(f"{100 * share:.2f} % with {lost} lost" for lost, share in self.decoded_accuracy.items())
        name = f"{self.method} ({self.batchnorm})" if self.batchnorm else self.method
        return f"coded: {name} with the {self.decoder.name} decoder; decoded answers that are right: {right}"

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer of all tasks of a system for texts; None for images and for the packaged encoder."""
        if self.experts.config.reads != "texts":
            return None
        found = {getattr(task, "tokenizer", None) for task in self._described().values()}
        if len(found) > 1:
            raise ConfigurationError(f"found tokenizers {found}, expected one for all tasks; train them with one")
        tokenizer: str | None = found.pop()
        return tokenizer

    def data(self) -> "Tasks":
        """Return the tasks with this seed's samples, loaded."""
        from coin.data.tasks import Tasks

        data = Tasks(self._described(), **self._calibration)
        data.prepare_data()
        data.setup()
        return data

    @property
    def _calibration(self) -> dict[str, Any]:
        given = self._configuration["calibration"]
        options = {name: given[name] for name in ("samples_per_task", "batch_size")}
        return {**options, "seed": self._configuration["seeds"][0]}

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise FileError(f"found no '{path}', which says what the tasks are; use --decoder=linear, or coin run")
        return dict(read_yaml(path))

    def _described(self) -> "dict[str, TaskData]":
        """Return the tasks of the configuration; other options, perhaps another version's, are ignored."""
        from coin.data import TaskData
        from coin.data.tasks import task_with

        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--tasks", type=dict[str, TaskData])
        tasks = parser.instantiate(parser.parse_object({"tasks": self._configuration["tasks"]})).tasks
        return {name: task_with(tasks[name], image_size=self.experts.config.image_size) for name in self.tasks}

    @property
    def kept_decoders(self) -> Path:
        """The file of `fitted_decoders`."""
        return self.folder / "decoders" / f"{self.coded[0].stem}-{self.decoder.name}.safetensors"

    def fitted_decoders(self) -> list[Decoder]:
        """Return the decoders for every erasure, fitted as in the evaluation, and stored in the seed's folder.

        A decoder that needs no survivor is fitted once, for all experts.
        """
        return self._fit_decoders()

    def unfitted_decoders(self, inputs: Any = None) -> list[Decoder]:
        """Return the same decoders before they are fitted; the experts' heads, if needed, are checked on the inputs."""
        erasures = self.code.erasures() if self.decoder.reads_survivors else [tuple(range(self.code.num_experts))]
        heads = self._networks.heads(inputs) if self.decoder.kind is DecoderKind.expert_head else None
        return [make_decoder(self.decoder, self.code, erased, heads) for erased in erasures]

    def thresholds(self) -> tuple[dict[str, float], dict[tuple[tuple[int, ...], int], float]]:
        """Return the run's promise, if any, and the accepted risk by lost experts and one of them."""
        frame = read_promises(self.folder)
        if frame is None:
            return {}, {}
        own = (frame["method"] == self.method) & (frame["decoder"] == self.decoder.name)
        rows = frame[own & (frame["batchnorm"].map(requested_policy) == self.batchnorm)]
        places = {task: place for place, task in enumerate(self.tasks)}
        found = {
            (tuple(sorted(places[each] for each in erased.split("+"))), places[task]): float(threshold)
            for erased, task, threshold in zip(rows["erased"], rows["task"], rows["threshold"], strict=True)
        }
        return {name: float(rows[name].iloc[0]) for name in ("alpha", "confidence") if found}, found

    @cached_property
    def _networks(self) -> "Coded":
        from coin.modules import Coded

        return Coded(self.code, self.experts.networks, [load_network(path).network for path in self.coded])

    def _fit_decoders(self) -> list[Decoder]:
        config, calibration = self.decoder, self.data().calibration()
        decoders = self.unfitted_decoders(next(iter(calibration)))
        parts = [self._networks.answers(batch, features=config.reads_features) for batch in calibration]
        answers = replace(Answers.concatenate(parts), tasks=calibration.part).with_kernels()
        return [decoder.fit(answers) for decoder in decoders]


def read_every_result(folder: Path) -> tuple[Path, pd.DataFrame]:
    """Return the first seed's folder and the results of all seeds, given an experiment's folder or one seed's."""
    seeds = [folder] if (folder / RESULTS_CSV).is_file() else seed_folders(folder)
    if not seeds:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            "experiment or of one seed; make it with `coin run`"
        )
    frame = pd.concat([read_results(each) for each in seeds], ignore_index=True)
    return seeds[0], frame.assign(batchnorm=frame["batchnorm"].map(requested_policy))


def read_coded_system(folder: Path, choice: Choice, alone: bool = False) -> CodedSystem:
    """Read a coded system of an experiment's first seed, or of a seed; `alone`: one whose decoder needs no survivor.

    Raises:
        ConfigurationError: There are no such results.
        FileError: A file is missing or damaged, or a coded model was made of other experts.
    """
    seed, frame = read_every_result(folder)
    results = _results_of(frame, choice, folder, alone)
    method, batchnorm = str(results["method"].iloc[0]), str(results["batchnorm"].iloc[0])
    tasks = list(dict.fromkeys(results["task"]))
    experts = ExpertFiles({task: seed / "experts" / task / "expert.safetensors" for task in tasks})
    code = (read_configuration(seed).get("configuration") or {}).get("code")
    coded = {}
    for path in (seed / "coded").glob("*.safetensors"):
        made = load_provenance(path)
        # Beside them may lie what earlier runs have made for other codes or tasks.
        current = made.get("code") == code and set(made.get("tasks", ())) == set(tasks)
        if current and (made.get("label"), made.get("batchnorm")) == (method, batchnorm):
            experts.paths = {task: experts.paths[task] for task in made["tasks"]}  # in the order of the code
            coded[int(made["row"])] = path
    if not coded:
        raise FileError(f"found no coded model of method {method} ({batchnorm}) in '{seed / 'coded'}'; run it again")
    paths = tuple(coded[row] for row in sorted(coded))
    _, (variant,) = read_coded(paths, list(experts.fingerprints.values()))
    decoder = DecoderConfig.named(str(results["decoder"].iloc[0]))
    return CodedSystem(seed, experts, paths, variant.code, method, batchnorm, decoder, results)


def _results_of(frame: pd.DataFrame, choice: Choice, folder: Path, alone: bool) -> pd.DataFrame:
    """Return the rows of a decoder, a method and its BatchNorm policy; options left open are those of the best rows."""
    frame = frame[~frame["method"].isin(REFERENCES) & (frame["decoder"] != REPLICA)]
    reads = {name: DecoderConfig.named(name).reads_survivors for name in frame["decoder"].unique()} if alone else {}
    frame = frame[~frame["decoder"].isin([name for name, survivors in reads.items() if survivors])]
    policy = None if choice.batchnorm is None else requested_policy(choice.batchnorm)
    for column, wanted in (("decoder", choice.decoder), ("method", choice.method), ("batchnorm", policy)):
        known = list(dict.fromkeys(frame[column]))
        if not known or wanted not in (None, *known):
            of = f"{', '.join(known) or 'no coded models'}{' whose decoder reads no survivor' if alone else ''}"
            advice = "choose one of them" if known or not alone else "add expert_head to its decoders, and run it again"
            raise ConfigurationError(f"found {column} '{wanted or '*'}', '{folder}' has results of {of}; {advice}")
        frame = frame if wanted is None else frame[frame[column] == wanted]
    systems = frame.groupby(["decoder", "method", "batchnorm"], sort=False)
    return systems.get_group(systems["decoded_accuracy"].mean().idxmax())
