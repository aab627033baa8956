"""The last line of a command: what was reached, which file has it, and the next command, to be copied."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

from coin.callbacks import ExpertExport, FisherEstimator
from coin.files.safetensors import load_provenance
from coin.reporting.results import RESULTS_CSV, read_results
from coin.reporting.summary import summarise
from coin.reporting.tables import print_summary
from coin.statistics.statistic import StatisticKind

METHODS = {StatisticKind.fisher: "Coin", StatisticKind.gram: "RegMean"}  # which read them


def after_fit(trainer: Trainer, options: Namespace) -> str:
    """Return the line of ``coin fit``."""
    reached = f"trained for {trainer.current_epoch} epochs"
    for name in ("train/loss", "val/loss", "val/accuracy"):
        if name in trainer.callback_metrics:
            value = float(trainer.callback_metrics[name])
            reached = f"{name} {value:.4g} after {trainer.current_epoch} epochs"
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    experts = [each.file(trainer) for each in callbacks if isinstance(each, ExpertExport)]
    fishers = [each.file(trainer) for each in callbacks if isinstance(each, FisherEstimator)]
    if experts and fishers:
        merge = _merge(options.data, experts[0], StatisticKind.fisher, fishers[0])
        return _line(reached, experts[0], merge)
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", None)
    file = experts[0] if experts else checkpoint or trainer.default_root_dir
    words = ["fisher", f"--ckpt_path={file}", f"--data={options.data.class_path}"]
    for name, value in _changed(options.data).items():
        words.append(f"--data.{name}={_flow(value)}")
    return _line(reached, file, words)


def after_fisher(trainer: Trainer, options: Namespace) -> str:
    """Return the line of ``coin fisher``."""
    file = Path(trainer.default_root_dir) / f"expert.{options.statistic}.safetensors"
    made = load_provenance(file)
    seconds = made["seconds"]
    reached = f"{options.statistic} of {made['samples']} samples in {seconds:.1f} s"
    expert = options.ckpt_path or "FILE"
    return _line(reached, file, _merge(options.data, expert, options.statistic, file))


def after_merge(files: Sequence[Path], experts: dict[str, str], arguments: Sequence[str]) -> str:
    """Return the line of ``coin merge``, given its arguments."""
    # --tasks=VALUE, or VALUE behind it.
    words = [word for argument in arguments for word in argument.split("=", 1)]
    tasks = (
        words[words.index("--tasks") + 1]
        if "--tasks" in words
        else _flow(dict.fromkeys(experts, "CLASS"))
    )
    coded = [str(file) for file in files]
    command = [
        "evaluate",
        "-c",
        "default",
        f"--model.experts={_flow(experts)}",
        f"--model.coded={_flow(coded)}",
        f"--data.tasks={tasks}",
    ]
    return _line(f"{len(experts)} experts merged", ", ".join(coded), command)


def after_evaluate(trainer: Trainer, _: Namespace) -> str:
    """Print the table of ``coin evaluate``, and return its line."""
    folder = Path(trainer.default_root_dir)
    print_summary(summarise(read_results(folder)))
    return _line("measured", folder / RESULTS_CSV, ["choose", str(folder)])


def _line(reached: str, file: Path | str, command: Sequence[str]) -> str:
    return f"{reached}; wrote {file}; next: coin {shlex.join(command)}"


def _merge(
    data: Namespace, expert: Path | str, statistic: StatisticKind, file: Path | str
) -> list[str]:
    """Return the merge of an expert with others, whose names, files and classes are the user's to fill in."""
    task = str(data.class_path).rpartition(".")[2].lower()
    own: dict[str, Any] = {"class_path": data.class_path, "init_args": _changed(data)}
    if task == "tasks":  # of a pooled Fisher: several
        own = {"class_path": "CLASS"}
    experts = _flow({task: str(expert), "TASK": "FILE"})
    statistics = _flow({task: str(file), "TASK": "FILE"})
    tasks = _flow({task: own, "TASK": {"class_path": "CLASS"}})
    return [
        "merge",
        f"--method={METHODS[statistic]}",
        f"--experts={experts}",
        f"--{statistic}={statistics}",
        f"--tasks={tasks}",
        "--output=coded",
    ]


def _changed(data: Namespace) -> dict[str, Any]:
    """Return the options of the data that are not the defaults of its class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(locate(data.class_path), "data")
    defaults = parser.get_defaults().data
    given = {name: value for name, value in data.init_args.items() if name != "seed"}
    return {name: value for name, value in given.items() if value != defaults.get(name)}


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, sort_keys=False)
    return str(text).removesuffix("...\n").strip()
