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
from coin.reporting.choice import recommended, weakness
from coin.reporting.results import RESULTS_CSV, read_results
from coin.reporting.summary import stand_ins, summarise
from coin.reporting.tables import print_summary
from coin.statistics.statistic import StatisticKind

METHODS = {StatisticKind.fisher: "Coin", StatisticKind.gram: "RegMean"}  # which read them


def after_fit(trainer: Trainer, options: Namespace) -> str:
    """Return the line of ``coin fit``."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = [f"{name} {metrics[name]:.4g}" for name in ("val/accuracy", "val/loss", "train/loss") if name in metrics]
    reached = f"{next(iter(found), 'trained')} after {trainer.current_epoch} epochs"
    exports: list[Any] = [each.file(trainer) for each in callbacks if isinstance(each, ExpertExport)]
    fishers = [each.file(trainer) for each in callbacks if isinstance(each, FisherEstimator)]
    saved = getattr(trainer.checkpoint_callback, "best_model_path", None)
    file = exports[0] if exports else saved or trainer.default_root_dir
    if exports and fishers:
        return _line(reached, file, _merge(options.data, file, StatisticKind.fisher, fishers[0]))
    own = [f"--data.{name}={_flow(value)}" for name, value in _changed(options.data).items()]
    return _line(reached, file, ["fisher", f"--ckpt_path={file}", f"--data={options.data.class_path}", *own])


def after_fisher(trainer: Trainer, options: Namespace) -> str:
    """Return the line of ``coin fisher``."""
    file = Path(trainer.default_root_dir) / f"expert.{options.statistic}.safetensors"
    made = load_provenance(file)
    reached = f"{options.statistic} of {made['samples']} samples in {made['seconds']:.1f} s"
    return _line(reached, file, _merge(options.data, options.ckpt_path or "FILE", options.statistic, file))


def after_merge(files: Sequence[Path], experts: dict[str, str], arguments: Sequence[str]) -> str:
    """Return the line of ``coin merge``, given its arguments."""
    parts = [part for each in arguments for part in each.split("=", 1)]  # --tasks=VALUE, or VALUE behind it
    tasks = parts[parts.index("--tasks") + 1] if "--tasks" in parts else None
    named = tasks or _flow(dict.fromkeys(experts, "CLASS"))
    words = ["evaluate", "-c", "default", f"--model.experts={_flow(experts)}"]
    words += [f"--model.coded={_flow(list(map(str, files)))}", f"--data.tasks={named}"]
    return _line(f"{len(experts)} experts merged", ", ".join(map(str, files)), words)


def after_evaluate(trainer: Trainer, _: Namespace) -> str:
    """Print the table of ``coin evaluate``, and return its line."""
    folder = Path(trainer.default_root_dir)
    summary = summarise(read_results(folder))
    print_summary(summary, reported=False)
    kept = stand_ins(summary)
    reached = "measured"
    if len(kept):
        row = recommended(kept)
        reached = weakness(row) or f"NDA {100 * row['nda_mean']:.1f} with {row['name']} and {row['decoder']}"
    return _line(reached, folder / RESULTS_CSV, ["choose", str(folder)])


def _line(reached: str, file: Path | str, command: Sequence[str]) -> str:
    return f"{reached}; wrote {file}; next: coin {shlex.join(command)}"


def _merge(data: Namespace, expert: Path | str, statistic: StatisticKind, file: Path | str) -> list[str]:
    """Return the merge of an expert with others, whose names, files and classes are the user's to fill in."""
    task, pairs = str(data.class_path).rpartition(".")[2].lower(), {"experts": expert, str(statistic): file}
    given = [f"--{name}={_flow({task: str(path), 'TASK': 'FILE'})}" for name, path in pairs.items()]
    own = {"class_path": "CLASS"} if task == "tasks" else {"class_path": data.class_path, "init_args": _changed(data)}
    tasks = f"--tasks={_flow({task: own, 'TASK': {'class_path': 'CLASS'}})}"
    return ["merge", f"--method={METHODS[statistic]}", *given, tasks, "--output=coded"]


def _changed(data: Namespace) -> dict[str, Any]:
    """Return the options of the data that are not the defaults of its class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(locate(data.class_path), "data")
    defaults = parser.get_defaults().data
    return {name: value for name, value in data.init_args.items() if name != "seed" and value != defaults.get(name)}


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, sort_keys=False)
    return str(text).removesuffix("...\n").strip()
