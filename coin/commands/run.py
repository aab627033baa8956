"""``coin run``: a whole experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.commands.parser import command_parser, parse
from coin.core.processes import is_rank_zero
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import plan
from coin.pipeline.pool import Launch, check_launch
from coin.pipeline.run import run_experiment
from coin.reporting.report import REPORT_HTML
from coin.reporting.summary import read_run
from coin.reporting.tables import print_standins


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, and print its results and the command that goes on from it."""
    experiment, options = read_experiment(arguments)
    if options["dry_run"]:
        print_plan(experiment, options["launch"])
        return
    run_experiment(experiment, options["launch"], run_step, options["only"])
    if options["only"] is None and is_rank_zero():
        folder = experiment.folder
        print_standins(read_run(folder)[1])
        print(f"report: {folder / REPORT_HTML}")
        print(f"next: coin choose {folder} --accuracy=0.98 says what to keep")


def run_step(file: Path, name: str) -> None:
    """Run one step of an experiment's file, and what it needs: what a job does."""
    experiment, options = read_experiment(["-c", str(file)])
    run_experiment(experiment, options["launch"], run_step, name, show=False)


def print_plan(experiment: Experiment, launch: Launch) -> None:
    """Check what a run checks, and print every step: done or to do, what it makes, and the name of its folder."""
    experiment.check()
    check_launch(experiment, launch)
    steps = plan(experiment)
    to_do = [step for step in steps if not step.is_done]
    print(f"{experiment.name}: {len(to_do)} of {len(steps)} steps to do")
    for step in steps:
        state = "to do" if step in to_do else "done"
        print(f"{state:>5}  {step.what}  ({step.folder.name})")


def read_experiment(arguments: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment that the arguments of ``coin run`` describe, and the options beside it."""
    parser = command_parser("run")
    parser.add_class_arguments(Experiment, skip={"config"})
    parser.add_class_arguments(Launch, "launch")
    only = "Run this step of the plan (a task: its expert) for every seed, and what it depends on; nothing else."
    parser.add_argument("--only", type=str | None, default=None, help=only)
    dry_run = "Print the plan: every step, done or to do."
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    found = parse(parser, arguments)
    given = yaml.safe_load(parser.dump(found, skip_validation=True))
    options = parser.instantiate(found).as_dict()
    beside = {name: options.pop(name) for name in ("launch", "only", "dry_run")}
    own = {name: value for name, value in given.items() if name in options}
    for task in own["tasks"].values():
        task.setdefault("init_args", {})["image_size"] = options["network"].image_size
    return Experiment(**options, config=own), beside
