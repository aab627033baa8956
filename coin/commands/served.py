"""What an experiment's folder offers to serve: its experts, one method's coded models, one decoder, their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from coin.coding import Code, DecoderConfig
from coin.errors import ConfigurationError, FileError
from coin.files.safetensors import load_provenance
from coin.modules.variants import NONE, ORACLE, read_coded
from coin.reporting.results import RESULTS_CSV, asked_policy, read_configuration, read_results
from coin.reporting.summary import seed_folders
from coin.steps.expert_files import ExpertFiles


@dataclass(frozen=True)
class Served:
    """A coded system of one seed.

    Attributes:
        folder: ``runs/NAME/seed-K``.
        experts: The experts.
        coded: The coded models' files, in the order of the code's rows.
        code: The code.
        method: What the results call the merge method.
        batchnorm: Its BatchNorm policy.
        decoder: The decoder.
    """

    folder: Path
    experts: ExpertFiles
    coded: tuple[Path, ...]
    code: Code
    method: str
    batchnorm: str
    decoder: DecoderConfig

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self.experts.paths)

    @property
    def classes(self) -> dict[str, list[str]]:
        """The names of every task's classes; numbers where the expert's file does not say."""
        named = {}
        for task, file in self.experts.opened.items():
            own = file.provenance.get("classes")
            named[task] = [str(name) for name in own] if own else [str(index) for index in range(file.num_classes)]
        return named


@dataclass(frozen=True)
class Accuracies:
    """Means over tasks, erasures and seeds of an experiment's results.

    Attributes:
        expert: Of the experts themselves.
        decoded: Of decoded answers, by the number of experts that are lost at once.
    """

    expert: float
    decoded: dict[int, float]


def results_folders(folder: Path) -> list[Path]:
    """Return the seeds' folders of an experiment, or a seed's folder itself.

    Raises:
        FileError: There are no results in it.
    """
    if (folder / RESULTS_CSV).is_file():
        return [folder]
    found = seed_folders(folder)
    if not found:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            "experiment or of one seed; make it with `coin run`"
        )
    return found


def choose_variant(folders: Sequence[Path], method: str | None, batchnorm: str | None, decoder: str) -> tuple[str, str]:
    """Return a method with its BatchNorm policy that has results with this decoder.

    Args:
        folders: The seeds' folders.
        method: What the results call it; none takes the first one that has coded models.
        batchnorm: The policy that its run asked for, or the results' text for it; none takes the method's first one.
        decoder: What the results call the decoder.

    Raises:
        ConfigurationError: There are no such results; the message says which there are.
    """
    frame = read_results(folders[0])
    frame = frame[~frame["method"].isin([NONE, ORACLE])]
    if frame.empty:
        raise ConfigurationError(f"'{folders[0]}' has no results of coded models, expected some; run it with methods")
    if decoder not in set(frame["decoder"]):
        known = ", ".join(dict.fromkeys(frame["decoder"]))
        raise ConfigurationError(
            f"found decoder '{decoder}', '{folders[0]}' has results of {known}; choose one of them"
        )
    if method is not None and method not in set(frame["method"]):
        known = ", ".join(dict.fromkeys(frame["method"]))
        raise ConfigurationError(f"found method '{method}', '{folders[0]}' has results of {known}; choose one of them")
    frame = frame if method is None else frame[frame["method"] == method]
    chosen = str(frame["method"].iloc[0])
    policies = {policy: asked_policy(policy) for policy in frame.loc[frame["method"] == chosen, "batchnorm"]}
    if batchnorm is None:
        return chosen, next(iter(policies.values()))
    if batchnorm not in {*policies, *policies.values()}:
        known = ", ".join(dict.fromkeys(policies.values())) or "none"
        raise ConfigurationError(
            f"found batchnorm '{batchnorm}' of method {chosen}, expected the policy that its run asked for, one of "
            f"{known}"
        )
    return chosen, asked_policy(batchnorm)


def read_accuracies(folders: Sequence[Path], method: str, batchnorm: str, decoder: str) -> Accuracies:
    """Return what the results of all seeds say of one method and decoder."""
    frame = pd.concat([read_results(folder) for folder in folders], ignore_index=True)
    asked = frame["batchnorm"].map(asked_policy)
    chosen = (frame["method"] == method) & (asked == batchnorm) & (frame["decoder"] == decoder)
    frame = frame[chosen]
    sizes = frame["erased"].str.count(r"\+") + 1
    decoded = {int(size): float(rows["decoded_accuracy"].mean()) for size, rows in frame.groupby(sizes)}
    return Accuracies(float(frame["expert_accuracy"].mean()), decoded)


def read_served(folder: Path, method: str | None, batchnorm: str | None, decoder: str) -> Served:
    """Read the coded system of one seed.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        method: See `choose_variant`.
        batchnorm: See `choose_variant`.
        decoder: What the results call the decoder.

    Raises:
        ConfigurationError: There are no such results.
        FileError: A file is missing or damaged, or a coded model was made of other experts.
    """
    seed = results_folders(folder)[0]
    method, batchnorm = choose_variant([seed], method, batchnorm, decoder)
    tasks = list(dict.fromkeys(read_results(seed)["task"]))
    experts = ExpertFiles({task: seed / "experts" / task / "expert.safetensors" for task in tasks})
    configuration = read_configuration(seed).get("configuration")
    code = configuration.get("code") if isinstance(configuration, dict) else None
    coded = []
    for path in sorted((seed / "coded").glob("*.safetensors")):
        made = load_provenance(path)
        # Beside them may lie what earlier runs have made for other codes or tasks.
        current = made.get("code") == code and set(made.get("tasks", ())) == set(tasks)
        if current and (made.get("label"), made.get("batchnorm")) == (method, batchnorm):
            experts.paths = {task: experts.paths[task] for task in made["tasks"]}  # in the order of the code
            coded.append((int(made["row"]), path))
    if not coded:
        raise FileError(f"found no coded model of method {method} ({batchnorm}) in '{seed / 'coded'}'; run it again")
    paths = tuple(path for _, path in sorted(coded))
    _, (variant,) = read_coded(paths, list(experts.marks.values()))
    return Served(seed, experts, paths, variant.code, method, batchnorm, DecoderConfig.named(decoder))
