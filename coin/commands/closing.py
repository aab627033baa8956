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
    known = [name for name in ("val/accuracy", "val/loss", "train/loss") if name in trainer.callback_metrics]
    best = f"{known[0]} {float(trainer.callback_metrics[known[0]]):.4g}" if known else "trained"
    reached = f"{best} after {trainer.current_epoch} epochs"
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    experts: list[Any] = [each.file(trainer) for each in callbacks if isinstance(each, ExpertExport)]
    fishers = [each.file(trainer) for each in callbacks if isinstance(each, FisherEstimator)]
    if experts and fishers:
        return _line(reached, experts[0], _merge(options.data, experts[0], StatisticKind.fisher, fishers[0]))
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", None) or trainer.default_root_dir
    file = experts[0] if experts else checkpoint
    data = [f"--data.{name}={_flow(value)}" for name, value in _changed(options.data).items()]
    return _line(reached, file, ["fisher", f"--ckpt_path={file}", f"--data={options.data.class_path}", *data])


def after_fisher(trainer: Trainer, options: Namespace) -> str:
    """Return the line of ``coin fisher``."""
    file = Path(trainer.default_root_dir) / f"expert.{options.statistic}.safetensors"
    made = load_provenance(file)
    reached = f"{options.statistic} of {made['samples']} samples in {made['seconds']:.1f} s"
    return _line(reached, file, _merge(options.data, options.ckpt_path or "FILE", options.statistic, file))


def after_merge(files: Sequence[Path], experts: dict[str, str], arguments: Sequence[str]) -> str:
    """Return the line of ``coin merge``, given its arguments."""
    given = [each.removeprefix("--tasks=") for each in arguments if each.startswith("--tasks=")]
    tasks = given[0] if given else _flow(dict.fromkeys(experts, "CLASS"))
    words = ["evaluate", "-c", "default", f"--model.experts={_flow(experts)}"]
    words += [f"--model.coded={_flow(list(map(str, files)))}", f"--data.tasks={tasks}"]
    return _line(f"{len(experts)} experts merged", ", ".join(map(str, files)), words)


def after_evaluate(trainer: Trainer, _: Namespace) -> str:
    """Print the table of ``coin evaluate``, and return its line."""
    folder = Path(trainer.default_root_dir)
    print_summary(summarise(read_results(folder)))
    return _line("measured", folder / RESULTS_CSV, ["choose", str(folder)])


def _line(reached: str, file: Path | str, command: Sequence[str]) -> str:
    return f"{reached}; wrote {file}; next: coin {shlex.join(command)}"


def _merge(data: Namespace, expert: Path | str, statistic: StatisticKind, file: Path | str) -> list[str]:
    """Return the merge of an expert with others, whose names, files and classes are the user's to fill in."""
    task = str(data.class_path).rpartition(".")[2].lower()
    own: dict[str, Any] = {"class_path": data.class_path, "init_args": _changed(data)}
    if task == "tasks":  # of a pooled Fisher: several
        own = {"class_path": "CLASS"}
    experts = {task: str(expert), "TASK": "FILE"}
    files = {task: str(file), "TASK": "FILE"}
    tasks = {task: own, "TASK": {"class_path": "CLASS"}}
    return [
        "merge",
        f"--method={METHODS[statistic]}",
        f"--experts={_flow(experts)}",
        f"--{statistic}={_flow(files)}",
        f"--tasks={_flow(tasks)}",
        "--output=coded",
    ]


def _changed(data: Namespace) -> dict[str, Any]:
    """Return the options of the data that are not the defaults of its class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(locate(data.class_path), "data")
    defaults = parser.get_defaults().data
    return {name: value for name, value in data.init_args.items() if name != "seed" and value != defaults.get(name)}


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, sort_keys=False)
    return str(text).removesuffix("...\n").strip()
